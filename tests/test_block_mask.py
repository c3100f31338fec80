"""`BlockMask`: its blocks are those of the dense mask, attention with it is attention with that mask, and it skips."""

import pytest
import torch

import fastattn
from fastattn import BlockMask
from fastattn.block_mask import EMPTY, FULL, Blocks, _cut_to_window
from fastattn.kernels.attention_config import AttentionConfig
from fastattn.ops.attention import attention_backward_op, attention_op
from tests import reference
from tests.compare import assert_close, value_and_gradients
from tests.contract import BACKENDS

torch.manual_seed(0)
IDS = torch.tensor([0] * 130 + [1] * 20 + [2] * 10)
SCATTERED = torch.tensor([[[[1, 0], [0, 1]]], [[[0, 1], [1, 0]]]]).bool()
SCATTERED = SCATTERED.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :140, :190]
DEAD_ROWS = torch.ones(1, 2, 140, 150, dtype=torch.bool)
DEAD_ROWS[:, 0, 3:131] = False
DEAD_ROWS[:, 1, :, 145:] = False

i, j = torch.arange(160)[:, None], torch.arange(160)
SAME = IDS[:, None] == IDS
MASKS = {  # (made by blocks, dense)
    "causal": (BlockMask.causal(160), i >= j),
    "causal_more_keys": (BlockMask.causal(30, 160), i[:30] + 130 >= j),
    "causal_more_queries": (BlockMask.causal(160, 30), i - 130 >= j[:30]),
    "window": (BlockMask.window(160, 160, 40, 3), (i - j <= 40) & (j - i <= 3)),
    "document": (BlockMask.document(IDS), SAME),
    "documents_of_a_batch": (BlockMask.document(torch.stack([IDS, IDS.flip(0)])), torch.stack([SAME, SAME.flip(0, 1)])[:, None]),
    "and": (BlockMask.causal(160) & BlockMask.document(IDS), (i >= j) & SAME),
    "or": (BlockMask.document(IDS) | BlockMask.window(160, None, 0, 0), SAME | (i == j)),
    "scattered_blocks": (BlockMask.from_mask(SCATTERED), SCATTERED),
    "rows_that_see_nothing": (BlockMask.from_mask(DEAD_ROWS), DEAD_ROWS),
    "a_few_pairs": (BlockMask.from_mask(torch.eye(5, 200).bool()), torch.eye(5, 200).bool()),
    "all": (BlockMask.from_mask(torch.ones(128, 128).bool()), torch.ones(128, 128).bool()),
    "none": (BlockMask.from_mask(torch.zeros(40, 40).bool()), torch.zeros(40, 40).bool()),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_blocks_are_those_of_the_dense_mask(name):
    mask, dense = MASKS[name]
    assert torch.equal(mask.to_dense().expand(mask.shape), dense.expand(mask.shape))
    kinds, tiles = mask.blocks.kinds, mask.blocks.tiles
    assert not tiles[EMPTY].any()
    assert tiles[FULL].all()
    assert sorted(kinds[kinds >= 0].tolist()) == list(range(len(tiles) - 2))
    per_block = tiles[:-2].flatten(1)
    assert (per_block.any(1) & ~per_block.all(1)).all()
    for lists, counts, grid in (
        (mask.blocks.rows, mask.blocks.row_counts, kinds),
        (mask.blocks.columns, mask.blocks.column_counts, kinds.transpose(2, 3)),
    ):
        for entries, (full, some), row in zip(lists.flatten(0, 2), counts.flatten(0, 2).tolist(), grid.flatten(0, 2)):
            assert set(entries[:full, 0].tolist()) == set((row == FULL).nonzero().flatten().tolist())
            assert set(entries[full:some, 0].tolist()) == set((row >= 0).nonzero().flatten().tolist())
            assert torch.equal(entries[:some, 1], row[entries[:some, 0].long()])


def tensors_for(mask, dtype=torch.float32, heads=1):
    batch, mask_heads, n, nk = mask.shape
    torch.manual_seed(1)
    heads = max(heads, mask_heads)
    shapes = [(batch, heads, n, 16), (batch, 1, nk, 16), (batch, 1, nk, 24), (1, heads, n, 1), (heads,)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def both(mask, dense, options, dtype=torch.float32, extras=True):
    """(outputs, gradients) of ours with the block mask, of the fp64 definition with the dense one, and of plain PyTorch."""
    tensors = tensors_for(mask, dtype)[: 5 if extras else 3]

    def ours(q, k, v, bias=None, sinks=None):
        torch.manual_seed(3)
        return fastattn.attention(q, k, v, mask=mask, bias=bias, sinks=sinks, **options, return_lse=True)

    rest = {name: value for name, value in options.items() if name != "dropout_p"}
    factors = None
    if "dropout_p" in options:
        torch.manual_seed(3)
        seed, p = int(torch.randint(torch.iinfo(torch.int64).max, (1,))), options["dropout_p"]
        full = (*tensors[0].shape[:3], tensors[1].shape[2])
        factors = reference.philox_keep(seed, full, p).double() / (1 - p)

    def naive(q, k, v, bias=None, sinks=None):
        return reference.attention(q, k, v, mask=dense, bias=bias, sinks=sinks, **rest, dropout_factors=factors)

    dead = torch.isinf(naive(*tensors)[1])
    torch.manual_seed(2)
    grads = [torch.randn(*tensors[0].shape[:3], 24).to(dtype), torch.randn(dead.shape).masked_fill(dead, 0.0)]
    truth = value_and_gradients(naive, [t.double() for t in tensors], grads)
    return value_and_gradients(ours, tensors, grads), truth, value_and_gradients(naive, tensors, grads)


def assert_all_close(results):
    for k, triple in enumerate(zip(*(outputs + grads for outputs, grads in results))):
        assert_close(
            f"result {k}", *triple, relative=8 * torch.finfo(torch.float32).eps
        )  # |LSE| < 8: test_attention.py


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_that_with_the_dense_mask(name, backend):
    with fastattn.backend.use(backend):
        assert_all_close(both(*MASKS[name], {}, extras=False))


@pytest.mark.parametrize(("rows", "keys"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["and", "rows_that_see_nothing"])
def test_tiles_of_a_gpu(name, dtype, rows, keys, monkeypatch):
    """Mixed blocks are done in smaller tiles than full ones there; the interpreter's own are small in any case."""
    for config in ("forward", "backward_query", "backward_key"):
        where = "attention" if config == "forward" else "attention_backward"
        tile = AttentionConfig(rows, keys, 4, 1)
        monkeypatch.setattr(f"fastattn.kernels.{where}.attention_{config}_config", lambda *_, tile=tile, **__: tile)
    with fastattn.backend.use("triton"):
        assert_all_close(both(*MASKS[name], {}, dtype, extras=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_other_feature_composes(dtype, backend):
    options = {"softcap": 3.0, "alibi_slopes": torch.rand(1), "dropout_p": 0.2, "scale": 0.3, "window": (120, None)}
    with fastattn.backend.use(backend):
        assert_all_close(both(*MASKS["and"], options, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_and_window_are_intersected_once(backend):
    mask, dense = MASKS["document"]
    with fastattn.backend.use(backend):
        assert_all_close(both(mask, dense, {"causal": True}, extras=False))
    assert mask.within(None, 0) is mask.within(None, 0)
    assert mask.within(None, None) is mask


WINDOWS = [(None, 0), (0, None), (40, 3), (0, 0), (129, 127), (128, 128), (500, 500), (5, 2**30)]


@pytest.mark.parametrize("name", MASKS)
def test_a_window_inside_a_graph_is_the_one_outside(name):
    mask, _ = MASKS[name]
    for sides in WINDOWS:
        cut, eager = BlockMask(mask.shape, _cut_to_window(mask.blocks, *mask.shape[2:], *sides)), mask.within(*sides)
        assert torch.equal(cut.to_dense().expand(mask.shape), eager.to_dense().expand(mask.shape))
        assert torch.equal(cut.blocks.kinds.clamp(max=0), eager.blocks.kinds.clamp(max=0))
        assert torch.equal(cut.blocks.row_counts, eager.blocks.row_counts)
        assert torch.equal(cut.blocks.column_counts, eager.blocks.column_counts)
    none = BlockMask.causal(0, 5)
    assert _cut_to_window(none.blocks, 0, 5, 0, 0) is none.blocks


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_and_window_in_one_graph_that_comes_first(backend):
    mask = BlockMask.document(IDS)
    q, k, v = (t.requires_grad_() for t in tensors_for(mask)[:3])

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.attention(q, k, v, mask=mask, causal=True, window=(50, None))

    with fastattn.backend.use(backend):
        graphs = [torch.compile(Layer(), fullgraph=True, backend="aot_eager")]
        if backend == "eager":
            graphs.append(torch.export.export(Layer(), (q, k, v)).module())
        outs = [graph(q, k, v) for graph in graphs]
        assert not mask._within
        expected = Layer()(q, k, v)
        truth = torch.autograd.grad(expected.square().sum(), (q, k, v))
        for out in outs:
            grads = torch.autograd.grad(out.square().sum(), (q, k, v))
            assert all(torch.equal(a, b) for a, b in zip((out, *grads), (expected, *truth)))


def test_a_mask_first_used_in_inference_mode_trains():
    with torch.inference_mode():
        masks = (
            BlockMask.document(IDS),
            BlockMask.document(IDS).to("cpu"),
            BlockMask.causal(160) & BlockMask.causal(160),
        )
        x = torch.randn(1, 1, 160, 16)
        for mask in masks:
            fastattn.attention(x, x, x, mask=mask, causal=True)
    for mask in masks:
        assert not any(tensor.is_inference() for tensor in (*mask.blocks, *mask.within(None, 0).blocks))
        leaf = torch.randn(1, 1, 160, 16, requires_grad=True)
        step = torch.compile(
            lambda x, mask=mask: fastattn.attention(x, x, x, mask=mask, causal=True), backend="aot_eager"
        )
        step(leaf).sum().backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_deterministic_bit_for_bit(backend):
    with fastattn.backend.use(backend):
        (a, da), (b, db) = (both(*MASKS["scattered_blocks"], {})[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a + da, b + db))


@pytest.mark.parametrize(("backend", "size"), [("eager", 256), ("triton", 128)])  # rows that are done together
def test_empty_blocks_are_not_read(backend, size):
    """What only empty blocks could reach is NaN: it would reach the results through any product."""
    kinds = torch.tensor([[0, 1, 2], [0, -1, 2]]).repeat_interleave(size, 1)[:, : 2 * size + 30]
    mask = BlockMask.document(*kinds)
    q, k, v = (torch.randn(1, 1, 2 * size + 30, 16) for _ in range(3))
    for x in (k, v):
        x[:, :, size : 2 * size] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with fastattn.backend.use(backend):
        out = fastattn.attention(*leaves, mask=mask)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not out[:, :, size : 2 * size].any()


def test_double_backward_and_transforms():
    mask, dense = MASKS["and"]
    q, k, v = (t.double().float() for t in tensors_for(mask)[:3])

    def second(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    def ours(q, k, v):
        return fastattn.attention(q, k, v, mask=mask)

    def naive(q, k, v):
        return reference.attention(q, k, v, mask=dense)[0]

    for got, truth in zip(second(ours, (q, k, v)), second(naive, [x.double() for x in (q, k, v)])):
        assert (got - truth).abs().max() < 1e-4 * truth.abs().max()
    grad = torch.func.grad(lambda q: ours(q, k, v).sin().sum())(q)
    truth = torch.func.grad(lambda q: naive(q, k.double(), v.double()).sin().sum())(q.double())
    assert torch.allclose(grad.double(), truth, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend):
    mask, _ = MASKS["and"]
    q, k, v = (t.requires_grad_() for t in tensors_for(mask)[:3])
    with fastattn.backend.use(backend):
        if backend == "eager":
            arguments = (q, k, v, None, list(mask.blocks), None, None, None, None, 0.25, None, None, 0.0, 0.0)
            torch.library.opcheck(attention_op, arguments)
            out, lse = (y.detach() for y in attention_op(*arguments))
            x = [t.detach() for t in (q, k, v)]
            torch.library.opcheck(
                attention_backward_op, (torch.randn_like(out), None, *x, out, lse, *arguments[3:], False, False)
            )

        def step(q, k, v):
            return fastattn.attention(q, k, v, mask=mask).square().sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got, expected = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, step))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockMask.from_mask(torch.ones(3, 3)), TypeError, "mask must be a bool tensor, got torch.float32"),
        (lambda: BlockMask.from_mask(torch.ones(3).bool()), ValueError, "2 to 4 dimensions"),
        (lambda: BlockMask.document(torch.ones(3)), TypeError, "ids must be a tensor of integers"),
        (lambda: BlockMask.document(IDS, IDS.view(2, 4, 20)), ValueError, r"key_ids must have shape \(length,\)"),
        (lambda: BlockMask.causal(-1), ValueError, "num_queries must be at least 0, got -1"),
        (lambda: BlockMask.window(5.0), TypeError, "num_queries must be an integer, got float"),
        (lambda: BlockMask.window(5, True), TypeError, "num_keys must be an integer, got bool"),
        (lambda: BlockMask.window(5, 5, -1), ValueError, r"left must be at least 0, got -1"),
        (lambda: BlockMask.window(5, 5, 1, 0.5), TypeError, r"right must be an integer, got float"),
        (
            lambda: BlockMask.document(IDS.expand(2, -1), IDS.expand(3, -1)), ValueError,
            r"ids and key_ids must be of one batch, got \(2, 160\) and \(3, 160\)",
        ),
        (
            lambda: BlockMask.document(IDS.expand(2, -1)) & BlockMask.document(IDS.expand(3, -1)), ValueError,
            r"the same batch and heads, or 1, to be combined, got \(2, 1, 160, 160\) and \(3",
        ),
        (lambda: BlockMask.causal(3) & BlockMask.causal(4), ValueError, "same Nq and Nk"),
        (
            lambda: BlockMask.causal(3) | BlockMask((1, 1, 3, 3), Blocks(*(t.to("meta") for t in BlockMask.causal(3).blocks))),
            ValueError, "must be on one device to be combined, got cpu and meta",
        ),
        (
            lambda: fastattn.attention(*torch.zeros(3, 1, 2, 5, 8), mask=BlockMask.causal(4)), ValueError,
            r"block mask of .* in \(1, 2, 5, 5\), got BlockMask\(shape=\(1, 1, 4, 4\)",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
