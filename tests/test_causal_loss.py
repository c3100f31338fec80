"""`patch(fused_loss=True)`: transformers' causal models train with `linear_cross_entropy`, and are the same in everything else."""

import copy
import inspect
import json
import pickle

import pytest
import torch

import fastattn
from tests.tiny_models import _DECODER, CAUSAL, VOCABULARY, transformers

HEADS = dict(_DECODER, head_dim=6)
CONFIGS = {
    "gpt2": CAUSAL["gpt2"],
    "llama_head_bias": CAUSAL["llama"],
    "gemma2_softcap": lambda: transformers.Gemma2Config(**HEADS, final_logit_softcapping=1.5),
    "cohere_factor": lambda: transformers.CohereConfig(**_DECODER, logit_scale=0.25),
    "granite_factor": lambda: transformers.GraniteConfig(**_DECODER, logits_scaling=4.0),
    "mixture": lambda: transformers.MixtralConfig(**_DECODER, num_local_experts=2),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=12,
        max_position_embeddings=64, dropout=0.0,
    ),
}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=GENERATOR)
LABELS = TOKENS.masked_fill(torch.arange(7) == 3, -100)


def pair(name, **options):
    """A model in training without dropout, and one that is patched."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()
    if name == "llama_head_bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    patched = copy.deepcopy(model)
    report = fastattn.patch(patched, fused_loss=True, **options)
    return model, patched, report


def loss_and_gradients(model, **options):
    out = model(input_ids=TOKENS, labels=LABELS, **options)
    return out, [out.loss, *torch.autograd.grad(out.loss, [*model.parameters()], allow_unused=True)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_models_own(name, counted):
    model, patched, report = pair(name)
    assert report.swapped[""] == "itself, with fastattn.linear_cross_entropy in training"
    options = {"num_items_in_batch": torch.tensor(5)} if counted else {}
    (expected, truth), (got, ours) = (loss_and_gradients(m, **options) for m in (model, patched))
    assert got.logits is None
    assert type(got) is type(expected)
    for a, b in zip(ours, truth):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_labels_that_are_shifted_already():
    model, patched, _ = pair("gpt2")
    shifted = torch.randint(VOCABULARY, (2, 7), generator=GENERATOR)
    (_, truth), (got, ours) = (loss_and_gradients(m, shift_labels=shifted) for m in (model, patched))
    assert got.logits is None
    torch.testing.assert_close(ours[0], truth[0])


def _evaluate(model):
    model.eval()
    return model(input_ids=TOKENS, labels=LABELS)


def _replace_the_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    return model(input_ids=TOKENS, labels=LABELS)


def _hook_the_head(model):
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: 2.0 * out)
    return model(input_ids=TOKENS, labels=LABELS)


CALLS = {
    "evaluation": _evaluate,
    "no labels": lambda model: model(input_ids=TOKENS),
    "some logits": lambda model: model(input_ids=TOKENS[:, :3], labels=LABELS[:, :3], logits_to_keep=3),
    "chosen logits": lambda model: model(
        input_ids=TOKENS[:, :3], labels=LABELS[:, :3], logits_to_keep=torch.tensor([2, 0, 1])
    ),
    "a tuple": lambda model: model(input_ids=TOKENS, labels=LABELS, return_dict=False),
    "the router's loss": lambda model: model(input_ids=TOKENS, labels=LABELS, output_router_logits=True),
    "another loss": _replace_the_loss,
    "a hook": _hook_the_head,
}


@pytest.mark.parametrize("call", CALLS)
def test_every_other_call_is_the_models_own(call):
    model, patched, _ = pair("mixture" if "router" in call else "gpt2")
    got, expected = (CALLS[call](m) for m in (patched, model))
    values = [list(out.values()) if hasattr(out, "values") else list(out) for out in (got, expected)]
    assert len(values[0]) == len(values[1]) >= 2
    for a, b in zip(*values):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_model_is_what_it_was_in_everything_else(tmp_path):
    model, patched, _ = pair("gpt2")
    kind = type(model)
    assert isinstance(patched, kind)
    assert inspect.signature(patched.forward) == inspect.signature(model.forward)
    patched.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    again = pickle.loads(pickle.dumps(patched))
    assert torch.equal(loss_and_gradients(again)[1][0], loss_and_gradients(patched)[1][0])
    fastattn.unpatch(patched)
    assert type(patched) is kind
    assert loss_and_gradients(patched)[0].logits is not None


def test_one_graph():
    _, patched, _ = pair("llama_head_bias")
    expected = loss_and_gradients(patched)[1]
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=TOKENS, labels=LABELS).loss
    for a, b in zip([loss, *torch.autograd.grad(loss, [*patched.parameters()])], expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Scaled(transformers.LlamaForCausalLM):
    """Logits of its own."""

    def forward(self, input_ids=None, labels=None, **options):
        out = super().forward(input_ids=input_ids, **options)
        out.logits = 1.01 * out.logits
        out.loss = None if labels is None else self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class Capped(transformers.LlamaForCausalLM):
    """A softcap that shows in large logits alone."""

    def forward(self, input_ids=None, labels=None, **options):
        out = super().forward(input_ids=input_ids, **options)
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        out.loss = None if labels is None else self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Scaled, Capped])
def test_a_model_with_another_loss_is_left(kind, dtype):
    torch.manual_seed(0)
    model = kind(CAUSAL["llama"]()).to(dtype)
    report = fastattn.patch(model, fused_loss=True)
    assert report.left[""].startswith("its loss is another one")
    assert type(model) is kind


def test_a_model_whose_forward_was_replaced_is_left():
    """As by Accelerator.prepare and by TRL: its class's forward is not what a call runs."""
    model = pair("gpt2")[0]
    model.forward = model.forward
    report = fastattn.patch(model, fused_loss=True)
    assert report.left[""] == "its forward was replaced on the instance"
    assert model(input_ids=TOKENS, labels=LABELS).logits is not None


def _shard(linear):
    linear.weight = torch.nn.Parameter(linear.weight.flatten()[:100].detach())


def _flatten(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


@pytest.mark.parametrize("how", [_shard, _flatten])
def test_a_model_that_fsdp1_holds_is_left(how):
    """Its layers have a part of their weights, or no parameters at all, between two calls."""
    model = pair("llama_head_bias")[0]
    model.lm_head.bias = None
    for linear in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        how(linear)
    report = fastattn.patch(model, fused_loss=True)
    assert "before it is sharded" in report.left[""]
    assert "model.layers.0.mlp" in report.left


def test_an_output_layer_that_has_to_be_called_is_said_to_be():
    model = pair("gpt2")[0]
    torch.nn.utils.parametrizations.spectral_norm(model.lm_head)
    state = copy.deepcopy(model.state_dict())
    report = fastattn.patch(model, fused_loss=True)
    assert report.left[""].startswith("its output layer is no plain linear layer")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # each look at its weight changes them


class Wrapper(torch.nn.Module):
    """As PEFT's and FSDP's: it has the attributes of the model in it, and a forward of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **options):
        return self.inner(**options)


def test_a_wrapper_is_left_and_the_model_in_it_is_called():
    model, patched = (pair("gpt2")[0] for _ in range(2))
    calls = []
    patched.register_forward_hook(lambda *_: calls.append(1))
    wrapper = Wrapper(patched)
    report = fastattn.patch(wrapper, fused_loss=True)
    assert type(wrapper) is Wrapper
    assert "inner" in report.swapped
    got = wrapper(input_ids=TOKENS, labels=LABELS)
    assert calls == [1]
    assert got.logits is None
    torch.testing.assert_close(got.loss, model(input_ids=TOKENS, labels=LABELS).loss)


def test_without_a_causal_model_it_says_so():
    model = transformers.BertModel(transformers.BertConfig(**{**_DECODER, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"fused_loss is for causal language models .* none in this BertModel"):
        fastattn.patch(model, fused_loss=True)
    assert type(model) is transformers.BertModel
