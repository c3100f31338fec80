"""GPT in the formats of the Hugging Face hub, against transformers' own models with the same files."""

import json

import pytest
import torch

import fastattn
from fastattn.models import GPT, GPTConfig, KVCache
from tests.tiny_models import transformers

pytestmark = pytest.mark.filterwarnings("default")

_LLAMA = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
THEIRS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=24, n_layer=2, n_head=4),
    "gpt2_inner_relu": lambda: transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=24, n_layer=1, n_head=2, n_inner=20, activation_function="relu"
    ),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "llama_tied_wide_heads": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True, head_dim=10),
    "llama3_rope": lambda: transformers.LlamaConfig(**_LLAMA, rope_parameters=_LLAMA3),
    "yarn_rope": lambda: transformers.LlamaConfig(**_LLAMA, rope_parameters=_YARN),
    "mistral_window": lambda: transformers.MistralConfig(**_LLAMA, head_dim=6, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
}
OURS = {
    "gpt2": GPTConfig(50, context_length=64, num_layers=2, num_heads=4, d_model=24, d_ff=40, tie_weights=False),
    "llama": GPTConfig(
        50, context_length=64, num_layers=2, num_heads=4, num_kv_heads=1, d_model=24, d_ff=40, bias=False,
        norm="rms_norm", norm_eps=1e-4, positions="rotary", rope_theta=100.0, activation="silu", gated=True,
    ),
    "mistral": GPTConfig(
        50, context_length=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_model=24, bias=False,
        norm="rms_norm", positions="rotary", activation="gelu_tanh", gated=True, window=3,
    ),
    "qwen2": GPTConfig(
        50, context_length=64, num_layers=1, num_heads=4, d_model=24, bias=False, qkv_bias=True,
        norm="rms_norm", positions="rotary", activation="silu", gated=True,
    ),
    "own_format": GPTConfig(
        50, context_length=64, num_layers=1, num_heads=2, num_kv_heads=1, d_model=24, positions="rotary", gated=True
    ),
}  # fmt: skip
TOKENS = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))


def theirs(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS[name]())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def ours(name: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(OURS[name])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("shards", ["one_file", "sharded"])
@pytest.mark.parametrize("name", THEIRS)
def test_their_checkpoints_load_and_go_back(name, shards, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path, max_shard_size="12KB" if shards == "sharded" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "sharded")
    loaded = GPT.from_pretrained(tmp_path)
    expected = model(TOKENS).logits
    torch.testing.assert_close(loaded(TOKENS)[0], expected, atol=2e-5, rtol=1e-4)
    generated = model.generate(TOKENS, do_sample=False, max_new_tokens=15, pad_token_id=0)
    assert torch.equal(loaded.generate(TOKENS, 15, temperature=0), generated)

    loaded.save_pretrained(tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
    torch.testing.assert_close(back(TOKENS).logits, expected)


@pytest.mark.parametrize("name", OURS)
def test_ours_are_theirs_once_saved(name, tmp_path):
    model = ours(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    if name == "own_format":
        assert json.loads((tmp_path / "config.json").read_text())["model"] == "GPT"
        return
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.float()(TOKENS)[0], other.float().eval()(TOKENS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("gpt2", "mistral") else pytest.mark.slow) for n in OURS]
)
def test_reading_in_pieces_and_training_on_both_backends(name):
    model, losses = ours(name), []
    with torch.no_grad():
        cache = KVCache(64)
        pieces = torch.cat([model.hidden(piece, cache) for piece in TOKENS.split([7, 1, 9, 1, 2], dim=1)], dim=1)
        torch.testing.assert_close(pieces, model.hidden(TOKENS), atol=2e-5, rtol=1e-4)
    for backend in ("eager", "triton"):
        model = ours(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with fastattn.backend.use(backend):
            for _ in range(2):
                _, loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_first_gpt2_checkpoints_have_no_prefix_but_buffers(tmp_path):
    from safetensors.torch import load_file, save_file

    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "model.safetensors")
    loaded = GPT.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS)[0], model(TOKENS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"model_type": "opt"}, "model_type must be one of gpt2, llama"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop must be 0.1, got 0.3"),
        ("gpt2", {"n_layer": 1}, "no place for: transformer.h.1"),
        ("gpt2", {"n_layer": 3}, "the tensors do not fit config.json"),
        ("gpt2", {"activation_function": "mish"}, "the activation must be one of .* got 'mish'"),
        ("llama", {"attention_bias": True}, "attention_bias must be False"),
        ("llama", {"hidden_size": 0}, "d_model must be at least 1, got 0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "must not be 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False"),
    ],
)
def test_what_a_gpt_cannot_be_is_named(name, change, message, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_missing_settings_and_shards(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="must say num_hidden_layers"):
        GPT.from_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        GPT.from_pretrained(tmp_path)
