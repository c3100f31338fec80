"""`attn_implementation="fastattn"` in transformers against its eager attention."""

import copy

import pytest
import torch

import fastattn
from tests.compare import assert_close
from tests.tiny_models import CAUSAL, OTHERS, build, inputs, transformers

from fastattn.integrations.transformers import attention_forward, register  # isort: skip

pytestmark = pytest.mark.filterwarnings("default")
register()


def pair(name):
    eager = build(name)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastattn")
    assert ours.config._attn_implementation == "fastattn"
    return eager, ours


def values_and_gradients(model, batch, rows):
    hidden = model(**batch)[0]
    hidden = hidden if rows is None else hidden[rows]
    grads = torch.autograd.grad(hidden.sin().sum(), list(model.parameters()), allow_unused=True)
    return [hidden, *grads]


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_outputs_and_gradients_are_eagers(name, side):
    batch = inputs(name, side or "right")
    if side is None:
        batch.pop("attention_mask", None)
    # what padding attends to has no meaning
    rows = batch["attention_mask"].bool() if "attention_mask" in batch else None
    eager, ours = pair(name)
    expected, got = (values_and_gradients(model, batch, rows) for model in (eager, ours))
    assert [x is None for x in got] == [x is None for x in expected]
    if name == "gpt_oss_sinks" or side == "left":  # no fp64: its experts; eager's mask in rows that see nothing
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        return
    truth = values_and_gradients(eager.double(), batch, rows)
    for i, (x, true, plain) in enumerate(zip(got, truth, expected)):
        if x is not None:
            assert_close(f"result {i}", x, true, plain)


@pytest.mark.parametrize("name", ["gemma2_softcap_window", "gpt_oss_sinks", "bert"])
def test_the_kernels_give_eagers_outputs_and_gradients(name):
    batch = inputs(name, "left")
    rows = batch["attention_mask"].bool()
    eager, ours = pair(name)
    expected = values_and_gradients(eager, batch, rows)
    with fastattn.backend.use("triton"):
        got = values_and_gradients(ours, batch, rows)
    for a, b in zip(expected, got):
        if a is not None:
            torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_is_token_identical_to_eager(name, side, cache):
    tokens = []
    for model in pair(name):
        options = {"do_sample": False, "max_new_tokens": 12, "cache_implementation": cache, "pad_token_id": 0}
        tokens.append(model.generate(**inputs(name, side), **options))
    assert tokens[0].shape == (2, 19)
    assert torch.equal(*tokens)


def test_chunked_prefill_and_sampling_and_beams():
    batch = inputs("llama", "left")
    for options in ({"prefill_chunk_size": 3}, {"num_beams": 3}, {"do_sample": True}):
        tokens = []
        for model in pair("llama"):
            torch.manual_seed(3)
            tokens.append(model.generate(**batch, max_new_tokens=6, pad_token_id=0, **options))
        assert torch.equal(*tokens)


def test_from_pretrained_and_back(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn").eval()
    batch = inputs("llama")
    ours = model(**batch).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours[0], model(**batch).logits[0])


def test_the_attention_really_runs(monkeypatch):
    model = build("llama", "fastattn")
    calls = []
    monkeypatch.setattr(
        "fastattn.integrations.transformers.attend", lambda *a: calls.append(a) or (torch.zeros(2, 4, 7, 6), None)
    )
    model(**inputs("llama"))
    assert len(calls) == 2
    assert all(c[3].mask.dtype == torch.bool for c in calls)  # the padding's mask arrives as one


def test_dropout_acts_in_training_only():
    _, ours = pair("bert")
    batch = inputs("bert")
    assert torch.equal(ours(**batch)[0], ours(**batch)[0])
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in ours.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    ours.train()
    assert not torch.equal(ours(**batch)[0], ours(**batch)[0])


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
MASK = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": object()}, ValueError, "cache must be None"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, ValueError, "cu_seq_lens_q must come with an attention_mask"),
        ({"sliding_window": 2, "is_causal": False}, ValueError, "sliding_window=2 must come with an attention_mask"),
        ({"block_indices": 1, "use_cache": True}, TypeError, r"\['block_indices'\]"),
    ],
    ids=["paged", "packed", "window", "unknown"],
)
def test_what_cannot_be_honoured_raises(options, error, message):
    with pytest.raises(error, match=message):
        attention_forward(torch.nn.Identity(), Q, K, K, None, **options)


def test_models_that_compute_their_attention_themselves_are_refused():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    with pytest.raises(ValueError, match="BloomModel computes its attention itself"):
        model(**inputs("llama"))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_they_are_refused_under_a_compiler_too(fullgraph):
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    errors = (ValueError, torch._dynamo.exc.Unsupported)  # the latter has the former's message in it
    with pytest.raises(errors, match="BloomModel computes its attention itself"):
        torch.compile(model, fullgraph=fullgraph, backend="eager")(**inputs("llama"))


def test_one_graph_of_a_model_that_is_supported():
    model, batch = build("llama", "fastattn"), inputs("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_packs_of_several_sequences_and_of_one():
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    eager, ours = pair("llama")
    for sequences in ([[5, 6, 7, 8], [9, 8, 7]], [[5, 6, 7, 8]]):
        batch = collate([{"input_ids": sequence} for sequence in sequences])
        torch.testing.assert_close(*(model(**batch, use_cache=False).logits for model in (ours, eager)))


@pytest.mark.parametrize("family", ["Bart", "T5"])
def test_an_encoder_gets_the_labels_of_a_batch_that_is_generated_from(family):
    """As Seq2SeqTrainer's predict_with_generate gives them."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, d_model=24, num_layers=1, encoder_layers=1, decoder_layers=1, decoder_start_token_id=2)
    heads = (
        dict(num_heads=2, d_kv=12, d_ff=32)
        if family == "T5"
        else dict(encoder_attention_heads=2, decoder_attention_heads=2)
    )
    config = getattr(transformers, f"{family}Config")(**sizes, **heads)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    batch = {**inputs("bert"), "labels": torch.ones(2, 7, dtype=torch.long)}
    expected = model.generate(**batch, max_new_tokens=5)
    model.set_attn_implementation(register())
    assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)


def test_types_of_tokens_that_a_model_does_not_know_are_ignored_as_by_sdpa():
    """Many tokenizers give them, whatever the model."""
    model, batch = build("llama", register()), inputs("llama")
    expected = model(**batch).logits
    assert torch.equal(model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits, expected)


def test_arguments_against_their_meaning():
    module = torch.nn.Identity()  # has no is_causal: causal
    dense = MASK.expand(2, 4, 5, 5)
    bias = torch.randn(1, 4, 5, 5)
    causal, nothing = attention_forward(module, Q, K, K, None)
    assert nothing is None
    weights = attention_forward(module, Q, K, K, None, output_attentions=True)[1]
    torch.testing.assert_close(weights @ K.repeat_interleave(2, 1), causal.transpose(1, 2))
    torch.testing.assert_close(causal, attention_forward(module, Q, K, K, MASK, position_ids=torch.arange(5))[0])
    leaked = {"logits_to_keep": 1, "grid_thw": torch.ones(1, 3)}  # by LLaVA-OneVision and LFM3-VL
    torch.testing.assert_close(causal, attention_forward(module, Q, K, K, None, **leaked)[0])
    floats = torch.zeros(2, 1, 5, 5).masked_fill(~MASK, torch.finfo(torch.float32).min)
    torch.testing.assert_close(causal, attention_forward(module, Q, K, K, floats)[0])
    static = torch.cat([K, torch.randn(2, 2, 3, 8)], 2)  # a static cache with three empty places
    torch.testing.assert_close(causal, attention_forward(module, Q, static, static, None)[0])
    window = dense & (torch.arange(5)[:, None] - torch.arange(5) < 2)
    windowed = attention_forward(module, Q, K, K, window)[0]
    for keys in (K, static):
        torch.testing.assert_close(attention_forward(module, Q, keys, keys, None, sliding_window=2)[0], windowed)
    for mask in (None, MASK, floats):
        got = attention_forward(module, Q, K, K, mask, position_bias=bias, scaling=0.3)[0]
        scores = 0.3 * Q @ K.repeat_interleave(2, 1).mT + bias
        expected = scores.masked_fill(~MASK, -torch.inf).softmax(-1) @ K.repeat_interleave(2, 1)
        torch.testing.assert_close(got, expected.transpose(1, 2))
