"""A grid's second and third axes end at 65,535 on a GPU, and nowhere in the interpreter: what grows lies along the first."""

import pytest
import torch
import triton

import fastattn
from fastattn.kernels import decode, launch, loss, normalization, normalization_backward

MODULES = decode, loss, normalization, normalization_backward
MANY = 65_536


def norm(*shape):
    x, scale = torch.zeros(shape), torch.zeros(shape, requires_grad=True)
    fastattn.layer_norm(x, shape[-1], scale=scale).sum().backward()


def append():
    cache, new = torch.zeros(2, 1, 1, 16 * MANY, 1).unbind(), torch.zeros(1, 1, 16 * MANY, 1)
    with torch.no_grad():
        fastattn.attention_with_kv_cache(new[:, :, :1], *cache, 0, key=new, value=new)


CALLS = {
    "norm of many groups": lambda: norm(MANY, 4),
    "norm of many columns": lambda: norm(1, 128 * MANY),
    "many keys to append": append,
    "many losses": lambda: fastattn.cross_entropy(torch.zeros(MANY, 2, requires_grad=True), torch.zeros(MANY).long()).backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_only_the_first_axis_grows(name, monkeypatch):
    grids = []
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    with fastattn.backend.use("triton"):
        CALLS[name]()
    assert max(grid[0] for grid in grids) >= MANY
    assert all(size < MANY for grid in grids for size in grid[1:])


def test_too_many_along_another_axis_is_an_error():
    """Of a bias's gradient alone, over more than a million rows or keys."""

    def kernel(*_):
        raise AssertionError("was launched")

    with pytest.raises(ValueError, match=r"kernel would need a grid of \(1, 65536\): GPUs take at most 65535"):
        launch.launch(kernel, (1, MANY))


def test_a_gpu_that_is_too_small_is_told_of():
    """A T4's shared memory is smaller than that of any GPU that tiles are made for."""

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            raise triton.OutOfResources(81_920, 65_536, "shared memory")

    with pytest.raises(
        RuntimeError, match="kernel does not fit this GPU, which has 65536 of shared memory where 81920"
    ):
        launch.launch(Kernel(), (1,))
