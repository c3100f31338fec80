"""`patch` over many families of transformers: results stay, and `unpatch` is exact."""

import importlib

import pytest
import torch

import fastattn
from tests.tiny_models import inputs, transformers

pytestmark = pytest.mark.filterwarnings("default")

_SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_LATENT = dict(
    **_HEADS, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
_VISION = dict(
    image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
_BART = dict(
    vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, max_position_embeddings=64,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
)  # fmt: skip
_SHORT = dict(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)

DECODERS = {
    **dict.fromkeys(
        ("Phi3", "Phi", "Olmo", "Olmo2", "Granite", "Cohere", "Starcoder2", "StableLm", "SmolLM3"), _GROUPED
    ),
    **dict.fromkeys(("Qwen3", "Gemma", "Glm", "Helium"), _HEADS),
    "Gemma3Text": {**_HEADS, "sliding_window": 4},
    "GPTNeoX": _SIZES,
    "Mixtral": {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Nemotron": _GROUPED,
    "GPTJ": {**_SHORT, "rotary_dim": 4},
    "Falcon": dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "Bloom": dict(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
    "Mamba2": dict(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1
    ),
    "DeepseekV32": {**_LATENT, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3},
    "DeepseekV4": {
        **_LATENT,
        "num_key_value_heads": 1,
        "sliding_window": 4,
        "layer_types": ["heavily_compressed_attention", "sliding_attention"],
        "compress_rates": {"heavily_compressed_attention": 2, "compressed_sparse_attention": 2},
    },
}
ENCODERS = {
    **dict.fromkeys(("XLMRoberta", "Camembert", "MPNet", "Ernie", "DebertaV2"), _SIZES),
    "Electra": {**_SIZES, "embedding_size": 16},
    "Albert": {**_SIZES, "embedding_size": 16},
    "ModernBert": {**_SIZES, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "DistilBert": dict(vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
}
VISION = dict.fromkeys(("DeiT", "Dinov2", "Beit", "CLIPVision", "SiglipVision"), _VISION)
ENCODER_DECODERS = {
    "T5": dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "Bart": _BART,
    "NllbMoe": {**_BART, "num_experts": 4},
}
FAMILIES = {**DECODERS, **ENCODERS, **VISION, **ENCODER_DECODERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_results_stay(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    auto = transformers.AutoModelForCausalLM if family in DECODERS else transformers.AutoModel
    model = auto.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = inputs("vit" if family in VISION else "bert")
    if family in ENCODER_DECODERS:
        batch["decoder_input_ids"] = batch["input_ids"]

    def run():
        out = model(**batch)[0]
        rows = batch.get("attention_mask") if family not in ENCODER_DECODERS else None
        out = out if rows is None else out[rows.bool()]
        return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True)]

    before = run()
    assert torch.isfinite(before[0]).all()
    assert fastattn.patch(model).swapped
    for expected, got in zip(before, run()):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * (1 + expected.abs().max().item()))
    fastattn.unpatch(model)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, run()))


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"activation_dropout": 0.5}, {"dropout": 0.0}])
def test_feed_forward_layers_that_drop_without_a_module_are_left(option):
    from transformers.models.detr.modeling_detr import DetrMLP

    config = transformers.DetrConfig(d_model=16, **{"dropout": 0.0, **option})
    mlp = DetrMLP(config, 16, 24)
    assert bool(fastattn.patch(mlp).swapped) == (option == {"dropout": 0.0})


def test_feed_forward_layers_that_clamp_are_left():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

    mlp, x = (
        DeepseekV4MLP(transformers.DeepseekV4Config(hidden_size=16, intermediate_size=24)),
        300 * torch.randn(4, 16),
    )
    expected = mlp(x)
    assert not fastattn.patch(mlp).swapped
    assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "adapter"),
    [("llama.LlamaRMSNorm", "WideningRMSNorm"), ("gemma2.Gemma2RMSNorm", "RMSNormFromOne"), ("cohere.CohereLayerNorm", "LayerNorm")],
)  # fmt: skip
def test_wide_norms_are_swapped_for_their_own_kind(name, adapter, dtype):
    """The mean of a wide row of random numbers is next to nothing: with 16 bits, an RMS norm seemed to be a layer norm."""
    module, cls = name.split(".")
    norm = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls)(2048).to(dtype)
    x = (2.0 + torch.randn(3, 2048)).to(dtype)
    expected = norm(x)
    assert fastattn.patch(norm).swapped == {"": f"fastattn.adapters.{adapter}"}
    torch.testing.assert_close(norm(x), expected, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("later", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama.LlamaRMSNorm", "olmo2.Olmo2RMSNorm", "gemma.GemmaRMSNorm", "deberta.DebertaLayerNorm"]
)
def test_norms_give_the_same_dtypes_where_they_are_cast_after_patching(name, now, later):
    """As where the norms of a patched model in bf16 are kept in fp32: Llama's give fp32 then, Olmo's bf16 for bf16."""
    module, cls = name.split(".")
    norm = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls)(24).to(now)
    torch.nn.init.normal_(norm.weight)
    inputs = [torch.randn(2, 3, 24), torch.randn(2, 3, 24).bfloat16()]
    assert fastattn.patch(norm).swapped
    got = [norm.to(later)(x) for x in inputs]
    fastattn.unpatch(norm)
    torch.testing.assert_close(got, [norm(x) for x in inputs], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_t5_give_the_dtype_of_their_weight(dtype):
    """In fp16, T5 keeps the products behind which its sums are made, and so these, in fp32."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norm = T5LayerNorm(24).to(dtype)
    x = 1e4 * torch.randn(2, 7, 24)
    torch.nn.init.normal_(norm.weight)
    expected = [norm(x), norm(x.bfloat16())]
    assert fastattn.patch(norm).swapped
    torch.testing.assert_close([norm(x), norm(x.bfloat16())], expected, rtol=1e-2, atol=1e-2)
