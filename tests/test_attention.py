"""`fastattn.attention` against the fp64 definition: both backends, every feature, every gradient."""

from dataclasses import dataclass, field

import pytest
import torch

import fastattn
from tests import reference
from tests.compare import OTHER_DRAWS, assert_close, max_error, value_and_gradients

BACKENDS = ["eager", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One call. `mask`, `bias` and `alibi` are shapes; in `bias`, -1 stands for the full size."""

    heads: int = 2
    kv_heads: int = 2
    n: int = 40
    nk: int = 40
    dim: int = 16
    value_dim: int | None = None
    batch: int = 1
    packed: bool = False
    causal: bool = False
    window: tuple | None = None
    mask: tuple | None = None
    bias: tuple | None = None
    alibi: tuple | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    grad_lse: bool = False
    tags: dict = field(default_factory=dict)

    def inputs(self, dtype, seed=0):
        """(query, key, value, bias?, sinks?) and the other options."""
        torch.manual_seed(seed)
        value_dim = self.value_dim or self.dim
        if self.packed:  # views of one projection (B, N, H, D), as a transformer makes them
            packed = torch.randn(self.batch, self.n, 3 * self.heads, self.dim, dtype=dtype).transpose(1, 2)
            query, key, value = packed.chunk(3, dim=1)
        else:
            query = torch.randn(self.batch, self.heads, self.n, self.dim, dtype=dtype)
            key = torch.randn(self.batch, self.kv_heads, self.nk, self.dim, dtype=dtype)
            value = torch.randn(self.batch, self.kv_heads, self.nk, value_dim, dtype=dtype)
        full = (self.batch, self.heads, self.n, self.nk)
        tensors, options = [query, key, value], {"causal": self.causal, "window": self.window}
        options |= {"softcap": self.softcap, "scale": self.scale}
        if self.bias:
            sizes = [f if s == -1 else s for s, f in zip(self.bias, full[-len(self.bias) :])]
            tensors.append(torch.randn(sizes, dtype=dtype))
        if self.sinks:
            tensors.append(torch.randn(self.heads, dtype=torch.float32))
        if self.mask:
            sizes = [f if s == -1 else s for s, f in zip(self.mask, full[-len(self.mask) :])]
            options["mask"] = torch.rand(sizes) > 0.4
        if self.alibi:
            options["alibi_slopes"] = torch.rand(self.alibi)
        return tensors, options

    def given(self, options):
        """The options in the form that ours is called with."""
        return options

    def split(self, tensors):
        """The keyword arguments that are differentiable."""
        rest, named = list(tensors[3:]), {}
        if self.bias:
            named["bias"] = rest.pop(0)
        if self.sinks:
            named["sinks"] = rest.pop(0)
        return tensors[:3], named


CASES = {
    "plain": Case(),
    "one_row_one_key": Case(n=1, nk=1),
    "block_multiple": Case(n=64, nk=96, causal=True),
    "tail_of_one": Case(n=33, nk=65),
    "decode": Case(n=1, nk=70, causal=True, kv_heads=1),
    "batch": Case(batch=3, n=20, nk=17),
    "causal": Case(causal=True, n=70, nk=70, grad_lse=True),
    "causal_last_block_has_one_key": Case(causal=True, n=33, nk=65),
    "causal_more_keys": Case(causal=True, n=37, nk=75),
    "causal_more_queries": Case(causal=True, n=75, nk=37, grad_lse=True),  # the first rows see nothing
    "gqa": Case(heads=4, kv_heads=2, causal=True),
    "mqa": Case(heads=3, kv_heads=1),
    "packed_projection": Case(packed=True, causal=True),
    "head_dim_1": Case(dim=1),
    "head_dim_24": Case(dim=24, value_dim=40),
    "head_dim_80": Case(dim=80, causal=True),
    "head_dim_256": Case(dim=256, n=34, nk=34),
    "value_dim_1": Case(dim=33, value_dim=1, causal=True),
    "negative_scale": Case(scale=-0.3, causal=True),
    "zero_scale": Case(scale=0.0, mask=(-1, -1)),
    "large_scale": Case(scale=20.0, causal=True),
    "mask": Case(mask=(-1, -1, -1, -1)),
    "mask_keys": Case(mask=(-1, 1, 1, -1), batch=2, causal=True),
    "bias": Case(bias=(-1, -1, -1, -1), grad_lse=True),
    "bias_shared_by_batch": Case(bias=(-1, -1, -1), batch=3),
    "bias_per_key": Case(bias=(-1, 1, 1, -1), batch=2, n=70),
    "bias_per_row": Case(bias=(-1, 1), nk=70, causal=True),
    "bias_scalar": Case(bias=(1,), n=34),
    "window": Case(window=(7, 3), n=70, nk=70),
    "window_of_itself": Case(window=(0, 0), n=40, nk=40),
    "window_left": Case(window=(20, None), n=70, nk=90, causal=True),
    "window_right": Case(window=(None, 5), n=90, nk=70),
    "alibi": Case(alibi=(2,), n=40, nk=50),
    "alibi_per_batch": Case(alibi=(2, 2), batch=2, causal=True),
    "softcap": Case(softcap=1.5, grad_lse=True),
    "sinks": Case(sinks=True, causal=True, n=50, nk=30, grad_lse=True),
    "dropout": Case(dropout_p=0.3, batch=2, nk=45),
}
# Every pair of features stands together in at least one row.
CASES |= {
    "pair_all": Case(
        heads=4, n=37, nk=45, causal=True, window=(17, None), mask=(-1, -1), bias=(1, 1, -1, -1), alibi=(4,), softcap=2.0,
        sinks=True, dropout_p=0.2, grad_lse=True,
    ),
    "pair_no_window": Case(batch=2, kv_heads=1, mask=(-1, 1, 1, -1), bias=(-1, 1, -1), sinks=True, dropout_p=0.5, n=45),
    "pair_no_mask": Case(window=(9, 12), n=50, alibi=(2,), softcap=5.0, sinks=True, packed=False, value_dim=8),
    "pair_no_softcap": Case(heads=4, kv_heads=1, window=(30, 0), alibi=(4,), bias=(-1, 1, 1), dropout_p=0.1, grad_lse=True),
}  # fmt: skip


def definition_of(case, tensors, options, dtype, seed):
    """The case in plain PyTorch, and the gradient of its output."""
    batch, heads, n, nk = tensors[0].shape[0], tensors[0].shape[1], tensors[0].shape[2], tensors[1].shape[2]
    torch.manual_seed(seed)
    drawn = int(torch.randint(torch.iinfo(torch.int64).max, (1,)))
    factors = None
    if case.dropout_p:
        keep = reference.philox_keep(drawn, (batch, heads, n, nk), case.dropout_p)
        factors = keep.to(tensors[0].device).double() / (1 - case.dropout_p)
    grad_out = torch.randn(batch, heads, n, tensors[2].shape[3], dtype=torch.float64).to(dtype)

    def naive(*leaves):
        qkv, named = case.split(leaves)
        return reference.attention(*qkv, **named, **options, dropout_factors=factors)

    return naive, grad_out


def run(case, tensors, options, dtype, seed=1234):
    """(outputs, gradients) of ours, of the fp64 truth, and of plain PyTorch at this dtype."""
    naive, grad_out = definition_of(case, tensors, options, dtype, seed)
    grad_lse = torch.randn(grad_out.shape[:3]) if case.grad_lse else None

    def ours(*leaves):
        qkv, named = case.split(leaves)
        torch.manual_seed(seed)
        return fastattn.attention(*qkv, **named, **case.given(options), dropout_p=case.dropout_p, return_lse=True)

    dead = torch.isinf(naive(*[t.double() for t in tensors])[1])
    grads = [grad_out, None if grad_lse is None else grad_lse.masked_fill(dead, 0.0)]
    truth = value_and_gradients(naive, [t.double() for t in tensors], grads)
    plain = value_and_gradients(naive, tensors, grads)
    return value_and_gradients(ours, tensors, grads), truth, plain


def plain_errors(case, dtype, result):
    """Of one of plain PyTorch's results, outputs before gradients, in other draws of the inputs."""
    for seed in range(1, 1 + OTHER_DRAWS):
        _, (outputs, grads), (rough_outputs, rough_grads) = run(case, *case.inputs(dtype, seed), dtype)
        yield max_error([*rough_outputs, *rough_grads][result], [*outputs, *grads][result])


def stored_output_errors(case, tensors, options, truth, dtype, seed=1234):
    """Of each gradient, for delta = Σ dO·O is taken from an output that was rounded to `dtype`: dS is off by P·Σ dO·(rounded O - O),
    which is the gradient of the log-sum-exp times that sum."""
    (out, lse), (naive, grad_out) = truth[0], definition_of(case, tensors, options, dtype, seed)
    off = (grad_out.double() * (out.to(dtype).double() - out)).sum(-1).masked_fill(torch.isinf(lse), 0.0)
    gradients = value_and_gradients(naive, [t.double() for t in tensors], [None, off])[1]
    return [0.0, 0.0, *(gradient.abs().max().item() for gradient in gradients)]


def check(case, dtype, backend):
    tensors, options = case.inputs(dtype)
    with fastattn.backend.use(backend):
        ours, truth, plain = run(case, tensors, options, dtype)
    # the backward pass recomputes P = exp(S - LSE) from an LSE stored in fp32, whose rounding is a relative error of P
    lse = truth[0][1]
    stored = torch.finfo(torch.float32).eps * lse.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    names = ["out", "lse", "dq", "dk", "dv", *case.split([*tensors])[1]]
    for i, (name, got, true, rough) in enumerate(
        zip(names, *[[*outputs, *grads] for outputs, grads in (ours, truth, plain)])
    ):
        relative = 0.0 if name in ("out", "lse") else stored

        def others(i=i):
            yield stored_output_errors(case, tensors, options, truth, dtype)[i]
            yield from plain_errors(case, dtype, i)

        assert_close(name, got, true, rough, relative, others=others)
        assert got.dtype == (torch.float32 if name in ("lse", "sinks") else dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition_in_fp32(name, backend):
    check(CASES[name], torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "name", ["causal_more_queries", "gqa", "head_dim_24", "bias_shared_by_batch", "softcap", "pair_all"]
)
def test_matches_the_definition_in_half_precision(name, dtype, backend):
    check(CASES[name], dtype, backend)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("far_key", [1.0, 40.0], ids=["ordinary", "far_key_outweighs_its_distance"])
def test_far_keys_under_alibi(far_key, causal):
    """Keys whose ALiBi leaves them no weight may be skipped; a key that makes up for it may not."""
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    query[:, :, :, 0] = 10.0
    key[:, :, 3, 0] = far_key  # a score of up to 100 against a slope of 0.4 a position
    options = {"causal": causal, "alibi_slopes": torch.tensor([0.4, 1.0])}
    inputs, dy = [query, key, value], [torch.randn(1, 2, 300, 16)]

    def definition(*tensors):
        return reference.attention(*tensors, **options)[:1]

    wide = [x.double() for x in inputs]
    truth, plain = (value_and_gradients(definition, x, dy) for x in (wide, inputs))
    got = value_and_gradients(lambda *tensors: [fastattn.attention(*tensors, **options)], inputs, dy)
    for name, *tensors in zip(
        ("output", "dq", "dk", "dv"), *(outputs + grads for outputs, grads in (got, truth, plain))
    ):
        assert_close(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_column_on_the_left_of_a_window(backend):
    """Where a softcap keeps PyTorch's fused kernel away, on a CPU."""
    generator = torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    mask = torch.arange(40) >= torch.arange(40)[:, None] - 5
    truth, plain = (
        reference.attention(*(x.to(dtype) for x in (q, k, v)), mask=mask, softcap=2.0)[0]
        for dtype in (torch.float64, torch.float32)
    )
    with fastattn.backend.use(backend):
        assert_close("output", fastattn.attention(q, k, v, window=(5, None), softcap=2.0), truth, plain)
