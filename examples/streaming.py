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


class _Stop:
    """A stop string that is looked for in a text that comes in pieces, by Knuth, Morris and Pratt (1977).

    Attributes:
        text: the stop string.
        matched: how many of its first characters the text so far ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._borders = [0]  # of each beginning of `text`, the longest shorter one that it ends with
        for character in text[1:]:
            self._borders.append(self._next(self._borders[-1], character))

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)

    def read(self, piece: str) -> int:
        """How many characters of the piece were read when the stop string was complete, or 0."""
        for count, character in enumerate(piece, 1):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self.text):
                return count
        return 0


class StopStrings:
    """Lets text through up to the first of the stop strings; what may be the beginning of one is held back.

    Attributes:
        found: whether a stop string has come: there is no more text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        held = self._held + piece
        ends = [(stop, end) for stop in self._stops if (end := stop.read(piece))]
        if ends:
            self.found, known, self._held = True, len(self._held), ""
            return held[: min(known + end - len(stop.text) for stop, end in ends)]
        keep = max((stop.matched for stop in self._stops), default=0)
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
