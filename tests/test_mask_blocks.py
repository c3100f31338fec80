"""A large dense mask is read once for what it hides: by blocks on a GPU, by columns on a CPU."""

import pytest
import torch

import fastattn
from fastattn import BlockMask
from fastattn.block_mask import Blocks
from fastattn.kernels import mask_blocks
from tests import reference
from tests.compare import assert_close, value_and_gradients

torch.manual_seed(0)
N, NK = 270, 530  # neither is a multiple of 128
ROWS, COLUMNS = torch.arange(N)[:, None], torch.arange(NK)


def stairs(shape: tuple[int, ...] = (1, 1)) -> torch.Tensor:
    """Empty, full and mixed blocks: causal, with scattered pairs and rows that see nothing."""
    mask = (ROWS + NK - N >= COLUMNS).expand(*shape, N, NK).clone()
    mask[..., 30:160, 400:] &= torch.rand(*shape, 130, NK - 400) > 0.5
    mask[..., 200:210, :] = False
    mask[..., :130] &= (torch.arange(shape[0]) % 2 == 0).view(-1, 1, 1, 1)
    return mask


def listed(lists: torch.Tensor, counts: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """Of each row of blocks: (the full ones, the mixed ones)."""
    pairs = zip(lists[..., 0].flatten(0, 2).tolist(), counts.flatten(0, 2).tolist())
    return [(places[:full], places[full:some]) for places, (full, some) in pairs]


def bits(blocks: Blocks) -> list[list[list[bool]]]:
    """The bits of the mixed blocks, in the order of `kinds`."""
    kinds = blocks.kinds.flatten()
    return blocks.tiles[kinds[kinds >= 0].long()].tolist()


@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 40), (300, None)], ids=str)
@pytest.mark.parametrize("name", ["shared", "per batch and head", "transposed", "expanded", "lists in parts"])
def test_blocks_are_those_of_from_mask(name, window, monkeypatch):
    mask = stairs((2, 3) if name == "per batch and head" else (1, 1))
    if name == "transposed":
        mask = mask.mT.contiguous().mT
    if name == "expanded":
        mask = mask.expand(4, 2, -1, -1)
    if name == "lists in parts":
        monkeypatch.setattr(mask_blocks, "_ENTRIES", 2)
    found = mask_blocks.find_blocks(mask, *window)
    rows, columns = mask.shape[2:]
    shown = mask[:1, :1] if name == "expanded" else mask
    expected = (BlockMask.from_mask(shown) & BlockMask.window(rows, columns, *window)).blocks
    assert found.kinds.shape == expected.kinds.shape
    assert torch.equal(found.kinds.clamp(max=0), expected.kinds.clamp(max=0))
    assert listed(found.rows, found.row_counts) == listed(expected.rows, expected.row_counts)
    assert listed(found.columns, found.column_counts) == listed(expected.columns, expected.column_counts)
    assert bits(found) == bits(expected)
    for lists, counts, kinds in (
        (found.rows, found.row_counts, found.kinds),
        (found.columns, found.column_counts, found.kinds.mT),
    ):
        for entries, (_, some), row in zip(lists.flatten(0, 2), counts.flatten(0, 2).tolist(), kinds.flatten(0, 2)):
            assert torch.equal(entries[:some, 1], row[entries[:some, 0].long()])


def test_small_and_uniform_masks_are_read_as_they_are():
    large = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    assert mask_blocks.is_listed(large)
    assert mask_blocks.is_listed(large.expand(100, 100, -1, -1))
    assert not mask_blocks.is_listed(large[:, :, :511])
    assert not mask_blocks.is_listed(large[..., :511])
    assert not mask_blocks.is_listed(large[:, :, :1])
    assert not mask_blocks.is_listed(large[:, :, :1].expand(1, 1, 512, 512))
    assert not mask_blocks.is_listed(torch.empty(5000, 1, 512, 512, dtype=torch.bool, device="meta"))


@pytest.fixture
def smaller(monkeypatch):
    """The interpreter takes its time."""
    monkeypatch.setattr(mask_blocks, "_LEAST", 128)
    monkeypatch.setattr("fastattn.eager.attention_fused._MANY_ROWS", 128)
    monkeypatch.setattr("fastattn.eager.attention_fused._FEW_ROWS", 64)


def case(backend: str, dtype: torch.dtype, mask: torch.Tensor, **options):
    """(ours, definition, plain PyTorch), each (outputs, gradients)."""
    torch.manual_seed(1)
    heads = mask.shape[1]
    shapes = [(len(mask), heads, mask.shape[2], 16), *[(len(mask), 1, mask.shape[3], 16)] * 2]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [torch.randn(shapes[0])]

    def ours(q, k, v):
        return (fastattn.attention(q, k, v, mask=mask, **options),)

    def naive(q, k, v):
        return reference.attention(q, k, v, mask=mask, **options)[:1]

    with fastattn.backend.use(backend):
        got = value_and_gradients(ours, tensors, grads)
    return (
        got,
        value_and_gradients(naive, [t.double() for t in tensors], grads),
        value_and_gradients(naive, tensors, grads),
    )


def check(results) -> None:
    for index, triple in enumerate(zip(*(outputs + gradients for outputs, gradients in results))):
        assert_close(f"result {index}", *triple, relative=8 * torch.finfo(torch.float32).eps)


WINDOW = {"window": (200, 50), "softcap": 5.0}


@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", {}), ("eager", {"causal": True}), ("eager", WINDOW), ("triton", {"causal": True}), ("triton", WINDOW)],
    ids=str,
)
def test_attention_is_that_of_the_definition(backend, options, smaller):
    check(case(backend, torch.float32, stairs((2, 1)), **options))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float16), ("eager", torch.bfloat16), ("triton", torch.bfloat16)], ids=str
)
def test_in_16_bits(backend, dtype, smaller):
    check(case(backend, dtype, stairs((1, 2))))


@pytest.mark.parametrize("rows", [800, 1600])  # PyTorch's tiles grow at 768; blocks of 256 and of 768 rows are used
@pytest.mark.parametrize("name", ["causal", "band", "random", "a few rows", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_masks_on_the_cpu(name, rows, dtype):
    torch.manual_seed(2)
    i, j = torch.arange(rows)[:, None], torch.arange(rows)
    masks = {
        "causal": i >= j,
        "band": (i - j).abs() < 70,
        "random": torch.rand(rows, rows) > 0.5,
        "a few rows": (i % 300 == 7) & (j > 100),
    }
    mask = masks["causal"] if name == "per head" else masks[name]
    mask = mask[None, None].expand(1, 2 if name == "per head" else 1, -1, -1).contiguous()
    if name == "per head":
        mask[:, 1] = masks["band"]
    check(case("eager", dtype, mask))


@pytest.mark.parametrize(("backend", "size"), [("eager", 800), ("triton", 520)])
def test_what_a_mask_hides_is_not_read(backend, size):
    """The keys that only hidden pairs could reach are NaN, and would reach the results through any product."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    mask = ((i >= j) & (j < 384))[None, None]
    leaves = [torch.randn(1, 1, size, 16) for _ in range(3)]
    for x in leaves[1:]:
        x[:, :, 384:] = torch.nan
    leaves = [x.requires_grad_() for x in leaves]
    with fastattn.backend.use(backend):
        out = fastattn.attention(*leaves, mask=mask)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_explain_says_so():
    q = torch.zeros(1, 1, 512, 16)
    mask = torch.ones(512, 512, dtype=torch.bool)
    with fastattn.backend.use("triton"):
        large, row = (fastattn.explain(fastattn.attention, q, q, q, mask=m) for m in (mask, mask[:1]))
    assert "read once for its blocks" in large
    assert "read once for its blocks" not in row


def test_transforms_do_not_look_at_the_mask():
    q, k, v = torch.randn(3, 2, 1, 1, 800, 16).unbind()
    masks = torch.stack([torch.ones(800, 800, dtype=torch.bool).tril(d) for d in (0, -3)])
    got = torch.func.vmap(lambda q, k, v, m: fastattn.attention(q, k, v, mask=m))(q, k, v, masks)
    for part, *inputs, mask in zip(got, q, k, v, masks):
        assert torch.allclose(part, fastattn.attention(*inputs, mask=mask), atol=1e-5)
