"""A GPT: one training step (forward, loss, backward, AdamW) and generation, against Hugging Face's and torch.nn's."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import machine
from bench.cases import DTYPES, Case, need
from bench.contest import Run
from fastattn.models import GPT, GPTConfig
from tests.compare import assert_close


@dataclass(frozen=True)
class GPTCase(Case):
    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocab: int = 8192
    batch: int = 8

    @property
    def size(self) -> str:
        return f"{self.dtype} B{self.batch} L{self.layers} d{self.width} T{self.context} V{self.vocab}"

    def small(self) -> Any:
        return replace(self, layers=2, width=32, heads=2, context=24, vocab=50, batch=2)

    def weights(self) -> GPT:
        """The same weights for everybody, larger than a fresh model's so that errors show."""
        torch.manual_seed(0)
        config = GPTConfig(self.vocab, self.context, self.layers, self.heads, self.width)
        model = GPT(config).to(machine.device())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    def tokens(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocab, (self.batch, length), generator=generator).to(machine.device())


@dataclass(frozen=True)
class TrainingStep(GPTCase):
    """bf16 is autocast over fp32 weights. A provider gives (model, loss of (tokens, targets))."""

    @property
    def name(self) -> str:
        return f"GPT training step {self.size}"

    @property
    def flops(self) -> float:
        """6 operations a token for each weight of a matrix, and attention's 2 products in 3 passes over half the pairs."""
        matrices = self.layers * 12 * self.width**2 + self.vocab * self.width
        attention = self.layers * 6 * self.context * self.width
        return self.batch * self.context * (6 * matrices + attention)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(machine.device().type, DTYPES[self.dtype])

    def job(self, provider: Callable[[GPTCase], tuple[nn.Module, Callable[..., Tensor]]]) -> Run:
        model, loss_of = provider(self)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        text = self.tokens(self.context + 1)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = loss_of(tokens, targets)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def check(self, provider: Callable[[GPTCase], tuple[nn.Module, Callable[..., Tensor]]]) -> None:
        """The losses of three steps, so that gradients and optimizer count."""
        case = self.small()
        losses = [torch.stack([run() for _ in range(3)]) for run in map(case.job, (provider, hugging_face_eager))]
        truth = replace(case, dtype="fp32").job(_double)
        assert_close("losses", losses[0], torch.stack([truth() for _ in range(3)]), losses[1], relative=1e-6)


@dataclass(frozen=True)
class Generation(GPTCase):
    """Greedy, from a prompt of 32 tokens. A provider gives the model and `continue(tokens, new)`."""

    new: int = 96

    @property
    def name(self) -> str:
        return f"GPT generate {self.new} tokens {self.size}"

    @property
    def traffic(self) -> float:
        """Every token reads all the weights once."""
        matrices = self.layers * 12 * self.width**2 + self.vocab * self.width
        return self.new * matrices * DTYPES[self.dtype].itemsize

    def small(self) -> Any:
        return replace(super().small(), new=12, context=48)

    def job(self, provider: Callable[[GPTCase], Callable[[Tensor, int], Tensor]]) -> Run:
        generate, prompt = provider(self), self.tokens(32)
        return lambda: generate(prompt, self.new)

    def check(self, provider: Callable[[GPTCase], Callable[[Tensor, int], Tensor]]) -> None:
        """Every token is the most likely one for the fp64 model (in 16 bits: to within the rounding of a logit)."""
        case = self.small()
        got = case.job(provider)()
        assert isinstance(got, Tensor)
        assert got.shape == (case.batch, 32 + case.new)
        model = _hugging_face(case, "eager").double()
        logits = model(got).logits[:, 31:-1]
        chosen = logits.gather(2, got[:, 32:, None]).squeeze(2)
        slack = 1e-4 if self.dtype == "fp32" else 0.05 * logits.std()
        assert (logits.amax(2) - chosen <= slack).all(), "a token is not the most likely one"


def _transformers() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return need("transformers")


def _hugging_face(case: GPTCase, attention: str) -> Any:
    """GPT-2 of transformers with `case`'s weights; its linear layers hold the transposed matrix."""
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.layers, n_head=case.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(machine.device())
    theirs, ours = model.state_dict(), case.weights().state_dict()
    names = {"attention.in_proj": "attn.c_attn", "attention.out_proj": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2",
             "feed_forward.linear1": "mlp.c_fc", "feed_forward.linear2": "mlp.c_proj"}  # fmt: skip
    for name, tensor in ours.items():
        if name == "token_embedding.weight":
            targets = ["transformer.wte.weight", "lm_head.weight"]
        elif name == "position_embedding.weight":
            targets = ["transformer.wpe.weight"]
        elif name.startswith("norm."):
            targets = [f"transformer.ln_f.{name.removeprefix('norm.')}"]
        else:
            _, index, rest = name.split(".", 2)
            module, leaf = rest.rsplit(".", 1)
            targets = [f"transformer.h.{index}.{names[module]}.{leaf}"]
        matrix = name.endswith("weight") and ".h." in targets[0] and tensor.dim() == 2
        for target in targets:
            assert theirs[target].shape == (tensor.T if matrix else tensor).shape
            theirs[target] = tensor.T if matrix else tensor
    model.load_state_dict(theirs)
    return model


def _loss_of(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens).logits
        return F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
        )

    return loss_of


def _double(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = _hugging_face(case, "eager").double()
    return model, _loss_of(model)


def ours(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = case.weights()
    return model, lambda tokens, targets: model(tokens, targets)[1]


def hugging_face(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = _hugging_face(case, "sdpa")
    return model, _loss_of(model)


def hugging_face_eager(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = _hugging_face(case, "eager")
    return model, _loss_of(model)


def hugging_face_compiled(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = _hugging_face(case, "sdpa")
    return model, torch.compile(_loss_of(model), dynamic=False)


class TorchGPT(nn.Module):
    """The same GPT from nn.TransformerEncoder."""

    def __init__(self, case: GPTCase) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(case.vocab, case.width), nn.Embedding(case.context, case.width)
        layer = nn.TransformerEncoderLayer(
            case.width, case.heads, 4 * case.width, 0.0, nn.GELU("tanh"), batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, case.layers, nn.LayerNorm(case.width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(case.context), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.encoder(x, mask=self.mask, is_causal=True) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def torch_nn(case: GPTCase) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = TorchGPT(case).to(machine.device())
    names = {"token_embedding": "tokens", "position_embedding": "positions", "attention.in_proj.": "self_attn.in_proj_",
             "attention.": "self_attn.", "feed_forward.": "", "blocks.": "encoder.layers."}  # fmt: skip
    state = {}
    for name, tensor in case.weights().state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[f"encoder.{name}" if name.startswith("norm.") else name] = tensor
    model.load_state_dict(state)
    return model, model


def generate_ours(case: GPTCase) -> Callable[[Tensor, int], Tensor]:
    model = case.weights().to(DTYPES[case.dtype]).eval()
    return lambda prompt, new: model.generate(prompt, new, temperature=0)


def generate_hugging_face(case: GPTCase) -> Callable[[Tensor, int], Tensor]:
    model = _hugging_face(case, "sdpa").to(DTYPES[case.dtype]).eval()

    def generate(prompt: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return generate


TRAINING = {
    "fastattn": ours,
    "Hugging Face GPT-2, SDPA": hugging_face,
    "Hugging Face GPT-2, eager": hugging_face_eager,
    "torch nn.TransformerEncoder": torch_nn,
}
COMPILED = {"fastattn": ours, "Hugging Face GPT-2, torch.compile": hugging_face_compiled}
GENERATION = {"fastattn": generate_ours, "Hugging Face GPT-2": generate_hugging_face}


@pytest.mark.parametrize("provider", TRAINING)
@pytest.mark.parametrize("case", [TrainingStep("fp32"), TrainingStep("bf16")], ids=lambda case: case.name)
def test_training_step(compare: Callable[..., None], case: TrainingStep, provider: str) -> None:
    compare(case, provider, TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize("provider", COMPILED)
@pytest.mark.parametrize("case", [TrainingStep("fp32", batch=4)], ids=lambda case: case.name)
def test_training_step_compiled(compare: Callable[..., None], case: TrainingStep, provider: str) -> None:
    compare(case, provider, COMPILED)


@pytest.mark.parametrize("provider", GENERATION)
@pytest.mark.parametrize(
    "case",
    [Generation(dtype, batch=batch) for dtype in ("fp32", "bf16") for batch in (1, 8)],
    ids=lambda case: case.name,
)
def test_generation(compare: Callable[..., None], case: Generation, provider: str) -> None:
    compare(case, provider, GENERATION)
