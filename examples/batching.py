"""Continuous batching: requests come and go while one thread computes a token for all of them at a time.

A request waits in a bounded queue until one of the batch's rows is free; its prompt is then read alone into that row of
the key-value cache, and from there on it takes part in every step until it ends. Rows stay without gaps: the last one
moves into a row that becomes free.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.models import GPT, KVCache
from fastattn.models.decoding import TokenReader, can_read_tokens
from fastattn.models.sampling import penalise_repetition, sample


@dataclass(eq=False)
class Request:
    """One text to continue.

    Attributes:
        tokens: the prompt, to which the engine appends.
        max_new_tokens: how many at most.
        emit: called by the engine's thread with each new token, an int, and at last with the reason of the end, a string:
            "stop" (the end of the text), "length", "cancelled", "closed" or "error: ...".
        temperature, top_k, top_p, repetition_penalty, seed: as in `GPT.generate`.
        cancelled: set it, and the request ends before its next token.
    """

    tokens: list[int]
    max_new_tokens: int
    emit: Callable[[int | str], None]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    written: int = 0


class Rows:
    """The key-value cache of a batch whose rows belong to different requests."""

    def __init__(self, model: GPT, rows: int) -> None:
        config, weight = model.config, model.output_weight
        self.capacity = config.context_length
        self.lengths = [0] * rows
        shape = (rows, config.num_kv_heads, self.capacity, config.head_dim)
        self.blocks = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_layers)]

    def view(self, first: int, end: int) -> KVCache:
        """Rows first to end, as the model takes them; they share the memory."""
        cache, lengths = KVCache(self.capacity), self.lengths[first:end]
        cache.blocks = [(keys[first:end], values[first:end]) for keys, values in self.blocks]
        alike = len(set(lengths)) == 1
        cache.length = (
            lengths[0] if alike else torch.tensor(lengths, dtype=torch.int32, device=self.blocks[0][0].device)
        )
        return cache

    def move(self, source: int, target: int) -> None:
        count = self.lengths[target] = self.lengths[source]
        for buffers in self.blocks:
            for buffer in buffers:
                buffer[target, :, :count] = buffer[source, :, :count]


class Engine:
    """A thread that continues the texts of up to `rows` requests at once.

    Args:
        model: in evaluation mode; nobody else may change it.
        end: the token that ends a text.
        rows: requests in a batch.
        waiting: requests that may wait for a row.
    """

    def __init__(self, model: GPT, end: int | None, *, rows: int = 8, waiting: int = 64) -> None:
        self.model, self.end, self.rows = model, end, rows
        self.active: list[Request] = []
        self._generators: list[torch.Generator] = []
        self._cache = Rows(model, rows)
        self._read_token = TokenReader(model) if can_read_tokens(model) else None
        self._waiting: queue.Queue[Request | None] = queue.Queue(waiting)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed.is_set()

    def submit(self, request: Request) -> None:
        """Raises `queue.Full` where too many wait already, and RuntimeError after `close`."""
        if not self.alive:
            raise RuntimeError("the engine is closed")
        self._waiting.put_nowait(request)

    def stop(self) -> None:
        """End all requests; returns at once."""
        self._closed.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes the thread where it waits for work

    def close(self) -> None:
        """End all requests, and the thread."""
        self.stop()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._admit()
                self._step()
            except Exception as error:  # a server goes on with the next request
                self._end_all(f"error: {error}")
        self._end_all("closed")
        while not self._waiting.empty():
            if (request := self._waiting.get_nowait()) is not None:
                _tell(request, "closed")

    def _admit(self) -> None:
        """Take requests out of the queue while rows are free; wait for one where there is nothing else to do."""
        while len(self.active) < self.rows and not self._closed.is_set():
            try:
                request = self._waiting.get(block=not self.active)
            except queue.Empty:
                return
            if request is None:
                return
            if request.cancelled.is_set():
                _tell(request, "cancelled")
                continue
            row, generator = len(self.active), torch.Generator(self.model.output_weight.device)
            self.active.append(request)
            self._generators.append(generator)
            try:
                generator.seed() if request.seed is None else generator.manual_seed(request.seed)
                logits = self._read(row, request.tokens[-self._cache.capacity :])
            except Exception as error:
                self._remove(row, f"error: {error}")
            else:
                self._write(row, logits)

    def _read(self, row: int, tokens: list[int]) -> Tensor:
        """Logits after `tokens`, (vocab_size,), which fill the row anew."""
        self._cache.lengths[row] = 0
        given = torch.tensor([tokens], device=self.model.output_weight.device)
        last = self.model.hidden(given, self._cache.view(row, row + 1))[0, -1]
        self._cache.lengths[row] = len(tokens)
        return self.model.logits(last)

    def _step(self) -> None:
        """One more token for each request."""
        for row in reversed(range(len(self.active))):
            if self.active[row].cancelled.is_set():
                self._remove(row, "cancelled")
        capacity, context = self._cache.capacity, self.model.config.context_length
        full = [row for row in range(len(self.active)) if self._cache.lengths[row] == capacity]
        logits = {row: self._read(row, self.active[row].tokens[-(context // 2 or 1) :]) for row in full}
        if not full and self.active:
            cache = self._cache.view(0, len(self.active))
            tokens = torch.tensor(
                [request.tokens[-1] for request in self.active], device=self.model.output_weight.device
            )
            if self._read_token is not None and isinstance(cache.length, int):
                last = self._read_token(tokens, cache)
            else:
                last = self.model.hidden(tokens[:, None], cache)[:, -1]
            logits = dict(enumerate(self.model.logits(last)))
            for row in logits:
                self._cache.lengths[row] += 1
        for row in sorted(logits, reverse=True):  # backwards: a row that ends is replaced by the last one
            self._write(row, logits[row])

    def _write(self, row: int, logits: Tensor) -> None:
        """Choose a request's next token; end the request where it is its last, or where it cannot be chosen or told."""
        try:
            reason = self._choose(row, logits)
        except Exception as error:
            reason = f"error: {error}"
        if reason is not None:
            self._remove(row, reason)

    def _choose(self, row: int, logits: Tensor) -> str | None:
        """Append and emit the next token; the reason is returned where the request ends with it."""
        request, logits = self.active[row], logits[None]
        if request.repetition_penalty != 1.0:
            seen = torch.tensor([request.tokens[-self._cache.lengths[row] :]], device=logits.device)
            logits = penalise_repetition(logits, seen, request.repetition_penalty)
        options = request.temperature, request.top_k, request.top_p
        token = int(sample(logits, *options, self._generators[row]))
        if token == self.end:
            return "stop"
        request.tokens.append(token)
        request.written += 1
        request.emit(token)
        return "length" if request.written == request.max_new_tokens else None

    def _remove(self, row: int, reason: str) -> None:
        request, last = self.active[row], len(self.active) - 1
        if row != last:
            self._cache.move(last, row)
            self.active[row], self._generators[row] = self.active[last], self._generators[last]
        self.active.pop()
        self._generators.pop()
        _tell(request, reason)

    def _end_all(self, reason: str) -> None:
        while self.active:
            self._remove(len(self.active) - 1, reason)


def _tell(request: Request, reason: str) -> None:
    """Emit the end of a request; whoever it belongs to may be gone."""
    with contextlib.suppress(Exception):
        request.emit(reason)
