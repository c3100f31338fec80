"""Training on two processes gives the losses of one: DistributedDataParallel, FSDP2 and tensor parallelism, over gloo."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastattn
from fastattn.models.tensor_parallel import tensor_parallel
from fastattn.nn.parallel import HeadsParallel
from tests import distributed_worker

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes get, for every model and wrapper."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(distributed_worker.run_all, (2, str(folder)), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("how", distributed_worker.WRAPPERS)
@pytest.mark.parametrize("name", distributed_worker.MODELS)
def test_two_processes_train_as_one(name, how, results):
    expected = distributed_worker.train(name)
    assert expected[-1] < expected[0]
    assert results["losses"][name, how] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", distributed_worker.TENSOR_PARALLEL)
def test_two_processes_that_share_the_features_train_as_one(name, results):
    expected = distributed_worker.train(name, "tensor_alone")
    assert expected[-1] < expected[0]
    assert results["losses"][name, "tensor_parallel"] == pytest.approx(expected, rel=1e-5)


def test_a_shared_model_generates_and_is_saved_whole(results):
    for whole, shared, loaded in results["generated"].values():
        assert torch.equal(shared, whole)
        assert torch.equal(loaded, whole)


def test_patching_inside_wrappers(results):
    patched = results["patched"]
    assert patched["swapped"].keys() == {"module", "module.self_attn", "module.norm1", "module.norm2"}
    assert patched["left"][""] == "its parameters are DTensor: patch before they are distributed"


@pytest.mark.parametrize(
    ("dimensions", "size", "message"),
    [(2, 2, "mesh must have one dimension, got 2"), (1, 3, "num_heads must be a multiple of the mesh's 3, got 4")],
)
def test_a_mesh_that_does_not_fit(dimensions, size, message):
    model = distributed_worker.LanguageModel().gpt
    with pytest.raises(ValueError, match=message):
        tensor_parallel(model, SimpleNamespace(ndim=dimensions, size=lambda: size))
    assert type(model.blocks[0].attention.in_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("module", "size", "error", "message"),
    [
        (torch.nn.MultiheadAttention(8, 2), 2, TypeError, "must be a fastattn.nn.MultiheadAttention, got Multihead"),
        (fastattn.nn.MultiheadAttention(8, 2), 3, ValueError, "num_heads must be a multiple of the mesh's 3, got 2"),
        (fastattn.nn.MultiheadAttention(8, 2, add_bias_kv=True), 2, ValueError, "add_bias_kv"),
    ],
)
def test_heads_that_cannot_be_shared(module, size, error, message):
    with pytest.raises(error, match=message):
        HeadsParallel()._apply(module, SimpleNamespace(size=lambda: size))


def test_tensors_that_are_shared_among_processes(results):
    """Sequence parallelism gives norms distributed tensors, which no op of ours can read: PyTorch's operations do."""
    for got, expected in results["shared"].values():
        torch.testing.assert_close(got, expected)


def test_attention_of_shared_batches_and_heads(results):
    """Outputs, gradients, second derivatives and maps: every process computes its own part of them."""
    found, messages = results["attention"]
    assert len(found) == 7
    for got, expected in found.values():
        torch.testing.assert_close(got, expected)
    assert messages["mixed"].endswith(
        "must be DTensors over one mesh where one argument is one, got DTensor, Tensor, Tensor"
    )
    assert messages["dropout"] == "dropout_p must be 0 where query, key and value are DTensors, got 0.5"
