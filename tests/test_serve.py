"""examples/serve.py and batching.py: the same texts as without a server, limits, time-outs, and clients that leave."""

import contextlib
import http.client
import json
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from fastattn.eager import attention_fused
from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("scripts")
LLAMA = {"positions": "rotary", "norm": "rms_norm", "gated": True, "num_kv_heads": 1, "window": 7}


def tokenizer() -> Any:
    import corpus

    return corpus.train_tokenizer("the king and the queen of the night said: not to be! \n" * 20, 300)


def make_gpt(**settings: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, **({"context_length": 24, "num_layers": 2, "num_heads": 2, "d_model": 16} | settings)))
    for parameter in model.parameters():  # so that it has opinions
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def make_classifier(**settings: Any) -> tuple[Classifier, Any]:
    """With its tokenizer."""
    import labelled

    words = labelled.train_tokenizer(["a good film", "a bad film"], 100)
    torch.manual_seed(0)
    settings = {"context_length": 8, "num_heads": 2, "d_model": 16} | settings
    model = Classifier(ClassifierConfig(words.get_vocab_size(), 2, **settings))
    for parameter in model.parameters():  # so that it looks at some words more than at others
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval(), words


@pytest.fixture
def client(scripts: None) -> Iterator[Callable[..., Any]]:
    """Makes a client of an application with a GPT and a classifier; what it serves is in its attribute `texts`."""
    import serve
    from fastapi.testclient import TestClient

    opened = []

    def make(model: GPT | None = None, **limits: Any) -> Any:
        bounds = serve.Limits(**({"max_tokens": 60} | limits))
        texts = serve.Texts(model or make_gpt(), tokenizer(), "tiny", bounds)
        labels = serve.Labels(*make_classifier(), ["bad", "good"], "reviews", bounds)
        test_client = TestClient(serve.create_app(texts, labels, bounds))
        test_client.texts, test_client.labels = texts, labels
        opened.append(test_client.__enter__())
        return test_client

    yield make
    for test_client in opened:
        test_client.__exit__(None, None, None)
        assert not test_client.texts.engine.alive


def collect(engine: Any, **settings: Any) -> tuple[Any, "queue.Queue[int | str]"]:
    import batching

    events: queue.Queue[int | str] = queue.Queue()
    request = batching.Request(emit=events.put, **settings)
    engine.submit(request)
    return request, events


@pytest.mark.parametrize("settings", [{}, LLAMA, {"tie_weights": False}], ids=["gpt-2", "llama", "adapted output"])
def test_the_batch_gives_what_each_alone_would(settings: dict[str, Any]) -> None:
    """More requests than rows, of all lengths, past the end of the context, with every way of sampling."""
    import batching

    model, choose = make_gpt(**settings), random.Random(0)
    if not model.config.tie_weights:
        model.output.register_forward_hook(lambda module, inputs, logits: -logits)
    ways = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 5, "seed": 4},
        {"temperature": 1.2, "top_p": 0.8, "seed": 5},
        {"temperature": 0.0, "repetition_penalty": 1.5},
    ]
    asked = [
        ([choose.randrange(300) for _ in range(choose.randint(1, 24))], choose.randint(1, 40), ways[i % len(ways)])
        for i in range(15)
    ]
    engine = batching.Engine(model, None, rows=4)
    try:
        found = [collect(engine, tokens=list(p), max_new_tokens=n, **way) for p, n, way in asked]
        for (prompt, count, way), (request, events) in zip(asked, found):
            expected = model.generate(torch.tensor([prompt]), count, **way)[0].tolist()
            told = [events.get(timeout=30) for _ in range(count + 1)]
            assert told == [*expected[len(prompt) :], "length"]
            assert request.tokens == expected
    finally:
        engine.close()


def test_sixteen_bits_stay_in_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on CPUs where a copy of the cache in fp32 would be read faster: new keys would be lost with the copy."""
    import batching

    monkeypatch.setattr(attention_fused, "faster_in_fp32", lambda dtype: dtype != torch.float32)
    model, prompt = make_gpt().bfloat16(), [3, 5, 7, 9]
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model.generate(torch.tensor([prompt]), 20, temperature=0)[0].tolist()
    engine = batching.Engine(model, None, rows=2)
    try:
        request, events = collect(engine, tokens=list(prompt), max_new_tokens=20, temperature=0.0)
        while not isinstance(events.get(timeout=30), str):
            pass
        assert request.tokens == expected
    finally:
        engine.close()


def test_requests_end_and_are_cancelled() -> None:
    import batching

    model = make_gpt()
    prompt = [5, 6, 7]
    first = model.generate(torch.tensor([prompt]), 8, temperature=0)[0, 3:].tolist()
    engine = batching.Engine(model, first[5], rows=2, waiting=1)
    count = first.index(first[5])
    try:
        _, events = collect(engine, tokens=list(prompt), max_new_tokens=50, temperature=0.0)
        assert [events.get(timeout=10) for _ in range(count + 1)] == [*first[:count], "stop"]
        engine.end = None
        endless = [collect(engine, tokens=[1], max_new_tokens=10**9) for _ in range(1)]
        endless[0][1].get(timeout=10)
        endless.append(collect(engine, tokens=[1], max_new_tokens=10**9))
        endless[1][1].get(timeout=10)
        waits = collect(engine, tokens=[1], max_new_tokens=1)
        with pytest.raises(queue.Full):
            collect(engine, tokens=[1], max_new_tokens=1)
        endless[0][0].cancelled.set()
        assert isinstance(waits[1].get(timeout=10), int)
        assert waits[1].get(timeout=10) == "length"
        broken = collect(engine, tokens=[10**6], max_new_tokens=1)  # no such token
        assert "error: " in broken[1].get(timeout=10)
        assert isinstance(endless[1][1].get(timeout=10), int)  # goes on
    finally:
        engine.close()
    reasons = [events.queue[-1] for _, events in endless]
    assert reasons == ["cancelled", "closed"]
    with pytest.raises(RuntimeError, match="closed"):
        collect(engine, tokens=[1], max_new_tokens=1)


def test_the_engine_survives_what_one_request_raises() -> None:
    """Before its first token, when it is told one, and at its end; the others go on."""
    import batching

    def refuse(event: int | str) -> None:
        raise ValueError(event)

    engine = batching.Engine(make_gpt(), None, rows=2)
    try:
        _, seed = collect(engine, tokens=[1], max_new_tokens=1, seed=2**80)
        assert "error: " in seed.get(timeout=10)
        engine.submit(batching.Request([1], 1, refuse))
        _, option = collect(engine, tokens=[1], max_new_tokens=1, top_k="many")
        assert "error: " in option.get(timeout=10)
        _, good = collect(engine, tokens=[1], max_new_tokens=2, seed=-1)
        assert [type(good.get(timeout=10)) for _ in range(3)] == [int, int, str]
    finally:
        engine.close()


def streamed(response: Any) -> tuple[str, list[dict[str, Any]]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(event["choices"][0]["text"] for event in events), events


def test_completions(client: Callable[..., Any]) -> None:
    web = client()
    model, words = web.texts.engine.model, web.texts.tokenizer
    body = {"prompt": "the king", "max_tokens": 30, "temperature": 0}
    ids = words.encode("the king").ids
    tokens = model.generate(torch.tensor([ids]), 30, temperature=0)[0, len(ids) :].tolist()
    end = words.token_to_id("<|endoftext|>")
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    whole = words.decode([*ids, *tokens]).removeprefix("the king")
    answer = web.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"].rstrip("\N{REPLACEMENT CHARACTER}") == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert choice["finish_reason"] == ("length" if len(tokens) == 30 else "stop")
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == len(tokens)

    text, events = streamed(web.post("/v1/completions", json=body | {"stream": True, "echo": True}))
    assert text == "the king" + choice["text"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert len(events) > 5
    stop = choice["text"][4:7]
    (stopped,) = web.post("/v1/completions", json=body | {"stop": [stop]}).json()["choices"]
    assert stopped["text"] == choice["text"][: choice["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    both = web.post("/v1/completions", json=body | {"prompt": ["night", "the king"]}).json()["choices"]
    assert [part["index"] for part in both] == [0, 1]
    assert both[1]["text"] == choice["text"]


def test_classification(client: Callable[..., Any]) -> None:
    web = client()
    results = web.post("/v1/classify", json={"text": ["a good film", "bad"]}).json()["results"]
    for text, result in zip(("a good film", "bad"), results):
        tokens = torch.tensor([web.labels.tokenizer.encode(text).ids])
        expected = web.labels.model(tokens)[0][0].softmax(-1).tolist()
        assert list(result["probabilities"].values()) == pytest.approx(expected, rel=1e-4)
        assert result["label"] == ["bad", "good"][expected[1] > expected[0]]
    assert len(web.post("/v1/classify", json={"text": "good"}).json()["results"]) == 1
    (result,) = web.post("/v1/classify", json={"text": " A good,  film", "attention": True}).json()["results"]
    attention = result["attention"]
    pieces = "".join(piece["before"] + piece["text"] for piece in attention["pieces"])
    assert " A good,  film".endswith(pieces + attention["rest"])
    assert torch.tensor(attention["received"]).shape == (2, 2, 4)
    assert web.post("/v1/classify", json={"text": "", "attention": True}).json()["results"][0]["attention"] is None
    assert web.post("/v1/classify", json={"text": ["a", "b"], "attention": True}).status_code == 400


BAD = {
    "field": ({"prompt": "a", "tools": 3}, 400, "tools: Extra inputs are not permitted"),
    "penalty": ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty: Input should be less than or equal"),
    "seed": ({"prompt": "a", "seed": 2**80}, 400, "seed: Input should be less than"),
    "stops": ({"prompt": "a", "stop": ["x"] * 17}, 400, "at most 16 strings of at most 256 characters"),
    "stop": ({"prompt": "a", "stop": "x" * 257}, 400, "at most 16 strings of at most 256 characters"),
    "surrogate": ({"prompt": ["a", "\ud800"]}, 400, "prompt: character 0 is the lone surrogate"),
    "no prompt": ({}, 400, "prompt"),
    "too much": ({"prompt": "a", "max_tokens": 61}, 400, "max_tokens must be at most 60, got 61"),
    "temperature": ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    "long": ({"prompt": "king " * 30}, 400, "the model reads at most 24"),
    "many": ({"prompt": ["a"] * 17}, 400, "prompt must hold 1 to 16 texts, got 17"),
    "none": ({"prompt": []}, 400, "prompt must hold 1 to 16 texts, got 0"),
    "large": ({"prompt": "a" * 5000}, 413, "the request is larger than 4096 bytes"),
}


@pytest.mark.parametrize(("body", "status", "message"), BAD.values(), ids=BAD)
def test_refused_requests(client: Callable[..., Any], body: dict[str, Any], status: int, message: str) -> None:
    web = client(body=4096)
    response = web.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert web.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize(("body", "at"), [("hello", 0), ('{"prompt": "a"', 14)])
def test_a_body_that_is_not_json(client: Callable[..., Any], body: str, at: int) -> None:
    response = client().post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert re.fullmatch(f"the body is not JSON: Expecting .* at character {at}", response.json()["error"]["message"])


def test_values_that_change_nothing(client: Callable[..., Any]) -> None:
    """OpenAI's clients send them; what is not a number says so."""
    web, neutral = client(), {"presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1}
    neutral |= {"logit_bias": None, "suffix": None, "logprobs": None}
    nulls = dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "seed", "best_of"))
    for more in (neutral, nulls):
        assert web.post("/v1/completions", json={"prompt": "a", **more}).status_code == 200
    as_json = {"Content-Type": "application/json"}
    response = web.post("/v1/completions", content=b'{"prompt": "a", "temperature": NaN}', headers=as_json)
    assert response.json()["error"]["message"] == "temperature: Input should be a finite number"
    assert web.post("/v1/classify", content=b'{"text": "\\ud800"}', headers=as_json).status_code == 400


def test_an_empty_prompt(client: Callable[..., Any]) -> None:
    """Starts a new text, where the tokenizer has a token for that."""
    web = client()
    assert web.post("/v1/completions", json={"prompt": ""}).status_code == 200
    web.texts.tokenizer = Tokenizer.from_str(web.texts.tokenizer.to_str().replace("<|endoftext|>", "<|other|>"))
    response = web.post("/v1/completions", json={"prompt": ""})
    assert response.status_code == 400
    assert "prompt is empty" in response.json()["error"]["message"]


def test_a_large_body_that_does_not_say_so(client: Callable[..., Any]) -> None:
    chunks = (b" " * 1000 for _ in range(10))
    response = client(body=4096).post("/v1/completions", content=chunks)
    assert response.status_code == 413


def test_health_page_and_models(client: Callable[..., Any]) -> None:
    web = client()
    state = web.get("/healthz").json()
    assert (state["status"], state["gpt"], state["classifier"]) == ("ok", "tiny", "reviews")
    assert [model["id"] for model in web.get("/v1/models").json()["data"]] == ["tiny", "reviews"]
    assert "<title>fastattn</title>" in web.get("/").text
    web.texts.engine.close()
    assert web.get("/healthz").status_code == 503
    assert web.post("/v1/completions", json={"prompt": "a"}).status_code == 503


def test_the_page_names_what_is_there(client: Callable[..., Any]) -> None:
    """Every element that its script looks up, every path that it asks, and every field of the answers that it reads."""
    web = client()
    page = web.get("/").text
    assert set(re.findall(r'at\("(\w+)"\)', page)) == set(re.findall(r'id="(\w+)"', page))
    paths = set(re.findall(r'(?:fetch|post)\("([^"]+)"', page))
    assert paths == {"/healthz", "/v1/completions", "/v1/classify"}
    assert paths <= {route.path for route in web.app.routes}
    asked = {"prompt": "a", "stream": True, "top_p": 0.95, "max_tokens": 3, "temperature": 0.8}
    assert all(re.search(rf"\b{name}\b", page) for name in asked)
    web.texts.engine.end = None
    text, events = streamed(web.post("/v1/completions", json={**asked, "seed": 1}))
    assert text
    assert all("text" in event["choices"][0] for event in events)
    assert {"gpt", "classifier"} <= web.get("/healthz").json().keys()


def test_an_answer_that_takes_too_long(client: Callable[..., Any]) -> None:
    web = client(timeout=0.05, max_tokens=10**9)
    web.texts.engine.end = None
    response = web.post("/v1/completions", json={"prompt": "a", "max_tokens": 10**9})
    assert response.status_code == 504
    assert "no complete answer within 0.05 seconds" in response.json()["error"]["message"]
    text = web.post("/v1/completions", json={"prompt": "a", "max_tokens": 10**9, "stream": True}).text
    assert '"code": 504' in text.split("\n\n")[-2]
    wait_until(lambda: not web.texts.engine.active)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_hundred_clients_at_once(client: Callable[..., Any]) -> None:
    """Everyone gets the right answer, or is told that the server is busy; nothing stays behind."""
    web = client(rows=4, waiting=40)
    right = web.post("/v1/completions", json={"prompt": "the king", "max_tokens": 20, "temperature": 0}).json()

    def ask(number: int) -> tuple[int, Any]:
        body = {"prompt": "the king", "max_tokens": 20, "temperature": 0}
        response = web.post("/v1/completions", json=body)
        return response.status_code, response.json()

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    texts = [answer["choices"][0]["text"] for status, answer in answers if status == 200]
    assert {status for status, _ in answers} <= {200, 503}
    assert len(texts) >= 40
    assert set(texts) == {right["choices"][0]["text"]}
    wait_until(lambda: not web.texts.engine.active and not web.texts.engine.waiting)


@contextmanager
def running() -> Iterator[tuple[Any, Callable[[bool], http.client.HTTPConnection]]]:
    """A server of endless texts on a real port, and a function that asks for one."""
    import serve

    limits = serve.Limits(max_tokens=10**9)
    texts = serve.Texts(make_gpt(), tokenizer(), "tiny", limits)
    texts.engine.end = None
    with serve.listen("127.0.0.1", 0) as listener:
        server = serve.Server(serve.create_app(texts, None, limits), texts, grace=0.2)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def ask(stream: bool) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=10)
            body = json.dumps({"prompt": "a", "max_tokens": 10**9, "stream": stream})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            return connection

        yield server, ask
        server.should_exit = True
        thread.join(timeout=10)
    assert not thread.is_alive()
    assert not texts.engine.alive


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(stream: bool) -> None:
    """The engine stops writing for it."""
    with running() as (server, ask):
        connection = ask(stream)
        if stream:
            with connection.getresponse() as response:
                assert response.readline().startswith(b"data: ")
        wait_until(lambda: bool(server.texts.engine.active))
        connection.close()
        wait_until(lambda: not server.texts.engine.active)


def test_a_server_that_ends_tells_its_clients() -> None:
    with running() as (server, ask):
        streamed, whole = ask(True), ask(False)
        wait_until(lambda: len(server.texts.engine.active) == 2)
        server.should_exit = True
        assert b"the server is shutting down" in streamed.getresponse().read()
        response = whole.getresponse()
        assert response.status == 503
        assert b"the server is shutting down" in response.read()
        streamed.close()
        whole.close()


def test_a_server_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It answers; a second one on its port says so; Ctrl-C ends it at once."""
    make_gpt().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(tmp_path), "--device", "cpu", "--port"]
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        [*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.communicate()
        port = line.split()[0].rpartition(":")[2]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        for _ in range(2):
            connection.request("POST", "/v1/completions", '{"prompt": "a"}', {"Content-Type": "application/json"})
            assert json.loads(connection.getresponse().read())["choices"][0]["text"]
        second = subprocess.run(
            [*command, port], capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in second.stderr
        connection.close()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.wait()


def test_a_server_that_asks_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One request as a client would send it, its answer or its refusal, and the end."""
    import serve

    make_gpt().save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").write_text(tokenizer().to_str())
    for text, expected, status in (("a b", '"text": "', 0), ("a b " * 200, "the model reads at most", 1)):
        assert serve.main([str(tmp_path / "gpt"), "--device", "cpu", "--port", "0", "--ask", text]) == status
        printed = capsys.readouterr().out
        assert "POST /v1/completions" in printed
        assert expected in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port must be in [0, 65535], got 99999"),
        (["--port", "-1"], "--port must be in [0, 65535], got -1"),
        (["--host", "203.0.113.1", "--port", "0"], "--host must be a name or an address of this machine"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host must be a name or an address of this machine"),
    ],
)
def test_where_it_cannot_listen(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import serve

    with contextlib.suppress(SystemExit):
        assert serve.main(["nowhere", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_taken_port() -> None:
    import serve
    from training import TrainingError

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(TrainingError, match="Another server may have it: try another --port"),
    ):
        serve.listen("127.0.0.1", taken.getsockname()[1])
