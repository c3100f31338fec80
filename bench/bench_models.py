"""Models: a training step (forward, loss, backward, AdamW) of a GPT and of a classifier, plain and under torch.compile,
and a GPT's generation; against nanoGPT's recipe, Hugging Face and torch.nn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from bench import machine
from bench.cases import DTYPES, Case, comparison, in_one_graph
from bench.contest import Run
from bench.peer_models import PlainClassifier, PlainGPT, TorchClassifier, TorchGPT, hugging_face
from fastattn.eager.products import emulates
from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig
from tests.compare import assert_close

LossOf = Callable[..., Tensor]


def _larger(model: Any) -> Any:
    """The model on the device, its weights larger than a fresh model's so that errors show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.to(machine.device())


@dataclass(frozen=True)
class ModelCase(Case):
    """A model of some size, and a batch for it."""

    alone: ClassVar[bool] = True
    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    batch: int

    @property
    def size(self) -> str:
        return f"{self.dtype} B{self.batch} L{self.layers} d{self.width} T{self.context} V{self.vocab}"

    def small(self) -> Any:
        return replace(self, layers=2, width=32, heads=2, context=24, vocab=50, batch=2)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=torch.Generator().manual_seed(1)).to(machine.device())


@dataclass(frozen=True)
class TrainingStep(ModelCase):
    """bf16 is autocast over fp32 weights. A provider gives (model, loss of a batch)."""

    truth: ClassVar[str]  # names of providers: computed in fp64, this is right;
    plain: ClassVar[str]  # and this is as exact as is asked of the others
    providers: ClassVar[dict[str, Callable[[Any], tuple[nn.Module, LossOf]]]]

    @abstractmethod
    def data(self) -> tuple[Tensor, ...]:
        """The batch, as the loss takes it."""

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(machine.device().type, DTYPES[self.dtype])

    def job(self, provider: Callable[[Any], tuple[nn.Module, LossOf]]) -> Run:
        model, loss_of = provider(self)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        data = self.data()

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = loss_of(*data)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def check(self, provider: Callable[[Any], tuple[nn.Module, LossOf]]) -> None:
        """The losses of three steps, so that gradients and optimizer count."""
        case = self.small()
        got, plain = (
            torch.stack([run() for _ in range(3)]) for run in map(case.job, (provider, self.providers[self.plain]))
        )
        model, loss_of = self.providers[self.truth](case)
        truth = replace(case, dtype="fp32").job(lambda _: (model.double(), loss_of))
        assert_close("losses", got, torch.stack([truth() for _ in range(3)]), plain, relative=1e-6)


@dataclass(frozen=True)
class GPTCase(ModelCase):
    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocab: int = 8192
    batch: int = 8

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.vocab, self.context, self.layers, self.heads, self.width)

    def weights(self) -> GPT:
        """The same for everybody."""
        torch.manual_seed(0)
        return _larger(GPT(self.config))

    @property
    def matrices(self) -> int:
        """Numbers in all the matrices that a token is multiplied with."""
        config: Any = self.config
        attention = 2 * self.width * (self.width + config.num_kv_heads * config.head_dim)
        mlp = (3 if config.gated else 2) * self.width * config.d_ff
        return self.layers * (attention + mlp) + self.vocab * self.width


@dataclass(frozen=True)
class GPTStep(GPTCase, TrainingStep):
    truth: ClassVar[str] = "Hugging Face GPT-2, eager"
    plain: ClassVar[str] = "Hugging Face GPT-2, eager"

    @property
    def name(self) -> str:
        return f"GPT training step {self.size}"

    @property
    def flops(self) -> float:
        """6 operations a token for each number of a matrix, and attention's 2 products in 3 passes over half the pairs."""
        attention = self.layers * 6 * self.context * self.width
        return self.batch * self.context * (6 * self.matrices + attention)

    def data(self) -> tuple[Tensor, ...]:
        text = self.integers(self.vocab, self.batch, self.context + 1)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@dataclass(frozen=True)
class CompiledGPTStep(GPTStep):
    @property
    def name(self) -> str:
        return f"{super().name} torch.compile"


@dataclass(frozen=True)
class ClassifierStep(TrainingStep):
    """Texts of different lengths, padded to the longest."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256
    vocab: int = 8192
    batch: int = 16
    truth: ClassVar[str] = "torch nn.TransformerEncoder"
    plain: ClassVar[str] = "plain PyTorch, SDPA"

    @property
    def name(self) -> str:
        return f"classifier training step {self.size}"

    @property
    def flops(self) -> float:
        """As `GPTStep.flops`, over all pairs and without a product with the vocabulary; padding counts."""
        per_token = self.layers * (6 * 12 * self.width**2 + 12 * self.context * self.width)
        return self.batch * self.context * per_token

    @property
    def config(self) -> ClassifierConfig:
        return ClassifierConfig(self.vocab, 4, self.context, self.layers, self.heads, self.width, dropout=0.0)

    def weights(self) -> Classifier:
        """The same for everybody."""
        torch.manual_seed(0)
        return _larger(Classifier(self.config))

    def data(self) -> tuple[Tensor, ...]:
        """(tokens, which of them are text, labels); a text is at least a quarter as long as the longest."""
        lengths = self.context - self.integers(3 * self.context // 4, self.batch)
        lengths[0] = self.context
        mask = torch.arange(self.context, device=lengths.device) < lengths[:, None]
        return self.integers(self.vocab, self.batch, self.context) * mask, mask, self.integers(4, self.batch)


@dataclass(frozen=True)
class Generation(GPTCase):
    """Greedy, from a prompt of 32 tokens. A provider gives `continue(tokens, new)`. `llama`: the model is Llama's, with three query
    heads for each key head and a gate."""

    new: int = 96
    llama: bool = False

    @property
    def config(self) -> GPTConfig:
        if not self.llama:
            return super().config
        return replace(
            super().config, num_kv_heads=max(1, self.heads // 3), d_ff=8 * self.width // 3, norm="rms_norm", positions="rotary",
            activation="silu", gated=True, bias=False, qkv_bias=False,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return f"{'Llama' if self.llama else 'GPT'} generate {self.new} tokens {self.size}"

    @property
    def traffic(self) -> float:
        """Every token reads all the weights once."""
        return self.new * self.matrices * DTYPES[self.dtype].itemsize

    def small(self) -> Any:
        return replace(super().small(), new=12, context=48)

    def job(self, provider: Callable[[GPTCase], Callable[[Tensor, int], Tensor]]) -> Run:
        generate, prompt = provider(self), self.integers(self.vocab, self.batch, 32)
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


def _hugging_face(case: GPTCase, attention: str) -> Any:
    return hugging_face(case.config, case.weights().state_dict(), attention).to(machine.device())


def ours(case: GPTCase) -> tuple[nn.Module, LossOf]:
    model = case.weights()
    return model, lambda tokens, targets: model(tokens, targets)[1]


def nano_gpt(case: GPTCase) -> tuple[nn.Module, LossOf]:
    model = PlainGPT(case.config, case.weights().state_dict()).to(machine.device())
    return model, model


def torch_nn(case: GPTCase) -> tuple[nn.Module, LossOf]:
    model = TorchGPT(case.config, case.weights().state_dict()).to(machine.device())
    return model, model


def gpt2(attention: str, case: GPTCase) -> tuple[nn.Module, LossOf]:
    model = _hugging_face(case, attention)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return model, loss_of


def gpt2_patched(case: GPTCase) -> tuple[nn.Module, LossOf]:
    model = _hugging_face(case, "sdpa")
    fastattn.patch(model, fused_loss=True)
    return model, lambda tokens, targets: model(input_ids=tokens, labels=targets, shift_labels=targets).loss


def compiled(provider: Callable[[Any], tuple[nn.Module, LossOf]], case: TrainingStep) -> tuple[nn.Module, LossOf]:
    """Another provider's, under torch.compile."""
    model, loss_of = provider(case)
    return model, in_one_graph(loss_of)


def classify_ours(case: ClassifierStep) -> tuple[nn.Module, LossOf]:
    model = case.weights()
    return model, lambda *data: model(*data)[1]


def classify_plain(case: ClassifierStep) -> tuple[nn.Module, LossOf]:
    model = PlainClassifier(case.config, case.weights().state_dict()).to(machine.device())
    return model, model


def classify_torch_nn(case: ClassifierStep) -> tuple[nn.Module, LossOf]:
    model = TorchClassifier(case.config, case.weights().state_dict()).to(machine.device())
    return model, model


def generate_ours(case: GPTCase) -> Callable[[Tensor, int], Tensor]:
    model = case.weights().to(DTYPES[case.dtype]).eval()
    return lambda prompt, new: model.generate(prompt, new, temperature=0)


def generate_hugging_face(case: GPTCase, patched: bool = False) -> Callable[[Tensor, int], Tensor]:
    model = _hugging_face(case, "sdpa").to(DTYPES[case.dtype]).eval()
    if patched:
        fastattn.patch(model)

    def generate(prompt: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return generate


def if_patched(case: ModelCase, name: str) -> bool:
    return "patched" in name


TRAINING = {
    "fastattn": ours,
    "nanoGPT's recipe": nano_gpt,
    "Hugging Face GPT-2, SDPA": partial(gpt2, "sdpa"),
    "Hugging Face GPT-2, eager": partial(gpt2, "eager"),
    "Hugging Face GPT-2, patched": gpt2_patched,
    "torch nn.TransformerEncoder": torch_nn,
}
GPTStep.providers = TRAINING
COMPILED = {name: partial(compiled, provider) for name, provider in TRAINING.items()}
CLASSIFYING = {
    "fastattn": classify_ours,
    "plain PyTorch, SDPA": classify_plain,
    "torch nn.TransformerEncoder": classify_torch_nn,
}
ClassifierStep.providers = CLASSIFYING
GENERATION = {
    "fastattn": generate_ours,
    "Hugging Face": generate_hugging_face,
    "Hugging Face, patched": partial(generate_hugging_face, patched=True),
}


# A CPU without instructions for bf16 takes minutes for PyTorch's steps, and nobody trains in it there: only `--all` times them.
NATIVE = ["fp32"] if machine.device().type == "cpu" and emulates(torch.bfloat16) else ["fp32", "bf16"]
OTHER = [dtype for dtype in ("fp32", "bf16") if dtype not in NATIVE]


@comparison(TRAINING, [*map(GPTStep, NATIVE)], [*map(GPTStep, OTHER)], slow=if_patched)
def test_gpt_step(compare: Callable[..., None], case: GPTStep, provider: str) -> None:
    compare(case, provider, TRAINING)


@comparison(COMPILED, [], [CompiledGPTStep("fp32"), CompiledGPTStep("bf16")])
def test_gpt_step_compiled(compare: Callable[..., None], case: CompiledGPTStep, provider: str) -> None:
    compare(case, provider, COMPILED)


@comparison(CLASSIFYING, [*map(ClassifierStep, NATIVE)], [*map(ClassifierStep, OTHER)])
def test_classifier_step(compare: Callable[..., None], case: ClassifierStep, provider: str) -> None:
    compare(case, provider, CLASSIFYING)


GENERATIONS = [Generation(dtype, batch=batch) for dtype in ("fp32", "bf16") for batch in (1, 8)]
LLAMAS = [replace(case, llama=True) for case in GENERATIONS]


@comparison(GENERATION, [*GENERATIONS, *LLAMAS[::2]], LLAMAS[1::2], slow=if_patched)
def test_generation(compare: Callable[..., None], case: Generation, provider: str) -> None:
    compare(case, provider, GENERATION)
