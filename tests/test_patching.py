"""`patch` and `unpatch`: outputs and gradients of the model as it was, every module named, and everything put back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn
from tests.compare import assert_close
from tests.tiny_models import CAUSAL, OTHERS, build, inputs

pytestmark = pytest.mark.filterwarnings("default")


class TimmAttention(nn.Module):
    """As in timm: https://github.com/huggingface/pytorch-image-models (interface only)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (self.scale * self.q_norm(q)) @ self.k_norm(k).mT
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, c)))


class TimmMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    def __init__(self, dim=24, num_heads=4):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), TimmAttention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), TimmMlp(dim, 40)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def make(name):
    """(model, its inputs)"""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 24)
    if name == "timm_block":
        return TimmBlock().eval(), {"x": x}
    if name == "nn_transformer":
        return nn.Transformer(24, 4, 2, 2, 40, batch_first=True).eval(), {"src": x, "tgt": torch.randn(2, 5, 24)}
    return build(name), inputs(name)


def run(model, batch):
    """[output, gradients of the parameters]"""
    out = model(**batch)
    out = out if torch.is_tensor(out) else out[0]
    if "attention_mask" in batch:
        out = out[batch["attention_mask"].bool()]
    return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True)]


SWAPPED = {
    "gpt2": {"GPT2Attention": 2, "GPT2MLP": 2, "LayerNorm": 5},
    "llama": {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5},
    "mistral_window": {"MistralAttention": 2, "MistralMLP": 2, "MistralRMSNorm": 5},
    "gemma2_softcap_window": {"Gemma2Attention": 2, "Gemma2MLP": 2, "Gemma2RMSNorm": 9},
    "qwen2": {"Qwen2Attention": 2, "Qwen2MLP": 2, "Qwen2RMSNorm": 5},
    "gpt_oss_sinks": {"GptOssAttention": 2, "GptOssRMSNorm": 5},
    "bert": {"BertSelfAttention": 2, "BertSelfOutput": 2, "BertIntermediate": 2, "BertOutput": 2, "LayerNorm": 5},
    "roberta": {
        "RobertaSelfAttention": 2,
        "RobertaSelfOutput": 2,
        "RobertaIntermediate": 2,
        "RobertaOutput": 2,
        "LayerNorm": 5,
    },
    "vit": {"ViTAttention": 2, "ViTMLP": 2, "LayerNorm": 5},
    "timm_block": {"TimmAttention": 1, "TimmMlp": 1, "LayerNorm": 4},
    "nn_transformer": {
        "Transformer": 1,
        "TransformerEncoder": 1,
        "TransformerDecoder": 1,
        "TransformerEncoderLayer": 2,
        "TransformerDecoderLayer": 2,
        "MultiheadAttention": 6,
        "LayerNorm": 12,
    },
}


@pytest.mark.parametrize("name", SWAPPED)
def test_results_stay_and_everything_is_put_back(name):
    model, batch = make(name)
    assert name in {*CAUSAL, *OTHERS, "timm_block", "nn_transformer"}
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    attributes = {n: copy.copy(vars(m)) for n, m in model.named_modules()}
    before = run(model, batch)

    report = fastattn.patch(model)
    assert {*report.swapped, *report.left} == kinds.keys()
    assert all(report.left.values())
    counts: dict[str, int] = {}
    for swapped in report.swapped:
        counts[kinds[swapped]] = counts.get(kinds[swapped], 0) + 1
    assert counts == SWAPPED[name]
    for kind, count in counts.items():
        assert any(row.split()[:3] == ["swapped", kind, str(count)] for row in str(report).splitlines())
    for expected, got in zip(before, run(model, batch)):
        if got is not None or expected is not None:
            torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)

    fastattn.unpatch(model)
    assert {n: type(m).__name__ for n, m in model.named_modules()} == kinds
    for n, m in model.named_modules():
        assert vars(m).keys() == attributes[n].keys()
    for expected, got in zip(before, run(model, batch)):
        assert (got is None and expected is None) or torch.equal(got, expected)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", sorted(SWAPPED.keys() - {"gpt_oss_sinks"}))  # experts have no fp64, and routing jumps
def test_in_bf16_the_error_is_that_of_the_model_as_it_was(name, how):
    model, batch = make(name)
    model.requires_grad_(False)
    truth = copy.deepcopy(model).double()(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    if how == "bfloat16":
        model.bfloat16()
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    results = []
    for patched in (False, True):
        if patched:
            assert fastattn.patch(model).swapped
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            results.append(model(**batch))
    truth, plain, got = (r if torch.is_tensor(r) else r[0] for r in (truth, *results))
    if "attention_mask" in batch:
        truth, plain, got = (r[batch["attention_mask"].bool()] for r in (truth, plain, got))
    assert got.dtype == plain.dtype
    assert_close("output", got, truth, plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_gradient_checkpointing_changes_nothing(name):
    model, batch = make(name)
    fastattn.patch(model)
    expected = run(model, batch)
    newer = hasattr(model, "activation_checkpointing_enable")
    model.activation_checkpointing_enable() if newer else model.gradient_checkpointing_enable()  # (Python 3.10 gets transformers 5.20)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for expected_one, got in zip(expected, run(model, batch)):
        assert (got is None and expected_one is None) or torch.allclose(got, expected_one, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "timm_block", "nn_transformer"])
def test_patched_models_copy_pickle_and_train_as_before(name):
    model, batch = make(name)
    parameters = dict(model.named_parameters())
    fastattn.patch(model)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    expected = run(model, batch)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(run(clone, batch), expected) if a is not None)
        assert fastattn.unpatch(clone) > 0
        assert not any(type(m).__module__.startswith("fastattn") for m in clone.modules())


def test_unpickling_a_patched_model_registers_the_attention(monkeypatch):
    """A process that loads one has registered nothing yet."""
    import transformers

    model, batch = make("llama")
    fastattn.patch(model)
    expected, pickled = run(model, batch), pickle.dumps(model)
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "fastattn")
    clone = pickle.loads(pickled)
    assert all(torch.equal(a, b) for a, b in zip(run(clone, batch), expected) if a is not None)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2_softcap_window"])
def test_patched_models_generate_the_same_tokens(name):
    model, batch = build(name), inputs(name, "left")
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    fastattn.patch(model)
    assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("name", ["gpt2", "timm_block"])
def test_patched_models_run_the_kernels(name):
    """GPT-2's weights are stored transposed: the kernels read them in place."""
    model, batch = make(name)
    expected = run(model, batch)
    fastattn.patch(model)
    with fastattn.backend.use("triton"):
        for a, b in zip(run(model, batch), expected):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


def test_tied_weights_hooks_and_frozen_parameters_stay():
    model, batch = make("gpt2")
    model.transformer.h[0].ln_1.weight.requires_grad_(False)
    calls = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    model.transformer.ln_f.register_forward_pre_hook(lambda *_: calls.append("ln_f"))
    fastattn.patch(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.h[0].ln_1.weight.requires_grad
    model(**batch)
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: calls.append("c_fc"))  # after patching, inside
    model(**batch)
    assert calls == ["mlp", "ln_f", "mlp", "c_fc", "ln_f"]


class Quantised(torch.Tensor):
    """A weight as torchao has them: a wrapper of tensors that knows `F.linear` alone."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.inside = weight

    def __tensor_flatten__(self):
        return ["inside"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].inside, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return cls(args[0].inside)
        raise NotImplementedError(op)


def test_layers_that_were_quantised_after_patching_are_called():
    mlp, x = TimmMlp(24, 40).requires_grad_(False), torch.randn(2, 7, 24)
    expected = mlp(x)
    assert fastattn.patch(mlp).swapped
    mlp.fc2.weight = nn.Parameter(Quantised(mlp.fc2.weight.data), requires_grad=False)
    torch.testing.assert_close(mlp(x), expected)


def test_dropout_of_a_patched_feed_forward_layer_acts_in_training_only():
    model, batch = make("timm_block")
    fastattn.patch(model)
    for place in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        model.get_submodule(place).p = 0.5
        model.train()
        assert not torch.equal(model(**batch), model(**batch)), place
        model.eval()
        assert torch.equal(model(**batch), model(**batch))
        model.get_submodule(place).p = 0.0


def test_a_call_that_the_adapter_does_not_know_reaches_the_original():
    attention, mask = TimmAttention(24, 4).eval(), torch.ones(7, 7, dtype=torch.bool).tril()
    x = torch.randn(2, 7, 24)
    expected = attention(x, attn_mask=mask)
    assert fastattn.patch(attention).swapped
    torch.testing.assert_close(attention(x, attn_mask=mask), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "*.norm1"}, {"encoder", "encoder.layers.0.norm1", "decoder.layers.0.norm1"}),
        ({"include": nn.MultiheadAttention, "exclude": "decoder.*"}, {"encoder.layers.0.self_attn", "encoder"}),
        ({"include": "LayerNorm", "exclude": ["*layers*"]}, {"encoder.norm", "decoder.norm"}),
    ],
    ids=["name", "class", "class_name"],
)
def test_include_and_exclude(options, expected):
    model = nn.Transformer(24, 4, 1, 1, 40, batch_first=True)
    report = fastattn.patch(model, **options, dry_run=True)
    assert report.swapped.keys() == expected
    assert not any(type(m).__module__.startswith("fastattn") for m in model.modules())
    assert fastattn.patch(model, **options) == report
    x = torch.randn(2, 7, 24)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        assert torch.isfinite(model.eval().encoder(x, src_key_padding_mask=padding)).all()


def test_errors():
    model = nn.Transformer(24, 4, 1, 1, 40, batch_first=True)
    with pytest.raises(ValueError, match=r"exclude='encoder\.norm3' matches no module"):
        fastattn.patch(model, exclude="encoder.norm3")
    norm = nn.LayerNorm(8)
    fastattn.patch(norm)
    norm.__class__ = type("Wrapped", (type(norm),), {})
    with pytest.raises(RuntimeError, match="wrapped after it was patched"):
        fastattn.unpatch(norm)
    norm = nn.LayerNorm(8)
    fastattn.patch(norm)
    norm.forward = norm.forward  # as Accelerator.prepare does
    with pytest.raises(RuntimeError, match="the forward of a LayerNorm was replaced after it was patched"):
        fastattn.unpatch(norm)
    del norm.forward
    assert fastattn.unpatch(norm) == 1


@pytest.mark.parametrize("why", ["heads of 264 numbers", "float64"])
def test_a_model_whose_attention_ours_refuses_keeps_its_own(why):
    import transformers

    config = CAUSAL["llama"]()
    config.head_dim = 264 if "264" in why else 8
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64 if why == "float64" else None).eval()
    expected = run(model, inputs("llama"))
    report = fastattn.patch(model)
    assert why in report.left["model.layers.0.self_attn"]
    assert bool(report.swapped) == ("264" in why)
    for a, b in zip(run(model, inputs("llama")), expected):
        torch.testing.assert_close(a, b)


def test_heads_of_a_torch_module_that_are_too_long_are_left_in_a_layer_that_is_swapped():
    layer, x = nn.TransformerEncoderLayer(528, 2, 16, 0.0), torch.randn(3, 2, 528)
    expected = layer(x)
    report = fastattn.patch(layer)
    assert "264 numbers" in report.left["self_attn"]
    assert "" in report.swapped
    torch.testing.assert_close(layer(x), expected)


def test_one_attention_layer_that_is_excluded_leaves_them_all():
    model, _ = make("llama")
    report = fastattn.patch(model, exclude="model.layers.1.self_attn")
    assert "one implementation serves the whole model" in report.left["model.layers.0.self_attn"]
    assert "model.layers.0.mlp" in report.swapped
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_attention_maps_come_where_a_call_asks_for_them(name):
    model, batch = make(name)
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    truth = model(**batch, output_attentions=True).attentions
    fastattn.patch(model)
    clone, maps = copy.deepcopy(model), []
    inner = next(model.children()) if name in CAUSAL else model
    watch = inner.register_forward_hook(lambda *_: maps.append(vars(model)["_fastattn_maps"].asked is not None))
    for called in (model, clone, inner):
        got = called(**batch, output_attentions=True).attentions
        assert len(got) == 2
        for a, b in zip(got, truth):
            torch.testing.assert_close(a, b)
        assert not called(**batch).attentions
    watch.remove()
    assert maps == [True, False] * 2  # of the model, then of the inner one alone; the clone's are its own
    for patched in (model, clone):
        fastattn.unpatch(patched)
        assert len(patched(**batch, output_attentions=True).attentions) == 2
        assert {n: len(m._forward_pre_hooks) for n, m in patched.named_modules()} == hooks
        assert not any("_fastattn_maps" in vars(m) for m in patched.modules())
    model.config.output_attentions = True
    report = fastattn.patch(model)
    assert sum("asks for attention maps" in reason for reason in report.left.values()) == 2
    assert len(model(**batch).attentions) == 2


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "vit")]


@pytest.mark.parametrize("name", ["gpt2", "llama", "timm_block", "nn_transformer", *SLOW])
def test_patched_models_compile_to_one_graph(name):
    model, batch = make(name)
    if name in CAUSAL:
        batch["use_cache"] = False
    fastattn.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**batch), model(**batch)
    out, expected = (o if torch.is_tensor(o) else o[0] for o in (out, expected))
    torch.testing.assert_close(out, expected)
