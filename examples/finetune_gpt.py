"""Fine-tune a GPT on prompts and their completions: the loss is on the completions alone, and no padding is computed.

    python examples/finetune_gpt.py runs/gpt --data mine.jsonl         lines of {"prompt": "...", "completion": " ..."}
    python examples/finetune_gpt.py runs/gpt --data sentiment          a task on real data, see --data
    the same command with --resume                                     goes on exactly where it was interrupted

The first argument is a folder that train_gpt.py wrote. The folder --out receives val.jsonl (the examples held out, which
evaluate.py reads), checkpoint.pt, metrics.jsonl, loss.png and the model with the best validation loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from pathlib import Path

import completions
import corpus
import numpy as np
import torch
import training
from completions import Tokens
from tqdm import tqdm
from training import TrainingError

from fastattn.models import GPT
from fastattn.models.pretrained import atomic_write


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder of the model to start from")
    tasks = ", ".join(completions.TASKS)
    add("--data", required=True, help=f"a .jsonl file, a task ({tasks}), or text:SOURCE with a source of prepare.py")
    add("--out", type=Path, default=Path("runs/finetuned"), help="folder for everything this run writes (%(default)s)")
    add("--val-fraction", type=float, default=0.1, help="share of the examples held out (%(default)s)")
    add("--examples", type=int, help="train on that many only, chosen at random")
    add("--epochs", type=int, default=2, help="passes over the examples (%(default)s)")
    add("--batch-tokens", type=int, default=4096, help="tokens per step, of as many examples as fit (%(default)s)")
    add("--lr", type=float, default=5e-4, help="peak learning rate (%(default)s)")
    add("--warmup", type=int, default=20, help="steps of linear warm-up before the cosine (%(default)s)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices only (%(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (%(default)s)")
    add("--dropout", type=float, default=0.1, help="few examples are soon learnt by heart (%(default)s)")
    add("--seed", type=training.seed_number, default=0, help="of the examples' order and the dropout (%(default)s)")
    add("--device", default="auto", help="auto takes the GPU if there is one; or cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast where it is fast")
    add("--eval-every", type=int, default=50, help="steps between validation losses and checkpoints (%(default)s)")
    add("--eval-examples", type=int, default=200, help="examples of each of these; the last takes all (%(default)s)")
    add("--samples", type=int, default=3, help="held-out examples to answer at the end (%(default)s)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on from --out's checkpoint, if it has one")
    either("--overwrite", action="store_true", help="start anew where --out already holds a checkpoint")
    arguments = parser.parse_args(argv)
    for name in ("examples", "epochs", "batch_tokens", "eval_every", "eval_examples"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for name in ("warmup", "weight_decay", "samples"):
        if not getattr(arguments, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(arguments, name)}")
    for name in ("lr", "clip"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(arguments, name)}")
    for name in ("val_fraction", "dropout"):
        if not 0.0 <= getattr(arguments, name) < 1.0:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(arguments, name)}")
    if arguments.model.resolve() == arguments.out.resolve():
        parser.error(f"--out {arguments.out} is the folder of the model to start from: take another one")
    return arguments


class Trainer:
    """One run: its examples, model, optimizer and position."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.device = training.choose_device(arguments.device)
        self.dtype = training.choose_dtype(arguments.dtype, self.device)
        saved = self.out / "checkpoint.pt"
        training.check_out(self.out, [saved] if saved.exists() else [], arguments)
        self.tokenizer = corpus.load_tokenizer(arguments.model)
        try:
            start = GPT.from_pretrained(arguments.model, dtype=torch.float32)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.config = dataclasses.replace(start.config, dropout=arguments.dropout)
        self.model = GPT(self.config)
        self.model.load_state_dict(start.state_dict())
        self.model.to(self.device)
        self.examples = completions.read(arguments.data)
        train, self.held_out = completions.split(self.examples, arguments.val_fraction)
        train = train[: arguments.examples]
        length = self.config.context_length
        self.train, cut = completions.encode(self.tokenizer, train, length)
        self.val, cut_in_val = completions.encode(self.tokenizer, self.held_out, length)
        self.cut = cut + cut_in_val
        lengths = [tokens.length for tokens in self.train]
        self.plan = [
            chosen
            for epoch in range(arguments.epochs)
            for chosen in completions.fill(lengths, arguments.batch_tokens, self._order(epoch))
        ]
        torch.manual_seed(arguments.seed)
        self.optimizer = training.make_optimizer(self.model, arguments.lr, arguments.weight_decay)
        names = ("epochs", "batch_tokens", "lr", "warmup", "weight_decay", "clip", "seed", "eval_examples")
        identity = {
            "start": {"sha256": hashlib.sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest()},
            "model": dataclasses.asdict(self.config),
            "data": {"train": completions.digest(train), "val": completions.digest(self.held_out)},
            "training": {name: getattr(arguments, name) for name in names} | {"dtype": str(self.dtype)},
        }
        self.checkpoint = training.Checkpoint(saved, identity)
        self.step, self.best, self.untuned = 0, float("inf"), float("nan")
        if saved.exists() and not arguments.overwrite:
            progress = self.checkpoint.load(self.model, self.optimizer, self.device)
            self.step, self.best, self.untuned = progress["step"], progress["best"], progress["untuned"]
        self.metrics = training.Metrics(self.out / "metrics.jsonl", self.step or -1)  # a new run measures at step 0
        with atomic_write(self.out / "val.jsonl") as file:
            file.write(completions.to_jsonl(self.held_out))

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.arguments.seed, epoch)).permutation(len(self.train)).tolist()

    def describe(self) -> str:
        lengths = [tokens.length for tokens in self.train]
        padding = max(lengths) / (sum(lengths) / len(lengths))
        lines = [
            f"data   {self.arguments.data}: {len(self.train):,} training and {len(self.val):,} validation examples, "
            f"{sum(lengths):,} tokens (padded to the longest: {padding:.1f} times as many)",
            f"model  {self.arguments.model}: {self.model.num_parameters():,} parameters, "
            f"context {self.config.context_length}",
            f"run    {len(self.plan):,} steps of up to {self.arguments.batch_tokens:,} tokens on {self.device} in "
            f"{'fp32' if self.dtype == torch.float32 else 'bf16 autocast'}, into {self.out}",
        ]
        if self.cut:
            lines.append(f"note   {self.cut:,} completions do not fit into the context: their ends are left out")
        if note := training.warmup_note(self.arguments.warmup, len(self.plan)):
            lines.append(note)
        return "\n".join(lines)

    def _loss(self, sequences: list[Tokens]) -> torch.Tensor:
        tokens, targets, cu_seqlens = completions.pack(sequences).to(self.device)
        with training.autocast(self.device, self.dtype):
            _, loss = self.model(tokens, targets, cu_seqlens=cu_seqlens)
        return loss

    def train_step(self) -> dict[str, float]:
        arguments = self.arguments
        lr = training.learning_rate(self.step, len(self.plan), arguments.lr, arguments.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss([self.train[index] for index in self.plan[self.step]])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), arguments.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss.item(), "lr": lr, "gradient_norm": norm.item()}

    @torch.no_grad()
    def validation_loss(self, count: int | None) -> float:
        """Mean over the completions' tokens of the first `count` examples held out, of all where it is None."""
        self.model.eval()
        total, tokens, val = 0.0, 0, self.val[:count]
        for chosen in completions.fill([sequence.length for sequence in val], self.arguments.batch_tokens):
            sequences = [val[index] for index in chosen]
            counted = sum(len(sequence.ids) - sequence.start for sequence in sequences)
            total, tokens = total + self._loss(sequences).item() * counted, tokens + counted
        self.model.train()
        return total / tokens

    def save(self) -> None:
        progress = {"step": self.step, "best": self.best, "untuned": self.untuned}
        self.checkpoint.save(self.model, self.optimizer, self.device, **progress)

    def evaluate(self) -> float:
        loss = self.validation_loss(self.arguments.eval_examples)
        self.metrics.write(step=self.step, val_loss=loss)
        if loss < self.best:
            self.best = loss
            self.model.save_pretrained(self.out)
            shutil.copyfile(self.arguments.model / "tokenizer.json", self.out / "tokenizer.json")
        return loss

    def run(self) -> int:
        """Train to the last step, or until a signal; the exit status is returned."""
        steps, val_loss = len(self.plan), None
        self.model.train()
        if self.step == 0:
            self.untuned = val_loss = self.evaluate()
            self.checkpoint.path.unlink(missing_ok=True)  # of the run that this one overwrites, whose model is gone
        interval = 0.5 if sys.stderr.isatty() else 15.0
        with (
            training.StopSignal() as stop,
            tqdm(total=steps, initial=self.step, unit="step", mininterval=interval, dynamic_ncols=True) as progress,
        ):
            while self.step < steps and not stop.received:
                start = time.perf_counter()
                tokens = sum(self.train[index].length for index in self.plan[self.step])
                record = self.train_step()
                speed = tokens / (time.perf_counter() - start)
                if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
                    raise TrainingError(
                        f"the loss or its gradient is not finite at step {self.step}: try a smaller --lr"
                    )
                self.metrics.write(step=self.step, **record, tokens_per_second=round(speed))
                if self.step % self.arguments.eval_every == 0 or self.step == steps:
                    val_loss = self.evaluate()
                    self.save()
                validation = "" if val_loss is None else f", val {val_loss:.3f}"
                progress.set_postfix_str(f"loss {record['loss']:.3f}{validation}, {speed:,.0f} tokens/s", refresh=False)
                progress.update()
        if stop.received and self.step < steps:
            self.save()
            training.say(f"{stop.received.name}: saved after step {self.step}; the same command with --resume goes on")
            return 128 + stop.received
        return 0

    def finish(self) -> None:
        """Measure the best model on all that was held out, draw the curve, answer a few of the prompts."""
        self.model = GPT.from_pretrained(self.out, device=self.device)
        loss = self.validation_loss(None)
        if not any("final_val_loss" in record for record in self.metrics.records):
            self.metrics.write(step=self.step, final_val_loss=loss, untuned_val_loss=self.untuned)
        title = f"{self.arguments.model.name}, fine-tuned on {Path(self.arguments.data).name}"
        training.plot_losses(self.metrics, {"untuned": self.untuned}, self.out / "loss.png", title)
        lines = [
            f"\nvalidation loss {loss:.3f} nats per token of the completions (before fine-tuning {self.untuned:.3f})"
        ]
        lines.append(f"curve {self.out / 'loss.png'}, metrics {self.out / 'metrics.jsonl'}, model {self.out}")
        shown = self.held_out[: self.arguments.samples]
        prompts = completions.encode_prompts(self.tokenizer, shown, self.config.context_length)
        self.model.eval()
        for example, text in zip(shown, completions.answer(self.model, self.tokenizer, prompts, 48)):
            lines.append(f"{'-' * 72}\n...{example.prompt[-200:]}\n  wanted {example.completion.strip()[:200]!r}")
            lines.append(f"  the model says {text.strip()!r}")
        lines.append(f"measure it: python examples/evaluate.py {self.out} --data {self.out / 'val.jsonl'}")
        training.say("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return training.run_script(training.lock(arguments.out), lambda _: Trainer(arguments))


if __name__ == "__main__":
    sys.exit(main())
