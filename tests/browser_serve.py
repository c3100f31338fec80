"""examples/serve.py's page as a person sees it, in headless Chromium: `make browser`. Screenshots go to runs/browser/."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.scripts import ENVIRONMENT, EXAMPLES, script
from tests.test_serve import make_classifier, make_gpt, tokenizer, wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.exit("needs Chromium, and finds none on the PATH: apt-get install chromium", returncode=1)

sys.path.insert(0, str(EXAMPLES))
PICTURES = EXAMPLES.parent / "runs" / "browser"
ENDLESS = "1000000"  # tokens: text that is seen has been streamed, for its end never comes
expect.set_options(timeout=20_000)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The server in a process of its own, which must end without a complaint."""
    options = ["--port", "0", "--device", "cpu", "--rows", "2", "--max-tokens", ENDLESS]
    command, pipe = script("serve.py", str(folder), *options), subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("http://"), process.communicate()[1]
            yield line.split()[0]
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[1] == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its texts have no end: the tokenizer lacks the token for that."""
    folder = tmp_path_factory.mktemp("gpt")
    make_gpt(context_length=64).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str().replace("<|endoftext|>", "<|other|>"))
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("classifier")
    model, words = make_classifier(context_length=32)
    model.save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    (folder / "labels.json").write_text('["bad", "good"]')
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        yield browser


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console shows as an error; a test that wants one takes it away."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.on("console", lambda m: complaints.append(f"{m.text} {m.location['url']}") if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert complaints == []


def write(page: Page, prompt: str, tokens: str) -> None:
    page.get_by_label("prompt").fill(prompt)
    page.get_by_label("tokens").fill(tokens)
    page.get_by_role("button", name="write").click()


def classify(page: Page, text: str) -> None:
    page.get_by_label("text", exact=True).fill(text)
    page.get_by_role("button", name="classify").click()


def wait_for_more_text(page: Page) -> None:
    arrived = "length => document.getElementById('text').textContent.length > length"
    page.wait_for_function(arrived, arg=len(page.locator("#text").inner_text()), timeout=20_000)


def active(address: str) -> int:
    """Texts that a healthy server is writing."""
    with urllib.request.urlopen(address + "/healthz", timeout=20) as response:
        return int(json.load(response)["active"])


def test_text_streams_and_stops(page: Page, gpt: str) -> None:
    page.goto(gpt)
    expect(page.get_by_role("heading", name="Classify")).to_be_hidden()
    write(page, "the king", ENDLESS)
    for _ in range(4):
        wait_for_more_text(page)
        assert active(gpt) == 1
    page.screenshot(path=PICTURES / "gpt.png")
    page.get_by_role("button", name="stop").click()
    wait_until(lambda: active(gpt) == 0)
    write(page, "the queen", "30")
    expect(page.get_by_role("button", name="stop")).to_be_disabled()
    expect(page.locator("#text")).to_have_text(re.compile("^the queen."))


def test_a_person_who_leaves(browser: Browser, page: Page, gpt: str) -> None:
    """Once more than there are rows."""
    for _ in range(3):
        other = browser.new_page()
        other.goto(gpt)
        write(other, "the king", ENDLESS)
        wait_for_more_text(other)
        other.close()
    wait_until(lambda: active(gpt) == 0)
    page.goto(gpt)
    write(page, "the night", "30")
    expect(page.locator("#text")).to_have_text(re.compile("^the night."))


def test_labels_and_what_they_rest_on(page: Page, classifier: str) -> None:
    page.goto(classifier)
    expect(page.get_by_role("heading", name="Write on")).to_be_hidden()
    text = "A good film, not a bad film.   "
    classify(page, text)
    label, parts = page.locator("#label"), r"\s*(\d+\.\d) %  (good|bad)"
    expect(label).to_have_text(re.compile(f"^{parts}{parts}$"))
    first, second = (float(share) for share, _ in re.findall(parts, label.inner_text()))
    assert first > second, label.inner_text()
    expect(page.locator("#heads")).to_be_visible()
    assert page.locator("#map").text_content() == text
    colours = "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    mean = page.locator("#map span").evaluate_all(colours)
    assert len(set(mean)) > 2
    page.screenshot(path=PICTURES / "classifier.png")
    page.get_by_role("combobox").select_option("layer 0, head 1")
    assert page.locator("#map span").evaluate_all(colours) != mean


def test_messages(page: Page, gpt: str, classifier: str, complaints: list[str]) -> None:
    page.goto(gpt)
    message = page.get_by_role("alert")
    for prompt, tokens, reason in (
        ("king " * 100, "5", "the model reads at most 64"),
        ("", "5", "prompt is empty"),
        ("the king", "", "max_tokens"),
    ):
        write(page, prompt, tokens)
        expect(message).to_contain_text(reason)
        expect(message).to_be_in_viewport()
    page.screenshot(path=PICTURES / "message.png")
    write(page, "the king", "5")
    expect(message).to_be_hidden()
    page.goto(classifier)
    classify(page, " ")
    expect(message).to_contain_text("text is empty")
    classify(page, "good " * 300_000)
    expect(message).to_contain_text("larger than 1048576 bytes")
    page.context.set_offline(True)
    classify(page, "good")
    expect(message).to_contain_text("no connection to the server")
    complaints[:] = [text for text in complaints if not text.startswith("Failed to load resource")]


def test_a_narrow_window(page: Page, gpt: str, classifier: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(gpt)
    write(page, "m" * 60, "20")
    expect(page.locator("#text")).to_contain_text("m" * 60)
    expect(page.get_by_role("button", name="stop")).to_be_disabled()
    page.screenshot(path=PICTURES / "gpt-narrow.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.goto(classifier)
    classify(page, "A good film: " + "m" * 60)
    expect(page.locator("#map")).to_contain_text("m" * 60)
    page.screenshot(path=PICTURES / "classifier-narrow.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
