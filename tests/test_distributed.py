"""Training on two processes gives the losses of one: DistributedDataParallel, FSDP2 and tensor parallelism, over gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import distributed_worker

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """What two processes get, for every model and wrapper."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(distributed_worker.run_all, (2, str(folder)), nprocs=2)
    return torch.load(folder / "losses.pt")


@pytest.mark.parametrize("how", distributed_worker.WRAPPERS)
@pytest.mark.parametrize("name", distributed_worker.MODELS)
def test_two_processes_train_as_one(name, how, losses):
    expected = distributed_worker.train(name)
    assert expected[-1] < expected[0]
    assert losses[name, how] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", distributed_worker.PLANS)
def test_two_processes_that_share_the_features_train_as_one(name, losses):
    expected = distributed_worker.train(name, "tensor_alone")
    assert expected[-1] < expected[0]
    assert losses[name, "tensor_parallel"] == pytest.approx(expected, rel=1e-5)
