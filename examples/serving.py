"""What examples/serve.py serves: requests, their limits, and the models that answer them."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import batching
import corpus
import labelled
from attention_map import map_text
from streaming import Decoder, StopStrings
from tokenizers import Tokenizer

from fastattn.models import GPT, Classifier

try:
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field, model_validator
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise SystemExit(f"error: {error}. The server needs a few more packages: pip install -e '.[serve]'") from error


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_tokens: new tokens of a text.
        rows: texts that are computed together.
        waiting: texts that may wait for a row, and calls of the classifier that may wait for each other.
        timeout: seconds until an answer must be complete.
        body: bytes of a request.
        texts: prompts or texts in a request.
        stops, stop_length: stop strings in a request, and characters of one.
    """

    max_tokens: int = 512
    rows: int = 8
    waiting: int = 64
    timeout: float = 60.0
    body: int = 2**20
    texts: int = 16
    stops: int = 16
    stop_length: int = 256


class CompletionRequest(BaseModel):
    """OpenAI's; what is not done here may be given where it changes nothing, as clients do, and is refused otherwise."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | list[str]
    model: str | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False
    echo: bool = False
    user: str | None = None
    best_of: int = Field(default=1, ge=1, le=1)
    presence_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    frequency_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    logprobs: None = None
    suffix: None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """In OpenAI's protocol null means that a field is not given."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class ClassifyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str | list[str]
    attention: bool = False


class Refusal(HTTPException):
    """An answer that is an error, in OpenAI's form."""

    def response(self) -> JSONResponse:
        return JSONResponse(
            refusal_body(self.status_code, str(self.detail)), self.status_code, dict(self.headers or {})
        )


def refusal_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def check_text(name: str, texts: list[str]) -> None:
    try:
        for text in texts:
            corpus.whole(text)
    except corpus.DataError as error:
        raise Refusal(400, f"{name}: {error}") from error


def busy(what: str) -> Refusal:
    return Refusal(503, f"{what}: try again in a moment", {"Retry-After": "1"})


class Job:
    """One text of a request: its way through the engine, and the text that comes back."""

    def __init__(
        self, engine: batching.Engine, tokenizer: Tokenizer, text: str, body: CompletionRequest, timeout: float
    ):
        try:
            prompt = corpus.encode_prompt(tokenizer, text)
        except corpus.DataError as error:
            raise Refusal(400, f"prompt is empty, and {error}") from error
        if len(prompt) > engine.model.config.context_length:
            longest = engine.model.config.context_length
            raise Refusal(400, f"prompt has {len(prompt)} tokens; the model reads at most {longest}")
        self.prompt, self.prompt_tokens, self.finish_reason = text, len(prompt), "length"
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        self._decoder = Decoder(tokenizer, prompt)
        self._gate = StopStrings([body.stop] if isinstance(body.stop, str) else body.stop or [])
        self._events: asyncio.Queue[int | str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: int | str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        names = ("temperature", "top_k", "repetition_penalty", "seed")
        options = {name: getattr(body, name) for name in names} | {"top_p": None if body.top_p == 1.0 else body.top_p}
        self.request = batching.Request(list(prompt), body.max_tokens, emit, **options)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes; however that ends, the engine forgets the request."""
        try:
            while not self._gate.found:
                try:
                    event = await asyncio.wait_for(self._events.get(), self._deadline - time.monotonic())
                except asyncio.TimeoutError as error:
                    raise Refusal(504, f"no complete answer within {self._timeout:g} seconds") from error
                if isinstance(event, int):
                    if text := self._gate.push(self._decoder.push(event)):
                        yield text
                elif event in ("stop", "length"):
                    self.finish_reason = event
                    if text := self._gate.flush():
                        yield text
                    return
                else:
                    raise Refusal(503, "the server is shutting down" if event == "closed" else event)
            self.finish_reason = "stop"
        finally:
            self.request.cancelled.set()


class Texts:
    """The GPT behind /v1/completions."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits) -> None:
        end = tokenizer.token_to_id(corpus.END_OF_TEXT)
        self.engine = batching.Engine(model, end, rows=limits.rows, waiting=limits.waiting)
        self.tokenizer, self.name, self.limits = tokenizer, name, limits

    def submit(self, body: CompletionRequest) -> list[Job]:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not 1 <= len(prompts) <= self.limits.texts:
            raise Refusal(400, f"prompt must hold 1 to {self.limits.texts} texts, got {len(prompts)}")
        check_text("prompt", prompts)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > self.limits.stops or any(len(stop) > self.limits.stop_length for stop in stops):
            most = f"at most {self.limits.stops} strings of at most {self.limits.stop_length} characters"
            raise Refusal(400, f"stop must be {most}")
        if body.max_tokens > self.limits.max_tokens:
            raise Refusal(400, f"max_tokens must be at most {self.limits.max_tokens}, got {body.max_tokens}")
        jobs = [Job(self.engine, self.tokenizer, prompt, body, self.limits.timeout) for prompt in prompts]
        try:
            for job in jobs:
                self.engine.submit(job.request)
        except (queue.Full, RuntimeError) as error:
            for job in jobs:
                job.request.cancelled.set()
            raise busy("too many requests are waiting" if isinstance(error, queue.Full) else str(error)) from error
        return jobs

    async def answer(self, body: CompletionRequest, jobs: list[Job], request: Request) -> dict[str, Any]:
        async def one(job: Job) -> str:
            return "".join([piece async for piece in job.pieces()])

        tasks = [asyncio.create_task(one(job)) for job in jobs]
        try:
            waiting = set(tasks)
            while waiting:
                _, waiting = await asyncio.wait(waiting, timeout=0.5)
                if waiting and await request.is_disconnected():
                    raise Refusal(499, "the client has gone")
            texts = [task.result() for task in tasks]
        finally:
            for task, job in zip(tasks, jobs):
                task.cancel()
                job.request.cancelled.set()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices = [
            self._choice(index, (job.prompt if body.echo else "") + text, job.finish_reason)
            for index, (job, text) in enumerate(zip(jobs, texts))
        ]
        read, written = sum(job.prompt_tokens for job in jobs), sum(job.request.written for job in jobs)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return self._envelope(choices) | {"usage": usage}

    async def events(self, body: CompletionRequest, jobs: list[Job]) -> AsyncIterator[str]:
        """Server-sent events: the pieces of one text after the other, then [DONE]."""
        envelope = self._envelope([])

        def event(index: int, text: str, reason: str | None) -> str:
            return f"data: {json.dumps(envelope | {'choices': [self._choice(index, text, reason)]})}\n\n"

        try:
            for index, job in enumerate(jobs):
                if body.echo:
                    yield event(index, job.prompt, None)
                async for piece in job.pieces():
                    yield event(index, piece, None)
                yield event(index, "", job.finish_reason)
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            yield f"data: {json.dumps(refusal_body(refusal.status_code, refusal.detail))}\n\n"
        finally:
            for job in jobs:
                job.request.cancelled.set()

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        return head | {"model": self.name, "choices": choices}

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}


class Labels:
    """The classifier behind /v1/classify: one call computes, a few wait."""

    def __init__(self, model: Classifier, tokenizer: Tokenizer, names: list[str], name: str, limits: Limits) -> None:
        self.model, self.tokenizer, self.names, self.name, self.limits = model, tokenizer, names, name, limits
        self._computes = threading.Lock()
        self._room = threading.BoundedSemaphore(limits.waiting + 1)

    def classify(self, body: ClassifyRequest) -> dict[str, Any]:
        texts = [body.text] if isinstance(body.text, str) else body.text
        if not 1 <= len(texts) <= self.limits.texts:
            raise Refusal(400, f"text must hold 1 to {self.limits.texts} texts, got {len(texts)}")
        if body.attention and len(texts) > 1:
            raise Refusal(400, f"attention is of one text at a time, got {len(texts)}")
        check_text("text", texts)
        if not self._room.acquire(blocking=False):
            raise busy("too many requests are waiting")
        attention = None
        try:
            if not self._computes.acquire(timeout=self.limits.timeout):
                raise Refusal(504, f"no answer within {self.limits.timeout:g} seconds")
            try:
                tokens = labelled.encode(self.tokenizer, texts, self.model.config.context_length)
                found = labelled.probabilities(self.model, tokens)
                if body.attention and len(tokens[0]):
                    attention = self._attention(texts[0])
            finally:
                self._computes.release()
        finally:
            self._room.release()
        results = [
            {"label": self.names[row.argmax()], "probabilities": dict(zip(self.names, row.tolist()))} for row in found
        ]
        if body.attention:
            results[0]["attention"] = attention
        return {"model": self.name, "results": results}

    def _attention(self, text: str) -> dict[str, Any]:
        """The text in pieces, and how much attention each receives in every layer and head, see attention_map.py."""
        found = map_text(self.model, self.tokenizer.encode(text), text)
        return {
            "pieces": [{"before": before, "text": word} for before, word in found.pieces],
            "rest": found.rest,
            "received": found.weights["received"].tolist(),
        }
