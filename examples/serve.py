"""Serve trained models over HTTP: text that streams, labels of texts, and a page to try both.

    pip install -e '.[serve]'
    python examples/serve.py runs/gpt runs/classifier                    a GPT, a classifier, or one of each
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "ROMEO:", "max_tokens": 50}'
    curl localhost:8000/v1/classify -H 'Content-Type: application/json' -d '{"text": "A wonderful film."}'
    python examples/serve.py runs/gpt --port 0 --ask "ROMEO:"            start, ask over HTTP as a client would, and end

/v1/completions speaks OpenAI's protocol, with `"stream": true` for server-sent events, so its clients work: base_url is
http://localhost:8000/v1 and the key is anything. Concurrent requests are computed together, see batching.py; more than
can be computed or wait are refused at once (503). There is no authentication and no encryption: to serve others than
yourself, put a reverse proxy before it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import math
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import corpus
import labelled
import torch
import training
from corpus import DataError
from serving import ClassifyRequest, CompletionRequest, Labels, Limits, Refusal, Texts
from training import TrainingError

from fastattn.models import GPT

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise SystemExit(f"error: {error}. The server needs a few more packages: pip install -e '.[serve]'") from error


class LimitBody:
    """Refuses a request whose body is larger than `limit` bytes, whether or not it says so beforehand."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        received, refusal = 0, Refusal(413, f"the request is larger than {self.limit} bytes")

        async def counted() -> dict[str, Any]:
            nonlocal received
            message: dict[str, Any] = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise refusal
            return message

        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and announced.isdigit() and int(announced) > self.limit:
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, counted if scope["type"] == "http" else receive, send)


def describe(error: dict[str, Any]) -> str:
    """One of pydantic's errors about a request, in words."""
    at = error["loc"][1:]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {at[0]}"
    return f"{'.'.join(map(str, at)) or 'body'}: {error['msg']}"


def create_app(texts: Texts | None = None, labels: Labels | None = None, limits: Limits | None = None) -> FastAPI:
    """The application, with a GPT, a classifier, or both. Its end closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if texts is not None:
            await asyncio.to_thread(texts.engine.close)

    app = FastAPI(title="fastattn", lifespan=lifespan)
    app.add_middleware(LimitBody, limit=(limits or Limits()).body)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return Refusal(error.status_code, str(error.detail), error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return Refusal(400, "; ".join(map(describe, error.errors()))).response()

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return (Path(__file__).parent / "serve.html").read_text(encoding="utf-8")

    @app.get("/healthz")
    async def health() -> JSONResponse:
        state: dict[str, Any] = {"status": "ok"}
        if texts is not None:
            state |= {"gpt": texts.name, "active": len(texts.engine.active), "waiting": texts.engine.waiting}
            if not texts.engine.alive:
                return JSONResponse(state | {"status": "the engine has stopped"}, 503)
        return JSONResponse(state if labels is None else state | {"classifier": labels.name, "labels": labels.names})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [part.name for part in (texts, labels) if part is not None]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "local"} for name in names]}

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        if texts is None:
            raise Refusal(404, "no GPT is served here")
        jobs = texts.submit(body)
        if body.stream:
            return StreamingResponse(texts.events(body, jobs), media_type="text/event-stream")
        return await texts.answer(body, jobs, request)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        if labels is None:
            raise Refusal(404, "no classifier is served here")
        return await asyncio.to_thread(labels.classify, body)

    return app


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, limits = parser.add_argument, Limits()
    add("models", type=Path, nargs="+", help="folder of a GPT, of a classifier, or both")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--max-tokens", type=int, default=limits.max_tokens, help="the longest answer (%(default)s)")
    add("--rows", type=int, default=limits.rows, help="texts that are computed together (%(default)s)")
    add("--waiting", type=int, default=limits.waiting, help="texts that may wait for that (%(default)s)")
    add("--timeout", type=float, default=limits.timeout, help="seconds until an answer must be complete (%(default)s)")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the GPT's weights (%(default)s)")
    add("--ask", metavar="TEXT", help="send the server this, print what it answers, and end; - reads standard input")
    arguments = parser.parse_args(argv)
    for name in ("max_tokens", "rows", "waiting"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port must be in [0, 65535], got {arguments.port}")
    if not arguments.timeout > 0:
        parser.error(f"--timeout must be above 0, got {arguments.timeout}")
    return arguments


def load(arguments: argparse.Namespace, limits: Limits) -> tuple[Texts | None, Labels | None]:
    device = training.choose_device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    kinds = [labelled.is_classifier(folder) for folder in arguments.models]
    if len(set(kinds)) < len(kinds):
        raise DataError("at most one GPT and one classifier are served")
    texts, labels = None, None
    for folder, is_classifier in zip(arguments.models, kinds):
        if is_classifier:
            labels = Labels(*labelled.load_classifier(folder, device), folder.name, limits)
        else:
            tokenizer = corpus.load_tokenizer(folder)
            texts = Texts(GPT.from_pretrained(folder, device=device, dtype=dtype), tokenizer, folder.name, limits)
    return texts, labels


class Server(uvicorn.Server):
    """After Ctrl-C or SIGTERM, requests that run may end for `grace` seconds; then they are ended, with a message."""

    def __init__(self, app: FastAPI, texts: Texts | None, grace: float = 5.0) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=math.ceil(grace + 5)))
        self.texts, self.grace = texts, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.texts is not None:
            asyncio.get_running_loop().call_later(self.grace, self.texts.engine.stop)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        advice = ""
        if error.errno == errno.EADDRINUSE:
            advice = ". Another server may have it: try another --port"
        elif error.errno != errno.EACCES:  # a port below 1024
            advice = ". --host must be a name or an address of this machine"
        raise TrainingError(f"cannot listen on {host}:{port}: {error.strerror or error}{advice}") from error


def ask(server: Server, address: str, text: str) -> bool:
    """One request over HTTP and its answer, printed; whether it was not refused. The server beside it ends with it."""
    refused = False
    try:
        path, body = "/v1/classify", {"text": text}
        if server.texts is not None:
            path, body = "/v1/completions", {"prompt": text, "max_tokens": 60, "temperature": 0}
        data, header = json.dumps(body), {"Content-Type": "application/json"}
        while not server.started and not server.should_exit:
            time.sleep(0.02)
        print(f"POST {path} {data}", flush=True)
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data.encode(), header)) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            answer, refused = json.load(error), True
        print(json.dumps(answer, indent=2, ensure_ascii=False), flush=True)
    finally:
        server.should_exit = True
    return not refused


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    limits = Limits(arguments.max_tokens, arguments.rows, arguments.waiting, arguments.timeout)
    try:
        text = corpus.read_stdin() if arguments.ask == "-" else arguments.ask
        with listen(
            arguments.host, arguments.port
        ) as listener:  # before the models are loaded: a taken port is soon known
            texts, labels = load(arguments, limits)
            app = create_app(texts, labels, limits)
            server, address = Server(app, texts), f"http://{arguments.host}:{listener.getsockname()[1]}"
            print(f"{address}  (Ctrl-C ends)", flush=True)
            with ThreadPoolExecutor(1) as pool:
                answered = None if text is None else pool.submit(ask, server, address, text)
                server.run(sockets=[listener])
            return 0 if answered is None or answered.result() else 1
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
