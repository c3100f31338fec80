"""The flash-attn names: their layouts, defaults and meaning."""

import inspect

import pytest
import torch

from fastattn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from tests import reference

OPTIONS = {
    "default": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (4, -1), "softcap": 5.0}, {"window": (4, None), "softcap": 5.0}),
    "alibi": ({"alibi_slopes": torch.rand(4), "softmax_scale": 0.3}, {"alibi_slopes": None, "scale": 0.3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_means_the_same(name):
    theirs, plain = OPTIONS[name]
    plain = {**plain, **({"alibi_slopes": theirs["alibi_slopes"]} if "alibi_slopes" in theirs else {})}
    torch.manual_seed(0)
    qkv = torch.randn(2, 12, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    out, lse = reference.attention(*(t.transpose(1, 2).double() for t in (q, k, v)), **plain)
    got, got_lse, probabilities = flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
    assert probabilities is None
    assert torch.allclose(got.double(), out.transpose(1, 2), atol=1e-6)
    assert torch.allclose(got_lse.double(), lse, atol=1e-5)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **theirs), got)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], **theirs), got)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    cu = torch.tensor([0, 12, 24], dtype=torch.int32)
    ragged = flash_attn_varlen_func(*packed, cu, cu, 12, 12, **theirs)
    assert torch.allclose(ragged.double(), out.transpose(1, 2).flatten(0, 1), atol=1e-6)


def test_signatures_are_those_of_the_package():
    common = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    assert list(inspect.signature(flash_attn_func).parameters) == ["q", "k", "v", *common]
    assert list(inspect.signature(flash_attn_qkvpacked_func).parameters) == ["qkv", *common]
    packing = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    expected = ["q", "k", "v", *packing, *common, "block_table"]
    assert list(inspect.signature(flash_attn_varlen_func).parameters) == expected


def test_what_is_not_supported_is_refused():
    x, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_table must be None"):
        flash_attn_varlen_func(x, x, x, cu, cu, 3, 3, block_table=cu)
    with pytest.raises(ValueError, match=r"qkv must have shape \(batch, length, 3, heads, head_dim\), got \(3, 2, 8\)"):
        flash_attn_qkvpacked_func(x)
    with pytest.raises(ValueError, match=r"q must have 4 dimensions \(batch, length, heads, head_dim\)"):
        flash_attn_func(x, x, x)
