"""Text from tokens that come one by one: whole characters only, up to the first stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer


class Decoder:
    """The text that each token adds; a character whose bytes are spread over tokens comes with the last of them.

    Args:
        tokenizer: what the tokens mean.
        prompt: the tokens before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(prompt) - 8)
        self._shown: str | None = None

    def push(self, token: int) -> str:
        if self._shown is None:
            self._shown = self._tokenizer.decode(self._ids[self._start :])
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece = text[len(self._shown) :]
        self._start, self._shown = max(0, len(self._ids) - 8), None
        return piece


class StopStrings:
    """Lets text through up to the first of the stop strings; what may be the beginning of one is held back.

    Attributes:
        found: whether a stop string has come: there is no more text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        held = self._held + piece
        if places := [place for stop in self._stops if (place := held.find(stop)) >= 0]:
            self.found, self._held = True, ""
            return held[: min(places)]
        beginnings = (stop[:length] for stop in self._stops for length in range(1, len(stop)))
        keep = max((len(beginning) for beginning in beginnings if held.endswith(beginning)), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def decode_stream(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of the tokens as it comes, up to the first stop string."""
    decoder, gate = Decoder(tokenizer, prompt), StopStrings(stops)
    for token in tokens:
        if text := gate.push(decoder.push(token)):
            yield text
        if gate.found:
            return
    if text := gate.flush():
        yield text
