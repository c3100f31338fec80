"""PyTorch's default dtype and device are the caller's: no result depends on them, and none of our own tensors follows them."""

import pytest
import torch
from torch import Tensor

import fastattn

LENGTH = 40
CU_SEQLENS = torch.tensor([0, 7, LENGTH], dtype=torch.int32)
IDS = torch.arange(LENGTH)[None] // 9
LENGTHS, TABLE = torch.tensor([3, 17], dtype=torch.int32), torch.arange(10, dtype=torch.int32).view(2, 5)
BIAS, SLOPES, SINKS, TARGET = torch.randn(1, 2, LENGTH, LENGTH), torch.rand(2), torch.randn(2), torch.arange(2 * LENGTH)
COS, SIN = fastattn.rotary_tables(8, 2 * LENGTH)


def packed(x: Tensor) -> Tensor:
    x = x[0].transpose(0, 1)
    return fastattn.varlen_attention(x, x, x, CU_SEQLENS, CU_SEQLENS, LENGTH, LENGTH, causal=True)


def decoded(x: Tensor, **options: Tensor) -> Tensor:
    cache, new = x.detach().clone(), x.detach()[:, :, :1].clone()
    if options:
        cache = cache.view(10, 2, 8, 8)
    return fastattn.attention_with_kv_cache(new, cache, cache.clone(), LENGTHS, key=new, value=new, **options)


# of x, (2, 2, LENGTH, 8)
CALLS = {
    "attention": lambda x: fastattn.attention(x, x, x, causal=True, return_lse=True)[1],
    "window": lambda x: fastattn.attention(x, x, x, window=(3, 1), sinks=SINKS),
    "alibi": lambda x: fastattn.attention(x, x, x, causal=True, alibi_slopes=SLOPES, softcap=3.0),
    "bias": lambda x: fastattn.attention(x, x, x, bias=BIAS.clone().requires_grad_(x.requires_grad), window=(9, 0)),
    "mask": lambda x: fastattn.attention(x, x, x, mask=IDS[:, :, None] == IDS[:, None], window=(9, 0), dropout_p=0.5),
    "block mask": lambda x: fastattn.attention(x, x, x, mask=fastattn.BlockMask.document(IDS), window=(3, 0)),
    "varlen": packed,
    "cache": decoded,
    "pages": lambda x: decoded(x, block_table=TABLE),
    "weights": lambda x: fastattn.attention_weights(x, x, rows=[1, 5], causal=True),
    "column sums": lambda x: fastattn.attention_column_sums(x, x),
    "rotary": lambda x: fastattn.rotary(x, None, COS, SIN, offset=LENGTHS)[0],
    "layer norm": lambda x: fastattn.layer_norm(x, 8, SLOPES.repeat(4).to(x.dtype), None, residual=x, dropout_p=0.5)[0],
    "rms norm": lambda x: fastattn.rms_norm(x, 8),
    "loss": lambda x: fastattn.cross_entropy(x.reshape(2 * LENGTH, 16), TARGET % 16, z_loss=0.1, label_smoothing=0.1),
    "linear loss": lambda x: fastattn.linear_cross_entropy(x.flatten(0, 2), BIAS[0, 0, :, :8].to(x.dtype), IDS.repeat(1, 4)[0]),
    "feed-forward": lambda x: fastattn.feed_forward(x, BIAS[0, 0, :, :8].to(x.dtype), None, BIAS[0, 0, :8].to(x.dtype), None),
}  # fmt: skip


def results(call, x):
    torch.manual_seed(0)
    y = call(x)
    return [y.detach(), *(torch.autograd.grad(y.float().sin().sum(), x) if y.requires_grad else [])]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_defaults(name, dtype, default):
    x = torch.randn(2, 2, LENGTH, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with fastattn.backend.use("eager"):
        expected = results(CALLS[name], x)
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                got = results(CALLS[name], x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert [(t.dtype, t.device) for t in got] == [(t.dtype, t.device) for t in expected]
    assert all(map(torch.equal, got, expected))
