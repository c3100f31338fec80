"""`scaled_dot_product_attention` against torch's; `explain`; the choice of a backend."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import backend
from fastattn.eager import attention_fused
from fastattn.eager import feed_forward as eager_feed_forward

GQA = {"enable_gqa": True}
CALLS = {  # shapes of the query, of the key, the options, and where it differs the value's shape
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "causal": ((2, 3, 5, 8), (2, 3, 5, 8), {"is_causal": True}),
    "causal_more_keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"is_causal": True}),
    "causal_more_queries": ((2, 3, 7, 8), (2, 3, 5, 8), {"is_causal": True}),
    "no_batch": ((5, 8), (7, 8), {}),
    "one_batch_dim": ((4, 5, 8), (4, 7, 8), {"attn_mask": torch.rand(4, 5, 7) > 0.2}),
    "five_dims": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), {"attn_mask": torch.randn(2, 1, 1, 5, 7)}),
    "bool_mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.rand(5, 7) > 0.2}),
    "float_mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.randn(2, 1, 5, 7), "scale": 0.2}),
    "gqa": ((2, 6, 5, 8), (2, 3, 7, 8), {"enable_gqa": True}),
    "broadcast_batch": ((2, 3, 5, 8), (1, 3, 7, 8), {}),
    "gqa_no_batch": ((6, 5, 8), (2, 7, 8), {**GQA, "attn_mask": torch.rand(6, 5, 7) > 0.2}),
    "gqa_five_dims": ((2, 2, 4, 5, 8), (2, 1, 2, 7, 8), {**GQA, "attn_mask": torch.randn(2, 4, 5, 7)}),
    "gqa_broadcast_batch": ((2, 4, 5, 8), (1, 2, 7, 8), GQA),
    "gqa_broadcast_query": ((1, 4, 5, 8), (2, 2, 7, 8), GQA),
    "gqa_ranks": ((2, 4, 5, 8), (2, 5, 8), {**GQA, "is_causal": True}),
    "gqa_other_value_heads": ((2, 4, 5, 8), (2, 2, 7, 8), GQA, (2, 1, 7, 8)),
    "gqa_more_value_heads": ((2, 4, 5, 8), (2, 2, 7, 8), GQA, (1, 4, 7, 8)),
    "one_key_head": ((2, 4, 5, 8), (2, 1, 7, 8), {"attn_mask": torch.rand(5, 7) > 0.2}),
    "one_key_head_causal": ((2, 4, 5, 8), (2, 1, 5, 8), {"is_causal": True}),
    "one_value_head": ((2, 4, 5, 8), (2, 4, 7, 8), {}, (2, 1, 7, 8)),
    "one_query_head": ((2, 1, 5, 8), (2, 4, 7, 8), {}),
    "ranks": ((4, 5, 8), (2, 1, 7, 8), {}, (7, 8)),
}


@pytest.mark.parametrize("name", CALLS)
def test_equals_torchs(name):
    shape_q, shape_k, options, *shape_v = CALLS[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in (shape_q, shape_k, *(shape_v or [shape_k])))
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    got = fastattn.scaled_dot_product_attention(q, k, v, **options)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (got, expected))):
        assert torch.allclose(ours, theirs, atol=2e-6)
    assert "eager, because" in fastattn.explain(fastattn.scaled_dot_product_attention, q, k, v, **options)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_causal_row_sees_the_first_key_alone(dtype, tiles, monkeypatch):
    """Where a row in bf16 is slow, on CPUs without tiles, it is computed twice, which is not what is causal from the top left."""
    monkeypatch.setattr(attention_fused, "has_tiles", lambda: tiles)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=dtype, requires_grad=True) for n in (1, 7, 7))
    out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(out, v[:, :, :1])
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.all(dv[:, :, :1] == 1.0)
    assert not dv[:, :, 1:].any()
    assert not dk[:, :, 1:].any()
    assert max(d.abs().max().item() for d in (dq, dk)) < 0.02  # the weight is 1 whatever the score


def test_broadcasting_keeps_one_graph():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(1, 7, 8), torch.randn(2, 1, 7, 8)
    mask = torch.rand(2, 1, 1, 7) > 0.2
    compiled = torch.compile(fastattn.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = fastattn.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(compiled(q, k, v, mask), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(5, 7).int(), TypeError, "attn_mask has dtype int32; allowed: bool, float32"),
        ([[True]], TypeError, r"attn_mask must be a torch\.Tensor, got list"),
        (fastattn.BlockMask.causal(5, 7), TypeError, r"attn_mask must be a torch\.Tensor, got BlockMask"),
        (
            torch.ones(3, 5, 7).bool(),
            ValueError,
            r"attn_mask must broadcast to .* = \(4, 5, 7\), got shape \(3, 5, 7\)",
        ),
        (torch.ones(1, 4, 5, 7), ValueError, r"attn_mask must broadcast to .* = \(4, 5, 7\), got shape \(1, 4, 5, 7\)"),
        (torch.ones(5, 7, device="meta"), ValueError, "attn_mask is on meta but query is on cpu"),
    ],
    ids=["dtype", "list", "block_mask", "heads", "rank", "device"],
)
def test_a_bad_attn_mask_is_named(mask, error, message):
    q, k = torch.randn(4, 5, 8), torch.randn(4, 7, 8)
    with pytest.raises(error, match=message):
        fastattn.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def test_what_torch_refuses_is_refused():
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal=True"):
        fastattn.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5).bool(), is_causal=True)
    with pytest.raises(
        ValueError, match=r"same heads, or 1, without enable_gqa=True, got query \(1, 4, 5, 8\), key \(1, 2"
    ):
        fastattn.scaled_dot_product_attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="multiple of the key's and of the value's, got query"):
        fastattn.scaled_dot_product_attention(q, q[:, :2], q[:, :3], enable_gqa=True)
    with pytest.raises(ValueError, match="the batch dimensions of query, key and value must broadcast, got query"):
        fastattn.scaled_dot_product_attention(q.expand(2, -1, -1, -1), *[q.expand(3, -1, -1, -1)] * 2)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        fastattn.scaled_dot_product_attention(q[0, 0, 0], q, q)


def test_explain_says_which_implementation_and_why():
    q = torch.zeros(1, 8, 1024, 64)
    with fastattn.backend.use("eager"):
        assert "one call (is_causal)" in fastattn.explain(fastattn.attention, q, q, q, causal=True)
        top_left = fastattn.explain(fastattn.scaled_dot_product_attention, q, q[:, :, :3], q[:, :, :3], is_causal=True)
        assert "one call (is_causal)" in top_left
        assert "4 blocks of 256 rows" in fastattn.explain(fastattn.attention, q, q, q, window=(64, 0))
        assert "matrix products" in fastattn.explain(fastattn.attention, q, q, q, softcap=30.0)
    with fastattn.backend.use("triton"):
        text = fastattn.explain(fastattn.scaled_dot_product_attention, q, q, q)
    assert "triton, because set by fastattn.backend.use" in text
    assert "backward, dK and dV: 32 rows x 32 keys a step" in text
    with pytest.raises(TypeError, match="must be one of fastattn's ops"):
        fastattn.explain(torch.add, q, q)
    with (
        pytest.raises(ValueError, match="backend is 'cuda'; allowed: auto, triton, eager"),
        fastattn.backend.use("cuda"),
    ):
        pass


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_explain_knows_every_op(backend):
    x, w1, w2 = torch.zeros(4, 64), torch.zeros(128, 64), torch.zeros(64, 128)
    with fastattn.backend.use(backend):
        norms = [
            fastattn.explain(f, x, n) for f in (fastattn.layer_norm, fastattn.rms_norm) for n in (64, np.int64(64))
        ]
        linear = fastattn.explain(fastattn.linear, x, w1, activation="relu")
        layer = fastattn.explain(fastattn.feed_forward, x, w1, None, w2, None)
    words = (
        ("whole rows a step", "32 x 64 tiles") if backend == "triton" else ("layer norm kernel", "PyTorch's products")
    )
    assert all(words[0] in text for text in norms)
    assert words[1] in linear
    assert layer.count("weight") == 2


def test_explain_of_a_gated_layer(monkeypatch):
    """The gate is part of the first product alone."""
    monkeypatch.setattr(eager_feed_forward, "explain", lambda *arguments: f"{arguments}")
    x, w1, w2 = torch.zeros(4, 64), torch.zeros(128, 64), torch.zeros(64, 128)
    with fastattn.backend.use("eager"):
        lines = fastattn.explain(fastattn.feed_forward, x, w1, None, w2, None, gate_weight=w1).splitlines()
    assert lines[1:] == ["  weight1: (128, 64, 4, True)", "  weight2: (64, 128, 4, False)"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "eager, because tensors on the CPU run in PyTorch"),
        ({"TRITON_INTERPRET": "1"}, "triton, because TRITON_INTERPRET=1"),
        ({"TRITON_INTERPRET": "1", "FASTATTN_BACKEND": "eager"}, "eager, because set by the environment variable"),
        ({"FASTATTN_BACKEND": "fast"}, "FASTATTN_BACKEND is 'fast'; allowed: auto, triton, eager"),
    ],
    ids=["default", "interpreter", "override", "wrong"],
)
def test_the_environment_decides(environment, expected):
    code = "import torch, fastattn; q = torch.zeros(1, 1, 4, 8); print(fastattn.explain(fastattn.attention, q, q, q))"
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTATTN_BACKEND")}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=False
    )
    assert expected in run.stdout + run.stderr


def test_kernels_asked_for_by_the_environment_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "_VARIABLE", "triton")
    choose = backend._choose.__wrapped__
    assert choose("cpu", None)[0] == "triton"
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    assert choose("cuda", None)[0] == choose("cpu", "triton")[0] == "triton"
    assert choose("cpu", None, tensors_there=False)[0] == "triton"  # a call with tensors on a GPU asks that, too
    with pytest.raises(RuntimeError, match="for tensors on the CPU set TRITON_INTERPRET=1"):
        choose("cpu", None)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "eager"), ((8, 0), "triton"), ((12, 1), "triton")])
def test_gpus_that_triton_is_not_made_for_run_in_pytorch(capability, expected, monkeypatch):
    monkeypatch.setattr(backend, "_VARIABLE", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    too_old = backend._too_old.__wrapped__(device)
    choice, reason = backend._choose.__wrapped__("cuda", None, too_old=too_old)
    assert choice == expected
    assert too_old == ("compute capability 8.0" in reason)
    assert backend._choose.__wrapped__("cuda", "triton", too_old=too_old)[0] == "triton", "who asks for it gets it"
    assert not backend._too_old.__wrapped__(torch.device("cpu"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_kernels_without_a_gpu_say_what_to_do_instead():
    """Triton says "0 active drivers ([]). There should only be one."; attention asks for the target, a norm launches at once."""
    code = """
import torch, fastattn
q = torch.zeros(1, 1, 4, 8)
with fastattn.backend.use("triton"):
    for call in (lambda: fastattn.attention(q, q, q), lambda: fastattn.layer_norm(q, 8)):
        try:
            call()
        except RuntimeError as error:
            print("needs a GPU" in str(error) and "TRITON_INTERPRET=1" in str(error))
"""
    run = in_a_fresh_process(code)
    assert run.stdout == "True\nTrue\n", run.stdout + run.stderr


def test_import_needs_no_triton_and_touches_no_gpu():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch, fastattn, fastattn.nn, fastattn.models
assert not torch.cuda.is_initialized()
x = torch.randn(1, 2, 4, 8, requires_grad=True)
fastattn.attention(x, x, x, causal=True).sum().backward()
assert x.grad.abs().sum() > 0
try:
    with fastattn.backend.use("triton"):
        fastattn.attention(x, x, x)
except RuntimeError as error:
    assert "pip install triton" in str(error)
    print("fine")
"""
    run = in_a_fresh_process(code)
    assert run.stdout == "fine\n", run.stderr


def test_import_is_quick():
    """It takes a twentieth of PyTorch's own, and 1.2 seconds with the compiler."""
    run = in_a_fresh_process("import sys, torch, fastattn; print({'torch._dynamo', 'triton'} & set(sys.modules))")
    assert run.stdout == "set()\n", run.stdout + run.stderr


def in_a_fresh_process(code):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTATTN_BACKEND")}
    return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=False)
