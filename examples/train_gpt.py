"""Train a GPT on text, from raw files to a model that writes.

    python examples/train_gpt.py                                   Shakespeare, 3 to 8 minutes on two CPU cores
    python examples/train_gpt.py --data book.txt --out runs/book   a UTF-8 file, or a folder of .txt and .md files
    python examples/train_gpt.py --architecture llama --kv-heads 2  as Llama instead of GPT-2
    the same command with --resume                                 goes on exactly where it was interrupted
    the same command with --resume and more --steps                trains on, also where the run had ended
    torchrun --nproc-per-node 4 examples/train_gpt.py --parallel ddp     on four GPUs, or CPU processes; also: fsdp

The folder --out receives the tokens, checkpoint.pt, metrics.jsonl, report.html (configuration, curves, a sample) and the
model with the best validation loss (config.json, model.safetensors, tokenizer.json), which examples/generate.py reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import checkpoints
import corpus
import numpy as np
import parallel
import torch
import training
from parallel import Processes
from report import write_report
from tqdm import tqdm
from training import TrainingError

from fastattn.models import GPT, GPTConfig

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms_norm", "positions": "rotary", "activation": "silu", "gated": True, "bias": False},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", default=corpus.SHAKESPEARE, help="file, folder or built-in source, see prepare.py (%(default)s)")
    add("--out", type=Path, default=Path("runs/gpt"), help="folder for everything this run writes (%(default)s)")
    add("--tokens", type=Path, help="folder for the tokens, to share between runs (default: in --out)")
    add("--vocab-size", type=int, default=2048, help="size of the byte-pair vocabulary (%(default)s)")
    add("--val-fraction", type=float, default=0.1, help="share of the text held out (%(default)s)")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add(
        "--architecture", choices=ARCHITECTURES, default="gpt2", help="llama: rotary positions, RMS norm, SwiGLU (gpt2)"
    )
    add("--context-length", type=int, default=128, help="tokens the model sees at once (%(default)s)")
    add("--layers", type=int, default=4, help="number of blocks (%(default)s)")
    add("--heads", type=int, default=4, help="attention heads a block; must divide --d-model (%(default)s)")
    add("--kv-heads", type=int, help="heads of keys and values; must divide --heads (default: --heads)")
    add("--d-model", type=int, default=256, help="width of the model (%(default)s)")
    add("--dropout", type=float, default=0.0, help="raise it when the validation loss turns up (%(default)s)")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--steps", type=int, default=1000, help="optimizer steps (%(default)s)")
    add("--batch-size", type=int, default=16, help="contexts per forward pass, of all processes together (%(default)s)")
    add("--accumulate", type=int, default=1, help="forward passes per step: a larger batch in the same memory (1)")
    add("--lr", type=float, default=2e-3, help="peak learning rate; smaller for wider models (%(default)s)")
    add("--warmup", type=int, default=50, help="steps of linear warm-up before the cosine (%(default)s)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices only (%(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (%(default)s)")
    add("--seed", type=training.seed_number, default=0, help="of weights, data's order and dropout (%(default)s)")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--device", default="auto", help="auto takes the GPU if there is one; or cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast where it is fast")
    add("--parallel", choices=parallel.KINDS, default="none", help="under torchrun: ddp copies the model, fsdp cuts it")
    add("--checkpoint-activations", action="store_true", help="compute each block twice to keep less of it in memory")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--eval-every", type=int, default=100, help="steps between validation losses and checkpoints (%(default)s)")
    add("--eval-batches", type=int, default=10, help="batches of each of these; the last one takes all (%(default)s)")
    add("--tensorboard", action=argparse.BooleanOptionalAction, help="write --out/tensorboard (if it is installed)")
    either = run.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on from --out's checkpoint, if it has one")
    either("--overwrite", action="store_true", help="start anew where --out already holds a checkpoint")
    add("--prompt", default="\n", help="what the sample at the end continues")
    add("--sample-tokens", type=int, default=200, help="length of that sample (%(default)s)")

    arguments = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batches"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for name in ("warmup", "weight_decay", "sample_tokens"):
        if not getattr(arguments, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(arguments, name)}")
    for name in ("lr", "clip"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(arguments, name)}")
    return arguments


class Trainer:
    """One run: its data, model, optimizer and position."""

    def __init__(self, arguments: argparse.Namespace, processes: Processes) -> None:
        self.arguments = arguments
        self.processes = processes
        self.out: Path = arguments.out
        self.device = processes.device
        self.dtype = training.choose_dtype(arguments.dtype, self.device)
        saved = checkpoints.find(self.out)
        training.check_out(self.out, saved, arguments)
        if arguments.batch_size % processes.count:
            raise TrainingError(
                f"--batch-size must be a multiple of the {processes.count} processes, got {arguments.batch_size}"
            )
        tokens = arguments.tokens or self.out / "tokens"
        with processes.main_first():
            sizes = arguments.vocab_size, arguments.val_fraction
            self.corpus = corpus.prepare(arguments.data, tokens, *sizes, training.say)
        with training.named_by_options(arguments):
            self.config = GPTConfig(
                vocab_size=self.corpus.vocab_size,
                context_length=arguments.context_length,
                num_layers=arguments.layers,
                num_heads=arguments.heads,
                d_model=arguments.d_model,
                dropout=arguments.dropout,
                num_kv_heads=arguments.kv_heads,
                **ARCHITECTURES[arguments.architecture],
            )
            torch.manual_seed(arguments.seed)
            self.model = GPT(self.config).to(self.device)
        for part in ("train", "val"):
            corpus.check_length(getattr(self.corpus, part), self.config.context_length, part)
        self.baselines = self.corpus.baselines()
        parallel.prepare_blocks(self.model, compiled=arguments.compile, checkpointed=arguments.checkpoint_activations)
        self.wrapped = processes.wrap(self.model)
        self.optimizer = training.make_optimizer(self.model, arguments.lr, arguments.weight_decay)
        names = ("steps", "batch_size", "accumulate", "lr", "warmup", "weight_decay", "clip", "seed", "eval_batches")
        identity = {
            "model": dataclasses.asdict(self.config),
            "data": {key: self.corpus.manifest[key] for key in ("sha256", "requested_vocab_size", "val_fraction")},
            "training": {name: getattr(arguments, name) for name in names} | {"dtype": str(self.dtype)},
        }
        self.checkpoints = checkpoints.Checkpoints(self.out, identity, processes)
        self.step, self.best = 0, float("inf")
        if saved and arguments.resume:
            progress = self.checkpoints.load(self.model, self.optimizer)
            self.step, self.best = progress["step"], progress["best"]
        self.metrics = training.Metrics(
            self.out / "metrics.jsonl", self.step, writes=processes.main, tensorboard=arguments.tensorboard
        )

    @property
    def tokens_per_step(self) -> int:
        return self.arguments.batch_size * self.arguments.accumulate * self.config.context_length

    def describe(self) -> str:
        manifest, config = self.corpus.manifest, self.config
        precision = "fp32" if self.dtype == torch.float32 else "bf16 autocast"
        baselines = ", ".join(f"{name} {loss:.3f}" for name, loss in self.baselines.items())
        lines = (
            f"data   {manifest['source']}: {manifest['train_tokens']:,} training tokens, "
            f"{manifest['val_tokens']:,} validation tokens, vocabulary {config.vocab_size:,}\n"
            f"model  {self.model.num_parameters():,} parameters: {config.num_layers} layers, {config.num_heads} heads, "
            f"width {config.d_model}, context {config.context_length}\n"
            f"run    {self.arguments.steps:,} steps of {self.tokens_per_step:,} tokens "
            f"on {self.processes} in {precision}, into {self.out}\n"
            f"loss of guessing, in nats per token: {baselines}"
        )
        notes = [training.warmup_note(self.arguments.warmup, self.arguments.steps)]
        if (before := self.checkpoints.file.grown_from) is not None:
            notes.append(
                f"note   the run had {before:,} steps; from step {self.step:,} on the learning rate is that of a run of "
                f"{self.arguments.steps:,}"
            )
        return "\n".join([lines, *filter(None, notes)])

    def train_step(self) -> dict[str, float]:
        arguments = self.arguments
        lr = training.learning_rate(self.step, arguments.steps, arguments.lr, arguments.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        training.seed(arguments.seed, self.step, self.processes.rank)
        total = torch.zeros((), device=self.device)
        for part in range(arguments.accumulate):
            first = (self.step * arguments.accumulate + part) * arguments.batch_size
            context = self.config.context_length
            tokens = self.corpus.train
            starts = corpus.training_starts(len(tokens), context, first, arguments.batch_size, arguments.seed)
            with self.processes.accumulating(self.wrapped, last=part == arguments.accumulate - 1):
                loss = self._loss(tokens, self.processes.share(starts)) / arguments.accumulate
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), arguments.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        loss = self.processes.sum(total.item()) / self.processes.count
        return {"loss": loss, "lr": lr, "gradient_norm": self.processes.whole(norm).item()}

    def _loss(self, tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        inputs, targets = corpus.windows(tokens, starts, self.config.context_length)
        with training.autocast(self.device, self.dtype):
            _, loss = self.wrapped(inputs.to(self.device), targets.to(self.device))
        return loss

    def bar(self, *arguments: Any, shown: bool = True, **options: Any) -> tqdm:
        """tqdm's, of the main process; a line now and then where nobody watches."""
        interval = 0.5 if sys.stderr.isatty() else 15.0
        shown = shown and self.processes.main
        return tqdm(*arguments, mininterval=interval, dynamic_ncols=True, disable=not shown, **options)

    @torch.no_grad()
    def validation_loss(self, batches: int | None) -> float:
        """Mean over windows of the validation text, all of them where `batches` is None."""
        size, tokens = self.arguments.batch_size, self.corpus.val
        limit = None if batches is None else batches * size
        starts = corpus.validation_starts(len(tokens), self.config.context_length, limit)
        self.model.eval()
        total = 0.0
        for i in self.bar(range(0, len(starts), size), "validation", unit="batch", shown=batches is None):
            batch = starts[i : i + size]
            share = self.processes.share(batch)
            # FSDP needs every process in every pass, also where the last batch has too few windows for all.
            total += self._loss(tokens, share if len(share) else batch[:1]).item() * len(share)
        self.model.train()
        return self.processes.sum(total) / len(starts)

    def save(self) -> None:
        self.checkpoints.save(self.model, self.optimizer, step=self.step, best=self.best)

    def evaluate(self) -> float:
        loss = self.validation_loss(self.arguments.eval_batches)
        self.metrics.write(step=self.step, val_loss=loss)
        if loss < self.best:
            self.best = loss
            self.processes.save_pretrained(self.model, self.out)
            if self.processes.main:
                shutil.copyfile(self.corpus.folder / "tokenizer.json", self.out / "tokenizer.json")
        return loss

    def run(self) -> int:
        """Train to the last step, or until a signal; the exit status is returned."""
        steps, every = self.arguments.steps, self.arguments.eval_every
        val_loss = None
        with training.StopSignal() as stop, self.bar(total=steps, initial=self.step, unit="step") as progress:
            while self.step < steps and not (number := self.processes.max(stop.received or 0)):
                start = time.perf_counter()
                record = self.train_step()
                speed = self.tokens_per_step / (time.perf_counter() - start)
                if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
                    raise TrainingError(
                        f"the loss or its gradient is not finite at step {self.step}: try a smaller --lr"
                    )
                self.metrics.write(step=self.step, **record, tokens_per_second=round(speed))
                if self.step % every == 0 or self.step == steps:
                    val_loss = self.evaluate()
                    self.save()
                validation = "" if val_loss is None else f", val {val_loss:.3f}"
                progress.set_postfix_str(f"loss {record['loss']:.3f}{validation}, {speed:,.0f} tokens/s", refresh=False)
                progress.update()
        if self.step < steps:
            self.save()
            name = signal.Signals(number).name
            training.say(f"{name}: saved after step {self.step}; the same command with --resume goes on")
            return 128 + number
        return 0

    def finish(self) -> None:
        """Measure the best model on the whole validation text, draw the curves, write a sample and the report."""
        self.model = self.wrapped = GPT.from_pretrained(self.out, device=self.device)
        loss = self.validation_loss(None)
        if not self.processes.main:
            return
        manifest = self.corpus.manifest
        bits = loss / math.log(2) * manifest["val_tokens"] / manifest["val_bytes"]
        if not any("final_val_loss" in record for record in self.metrics.records if record["step"] == self.step):
            self.metrics.write(step=self.step, final_val_loss=loss, bits_per_byte=bits, **self.baselines)
        title = f"GPT on {Path(manifest['source']).name}"
        training.plot_losses(self.metrics, self.baselines, self.out / "loss.png", title)
        training.plot_progress(self.metrics, self.out / "progress.png")
        sample = self.sample() if self.arguments.sample_tokens else ""
        results = {"validation loss, nats per token": loss, "bits per byte": bits}
        results |= {f"loss of {name} guessing": baseline for name, baseline in self.baselines.items()}
        write_report(
            self.out / "report.html",
            title,
            results=results | {"parameters": f"{self.model.num_parameters():,}"},
            pictures=[self.out / "loss.png", self.out / "progress.png"],
            settings={**vars(self.arguments), "data": manifest, "processes": str(self.processes)},
            samples={f"after {self.arguments.prompt!r}, temperature 0.8, top-p 0.95": sample} if sample else None,
        )
        lines = [f"\nvalidation loss {loss:.3f} nats per token, {bits:.2f} bits per byte, on text it never saw"]
        for name, baseline in self.baselines.items():
            verdict = f"{baseline - loss:.3f} better" if loss < baseline else f"{loss - baseline:.3f} WORSE"
            lines.append(f"  {name:>8} guessing {baseline:.3f}: the model is {verdict}")
        lines.append(f"report {self.out / 'report.html'}, metrics {self.out / 'metrics.jsonl'}, model {self.out}")
        if sample:
            lines.append(f"\na sample (more: python examples/generate.py {self.out}):")
            lines.append(f"{'-' * 72}\n{sample}\n{'-' * 72}")
        training.say("\n".join(lines))

    def sample(self) -> str:
        """What the model writes after the prompt, prompt included."""
        tokenizer = self.corpus.tokenizer
        prompt = torch.tensor([corpus.encode_prompt(tokenizer, self.arguments.prompt)], device=self.device)
        tokens = self.model.generate(prompt, self.arguments.sample_tokens, temperature=0.8, top_p=0.95, seed=0)
        return tokenizer.decode(tokens[0].tolist()).strip("\n")


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Processes]:
    """The processes of this run; the first of them holds the folder's lock."""
    with (
        parallel.join(arguments.parallel, arguments.device) as processes,
        training.lock(arguments.out) if processes.main else nullcontext(),
    ):
        yield processes


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return training.run_script(joined(arguments), lambda processes: Trainer(arguments, processes), parallel.rank())


if __name__ == "__main__":
    sys.exit(main())
