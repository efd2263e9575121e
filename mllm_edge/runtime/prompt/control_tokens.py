"""A user's text that spells a control token stays text.

Control tokens are those that the chat template writes (where a turn begins and ends), those that end an answer, and
those that stand for images. Typed by a user they would end the turn, or ask for an image that is not there. So they are
marked before the template is rendered; the rendered prompt is cut at the marks, its pieces are tokenized apart, and the
ids are joined. A prompt without such text has one piece, and the ids that transformers gives; here the two differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_edge.errors import PromptError

__all__ = ["ControlTokens", "Marks", "Piece", "continued", "encode_pieces"]

# Unicode's noncharacters: no text holds them, and no template looks for them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Marks:
    """Characters that stand before and behind a user's control token, and where a user's text ends."""

    start: str
    end: str
    edge: str


@dataclass(frozen=True)
class Piece:
    """Text that is tokenized by itself. `spelled`: a control token's name, and not the token."""

    text: str
    spelled: bool = False


class _Encoder(Protocol):
    added_tokens: dict[int, str]

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]: ...


class ControlTokens:
    """Finds `tokens` in the strings of a conversation, and in what a template made of them.

    `answered`: those of them that the model itself writes as text of its answers, such as "<think>"; in an answer that
    is given back to it they are what they were.
    """

    def __init__(self, tokens: Iterable[str], answered: Iterable[str] = ()):
        self._answered = frozenset(answered)
        self._tokens = tuple(sorted({t for t in tokens if not t.isspace() and len(t) > 1}, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        # Beginnings and ends of them: two texts, or a text and the template, may make a token together.
        self._heads = tuple({token[:i] for token in self._tokens for i in range(1, len(token))})
        self._tails = tuple({token[i:] for token in self._tokens for i in range(1, len(token))})

    def inside(self, text: str) -> list[str]:
        """The control tokens that `text` spells, in order."""
        return self._pattern.findall(text)

    def mark(self, conversation: Sequence[Any]) -> tuple[Sequence[Any], Marks | None]:
        """The conversation with marks around every control token in it, and at ends of texts that could become part of
        one; None where nothing had to be marked. Values of the keys "role" and "type" are left alone.

        Raises PromptError when no mark is free."""
        texts = list(_strings(conversation))
        if not any(self._risky(text) for text in texts):
            return conversation, None
        free = [c for c in _NONCHARACTERS if not any(c in text for text in texts)]
        if len(free) < 3:
            raise PromptError("the messages hold Unicode's noncharacters", "remove U+FDD0 to U+FDEF from the text")
        marks = Marks(*free[:3])
        return [self._mark_message(message, marks) for message in conversation], marks

    def pieces(self, text: str, marks: Marks | None) -> tuple[Piece, ...]:
        """A rendered text cut where a user's text spells a control token, or would make one with its neighbour."""
        if marks is None:
            return (Piece(text),)
        lone = f"[{marks.start}{marks.end}{marks.edge}]"
        first, *rest = re.split(f"{marks.start}({self._pattern.pattern}){marks.end}|{lone}", text)
        pieces = [Piece(first)]
        for token, after in zip(rest[::2], rest[1::2], strict=True):
            if token is not None:
                pieces += [Piece(token, spelled=True), Piece(after)]
            elif self._crosses(pieces[-1].text, after):
                pieces.append(Piece(after))
            else:
                pieces[-1] = Piece(pieces[-1].text + after)
        return tuple(piece for piece in pieces if piece.text) or (Piece(""),)

    def _risky(self, text: str) -> bool:
        return bool(self._pattern.search(text)) or text.endswith(self._heads) or text.startswith(self._tails)

    def _mark_message(self, message: Any, marks: Marks) -> Any:
        kept = self._answered if message["role"] == "assistant" else frozenset()
        return _mapped(message, lambda text: self._marked(text, marks, kept))

    def _marked(self, text: str, marks: Marks, kept: frozenset[str]) -> str:
        def around(found: re.Match[str]) -> str:
            return found[0] if found[0] in kept else f"{marks.start}{found[0]}{marks.end}"

        marked = self._pattern.sub(around, text)
        head = marks.edge if text.startswith(self._tails) else ""
        return head + marked + (marks.edge if text.endswith(self._heads) else "")

    def _crosses(self, before: str, after: str) -> bool:
        """Whether a control token would lie across the end of `before`."""
        longest = len(self._tokens[0]) if self._tokens else 0
        start = max(0, len(before) - longest + 1)
        window, cut = before[start:] + after[: longest - 1], len(before) - start
        return any(found.start() < cut < found.end() for found in self._pattern.finditer(window))


def encode_pieces(tokenizer: _Encoder, pieces: Sequence[Piece], add_special_tokens: bool | None) -> list[int]:
    """Ids of the pieces, joined; spelled ones are written by other tokens than the one they name.

    Raises PromptError when a piece has no other spelling.
    """
    if len(pieces) == 1 and not pieces[0].spelled:
        return tokenizer.encode(pieces[0].text, add_special_tokens)
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        ids += (_spelled if piece.spelled else _plain)(tokenizer, piece.text, i > 0)
    # What is added around a whole prompt, found on one that is nothing else.
    probe, bare = tokenizer.encode("a", add_special_tokens), tokenizer.encode("a", False)
    at = next((i for i in range(len(probe)) if probe[i : i + len(bare)] == bare), 0)
    return [*probe[:at], *ids, *probe[at + len(bare) :]]


def continued(tokenizer: _Encoder, text: str) -> list[int]:
    """Ids of a text that goes on with another."""
    return _plain(tokenizer, text, True)


def _plain(tokenizer: _Encoder, text: str, inside: bool) -> list[int]:
    """Ids of a piece; `inside` a prompt it is encoded behind a line break, since SentencePiece puts a blank before the
    beginning of a text."""
    if inside:
        newline, ids = tokenizer.encode("\n", False), tokenizer.encode("\n" + text, False)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
    return tokenizer.encode(text, False)


def _spelled(tokenizer: _Encoder, token: str, inside: bool) -> list[int]:
    """Ids that spell an added token and are none: it is cut where no part of it is one."""
    for cut in range(1, len(token)):
        ids = [*_plain(tokenizer, token[:cut], inside), *_plain(tokenizer, token[cut:], True)]
        if not any(i in tokenizer.added_tokens for i in ids):
            return ids
    raise PromptError(
        f"the text contains {token!r}, which this model's tokenizer cannot write as text", "remove it from the text"
    )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key not in ("role", "type"):
                yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: v if k in ("role", "type") else _mapped(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, change) for entry in value]
    return value
