"""Text and tokens: tokenizer, chat template, streaming detokenizer, stop strings."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from mllm_edge.errors import BundleError, PromptError
from mllm_edge.runtime.foreign import pass_on
from mllm_edge.runtime.prompt.sandbox import Sandbox
from mllm_edge.spec import GenerationSpec

__all__ = ["ChatTemplate", "StopStrings", "StreamDecoder", "Tokenizer"]


class Tokenizer:
    """The bundle's tokenizer.json with padding and truncation switched off.

    Attributes: `bos_token` (str or None), `named_tokens` (those that have a name, such as eos_token, and those that end
    an answer), `added_tokens` (id → text of every added token, special or not), `special_ids` and
    `special_tokens` (which `decode` skips), `decoder_kinds` (the steps that turn token spellings into text, in order).
    """

    def __init__(self, core: tokenizers.Tokenizer, generation: GenerationSpec):
        core.no_padding()
        core.no_truncation()
        self._core = core
        self._add_special_tokens = generation.add_special_tokens
        self.bos_token = generation.special_tokens.get("bos_token")
        stops = (core.id_to_token(i) for i in generation.eos_token_ids if 0 <= i < 1 << 31)
        self.named_tokens = tuple(token for token in (*generation.special_tokens.values(), *stops) if token)
        added = core.get_added_tokens_decoder()
        self.added_tokens: dict[int, str] = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = frozenset(token.content for token in added.values() if token.special)
        # The state of the decoder alone: writing out the whole tokenizer takes a second with a large vocabulary.
        decoder = core.decoder and json.loads(core.decoder.__getstate__())
        self.decoder_kinds: tuple[str, ...] = tuple(_flat_decoder_kinds(decoder)) if decoder else ()

    @classmethod
    def load(cls, bundle_dir: Path, generation: GenerationSpec, file: str = "tokenizer.json") -> Tokenizer:
        """Read `bundle_dir`/`file`. Raises BundleError when it is missing or damaged."""
        path = Path(bundle_dir) / file
        text = _read_text(path)
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            pass_on(error)
            raise BundleError(f"{path}: not a tokenizer ({error})", "export the bundle again") from error
        return cls(core, generation)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of `text`; special tokens are added around it as generation.json says, or as given.

        Raises PromptError when `text` is not valid Unicode (lone surrogates).
        """
        add = self._add_special_tokens if add_special_tokens is None else add_special_tokens
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}", "replace lone surrogates") from error
        return self._core.encode(text, add_special_tokens=add).ids

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that the vocabulary does not have are left out."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of `token`, or None when the vocabulary does not have it."""
        return self._core.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of `token_id`, or None when there is no such id."""
        return self._core.id_to_token(token_id)

    def token_bytes(self, size: int) -> list[bytes] | None:
        """What each of the ids below `size` adds to a text, as UTF-8 that may begin or end within a character; of an
        added token its name, of an id that there is not nothing. None where tokens are not pieces of text.

        A decoder that strips a text's first blank does so afterwards.
        """
        kinds = set(self.decoder_kinds) - {"Fuse"}
        if kinds == {"ByteLevel"}:
            plain = _byte_level_bytes
        elif kinds and kinds <= _PIECES:
            plain = _piece_bytes if "ByteFallback" in kinds else _piece_text
        else:
            return None
        table = [b""] * size
        for token, i in self._core.get_vocab(with_added_tokens=True).items():
            if i < size:
                table[i] = token.encode() if i in self.added_tokens else plain(token)
        return table


def _flat_decoder_kinds(decoder: Mapping[str, Any]) -> list[str]:
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [kind for step in decoder["decoders"] for kind in _flat_decoder_kinds(step)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error})", "export the bundle again") from error


# ---------------------------------------------------------------- chat template
# A message's reasoning has several names; the first is the one that most templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its empty keys, its reasoning under each name that templates know."""
    told = {key: value for key, value in message.items() if value is not None}
    reasoning = next((told[name] for name in _REASONING if name in told), None)
    return told if reasoning is None else {"thinking": reasoning, **told, "reasoning_content": reasoning}


class ChatTemplate:
    """The bundle's chat_template.jinja, rendered in a sandbox as transformers renders it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        """`special_tokens` (bos_token, …) are variables of the template. Raises BundleError for bad syntax."""
        environment = Sandbox()
        self._special_tokens = dict(special_tokens or {})
        self._source, self._environment = source, environment
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"chat template, line {error.lineno}: {error.message}", "export the bundle again"
            ) from error

    @classmethod
    def load(cls, bundle_dir: Path, generation: GenerationSpec) -> ChatTemplate:
        """Read `bundle_dir`/chat_template.jinja. Raises BundleError when it is missing or not a template."""
        return cls(_read_text(Path(bundle_dir) / "chat_template.jinja"), generation.special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of `messages`, which are plain JSON values; `variables` reach the template by name.

        Raises PromptError when the template rejects the messages or fails on them.
        """
        values = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            told = [_as_templates_expect(message) for message in messages]
            given = {"messages": told, "add_generation_prompt": add_generation_prompt, **values}
            return self._environment.render(self._template, given)
        except Exception as error:  # a template can fail like any program: TypeError, ZeroDivisionError, …
            pass_on(error)
            raise PromptError(
                f"the chat template rejects these messages: {error}", "check the roles, their order and the contents"
            ) from error

    def written_text(self) -> str:
        """All that the template itself may write: its literals, and a rendered turn of each role, for tokens that it
        puts together from pieces."""
        tree = self._environment.parse(self._source)
        texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        texts += [str(node.value) for node in tree.find_all(jinja2.nodes.Const)]
        for role in ("system", "user", "assistant"):
            turns = [{"role": "user", "content": _PROBE}, {"role": role, "content": _PROBE}]
            texts += [self._try_messages(turns), self._try_messages([{**turn, "content": [_ENTRY]} for turn in turns])]
        return "\0".join(texts)

    def accepts_lists(self, image_token: str | None) -> bool:
        """Whether a message's content may be a list of entries; with `image_token`, of image entries too."""
        content: list[dict[str, str]] = [_ENTRY]
        if image_token is not None:
            content.insert(0, {"type": "image"})
        text = self._try(content)
        # A template written for strings prints the list itself, quotes and all.
        printed = "'type'" in text or '"type"' in text
        return _PROBE in text and not printed and (image_token is None or text.count(image_token) == 1)

    def accepts_strings(self) -> bool:
        """Whether a message's content may be a plain string."""
        return _PROBE in self._try(_PROBE)

    def _try(self, content: Any) -> str:
        return self._try_messages([{"role": "user", "content": content}])

    def _try_messages(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self.render(messages)
        except PromptError as error:
            if error.__cause__ is not None:
                # Jinja's leads back to its own error: all frames around would stay until garbage is collected.
                error.__cause__.__traceback__ = None
            return ""


_PROBE = "probe of the contents"
_ENTRY = {"type": "text", "text": _PROBE}


# ---------------------------------------------------------------- streaming
class StreamDecoder:
    """Incremental detokenizer: all that `push` and the final `flush` return, joined, equals `decode` of all ids.

    Text is returned as soon as later tokens cannot change it, so half a UTF-8 character is never seen. The cost of a
    token does not grow with the length of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        kinds = tokenizer.decoder_kinds
        self._stream = _Utf8Stream() if kinds == ("ByteLevel",) else _WindowStream(tokenizer, kinds)

    def push(self, token_id: int) -> str:
        """Add one token; the text that is now final, often empty."""
        token_id = int(token_id)
        if token_id in self._skipped:
            return ""
        token = self._tokenizer.token(token_id)
        return "" if token is None else self._stream.push(token_id, token)

    def flush(self) -> str:
        """The rest at the end of the answer; an unfinished character becomes U+FFFD. Then a new text can begin."""
        return self._stream.flush()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character: itself where it is printable, else U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


_BYTE_CODES = {ord(character): byte for character, byte in _BYTES.items()}
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Steps of decoders for which a token is a piece of the text, with U+2581 for a blank, or "<0xHH>" for a byte.
_PIECES = {"ByteFallback", "Metaspace", "Replace", "Strip"}


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_BYTE_CODES).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _piece_text(token: str) -> bytes:
    return token.replace("\u2581", " ").encode()


def _piece_bytes(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if _BYTE_PIECE.fullmatch(token) else _piece_text(token)


class _Utf8Stream:
    """Byte-level tokens: every token is bytes, and the text is their UTF-8 decoding."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, token: str) -> str:
        try:
            data = bytes([_BYTES[character] for character in token])
        except KeyError:  # an added token that is spelled as plain text
            data = token.encode()
        return self._utf8.decode(data)

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _WindowStream:
    """Any other tokenizer: decode a short window, return what the new tokens add to it.

    `_context` are tokens whose text was returned already; they give the new ones their surroundings (a decoder may
    strip the first space of what it decodes, or join words with spaces). `_pending` are tokens that wait.
    """

    def __init__(self, tokenizer: Tokenizer, kinds: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_level = "ByteLevel" in kinds
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        # A run of byte tokens is decoded as one: a later bad byte turns the whole run into U+FFFD.
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text = self._added_text()
        if self._byte_level and text.endswith("\ufffd"):
            return ""
        self._commit()
        return text

    def flush(self) -> str:
        text = self._added_text() if self._pending else ""
        self._context, self._pending = [], []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _added_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _commit(self) -> None:
        window = self._context + self._pending
        # The shortest end of the window with text of its own: what a decoder strips at a beginning is stripped there.
        size = 1
        while size < len(window) and not self._decode(window[-size:]):
            size += 1
        self._context, self._pending = window[-size:], []


class StopStrings:
    """Ends a streamed text before the first of some stop strings, wherever the pieces are cut.

    The stop string that is complete first wins; of two that end together, the longer one.
    """

    def __init__(self, stops: Iterable[str] = ()):
        """Raises ValueError for an empty stop string or one that is not a string."""
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop: {stop!r} is not a non-empty string")
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to precede any stop string; after a match always empty."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = len(text) - self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back, when no stop string came."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
