"""Answers that a guide allows. llguidance (extra `[guidance]`) follows the guide; this file alone knows it, and imports
it when the first such answer is asked for.

It is given the vocabulary as bytes, and tells behind each token which may follow (github.com/guidance-ai/llguidance).
The vocabulary is made of the bundle's tokenizer as it is open already: one of 140,000 tokens takes 28 MB more when
llguidance makes it of the file, and byte-level and byte-fallback tokenizers are all that it reads.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import BackendError, BundleError, OptionError
from mllm_edge.install import install_hint
from mllm_edge.runtime.decode.guide import Guide
from mllm_edge.runtime.decode.schema_parts import failing_part, parts_of
from mllm_edge.runtime.prompt.control_tokens import continued
from mllm_edge.runtime.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Guided", "Guides"]

# As json.dumps writes it, and models have seen it most: with one spelling there is less to choose and more to guess,
# and no answer is all blanks. A schema's own "x-guidance" may say otherwise.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What models write before an answer, and what is no part of it.
_LEAD = 'start: (" " | "\\n" | "\\n\\n")? @answer'
_OF_NUMBERS = ("type", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KEPT = 8  # guides that a model keeps ready
_PROBE = 'Probe: {"a1": [1, -2.5]}\n'


@dataclass(frozen=True, eq=False)
class _Ready:
    """A guide before its first token. `lead`: the whitespace before the answer is no part of it."""

    matcher: "LLMatcher"
    lead: bool


class Guides:
    """The guides of one model, whose logits have `vocab_size` tokens; the last ones are kept ready. For any number of
    threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._ready: OrderedDict[Guide, _Ready] = OrderedDict()

    def start(self, guide: Guide, stop_ids: Collection[int]) -> "Guided":
        """The guide for one answer, which `stop_ids` end. Raises OptionError for a guide that no answer can follow,
        BackendError where llguidance is missing, BundleError for a tokenizer whose tokens are not pieces of text."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._size)
            ready = self._ready.pop(guide, None) or _made(guide, self._vocabulary)
            self._ready[guide] = ready
            if len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
            return Guided(guide.kind, ready, self._size, stop_ids)


class Guided:
    """Follows a guide along one answer; see `Constraint`. The end is allowed where the guide's text may end."""

    def __init__(self, kind: str, ready: _Ready, vocab_size: int, stop_ids: Collection[int]):
        self._kind, self.lead = kind, ready.lead
        self._matcher = ready.matcher.deep_copy()
        self._stop_ids, self._size = frozenset(stop_ids), vocab_size
        # One bit a token, and one for the end, which is a token of llguidance's own.
        bits = np.zeros(-(-(vocab_size + 1) // 32), np.int32)
        self._bits, self._place, self._nbytes = bits.view(np.uint8), bits.ctypes.data, bits.nbytes
        self._allowed: np.ndarray | None = None
        self._forced: list[int] | None = None

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allows(self, token: int) -> bool:
        if token in self._stop_ids:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> np.ndarray:
        if self._allowed is None:
            self._matcher.unsafe_compute_mask_ptr(self._place, self._nbytes)
            self._require_no_error()
            bits = np.unpackbits(self._bits, count=self._size + 1, bitorder="little").view(bool)
            self._allowed, end = bits[:-1], bool(bits[-1])
            for token in self._stop_ids:
                self._allowed[token] = end
            if not end and not self._allowed.any():
                raise self._stuck("no token of the vocabulary may come next, and the answer may not end")
        return self._allowed

    def observe(self, token: int) -> None:
        if token in self._stop_ids:
            return
        self._allowed = None
        self._forced = (self._forced[1:] or None) if self._forced and self._forced[0] == token else None
        if not self._matcher.consume_token(token):
            self._require_no_error()

    def forced(self) -> Sequence[int]:
        if self._forced is None:
            tokens = [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()
            stop = next((i for i, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
            # A tokenizer may write a text otherwise where it stands alone.
            self._forced = tokens[: self.possible(tokens[:stop])]
        return self._forced

    def possible(self, tokens: list[int]) -> int:
        return self._matcher.validate_tokens(tokens) if tokens else 0

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            why = _first_line(self._matcher.get_error())
            raise self._stuck("no text may come next" if why.startswith("NoExtension") else why)

    def _stuck(self, why: str) -> OptionError:
        return OptionError(
            f"the answer cannot go on as {self._kind} wants it: {why}",
            "make it simpler, with bounds on lengths; and let no stop id be a token that it needs",
        )


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """What llguidance knows of a model's tokens, and which of them, [V] bool, begin with a blank or a line break
    (`begins_blank`), or are nothing else (`blank`)."""

    known: "LLTokenizer"
    begins_blank: np.ndarray
    blank: np.ndarray

    def matcher(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        return LLMatcher(self.known, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))

    def first(self, matcher: "LLMatcher") -> np.ndarray:
        """Which tokens may come first, [V] bool."""
        try:
            return Guided("", _Ready(matcher, False), len(self.blank), ()).allowed()
        except OptionError:
            return np.zeros(len(self.blank), bool)


class _Tokens:
    """What llguidance asks of a tokenizer. Without an end of its own, it adds one behind the last token."""

    eos_token_id = bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]):
        self._tokenizer, self.tokens = tokenizer, tokens
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < len(tokens))

    def __call__(self, text: bytes) -> list[int]:
        ids = continued(self._tokenizer, text.decode())
        return ids if all(i < len(self.tokens) for i in ids) else []


def _vocabulary(tokenizer: Tokenizer, size: int) -> _Vocabulary:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise BackendError(
            f"answers by schema, regex, choices or grammar need llguidance ({error})", install_hint("guidance")
        ) from error
    tokens = tokenizer.token_bytes(size)
    if tokens is None or not _agrees(tokenizer, tokens):
        steps = ", ".join(tokenizer.decoder_kinds) or "none"
        raise BundleError(
            f"this model's tokenizer does not tell what text a token is (its decoder: {steps}), so no answer can be "
            "guided",
            "ask without schema, regex, choices and grammar",
        )
    known = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, tokens)))
    begins = np.array([token.startswith((b" ", b"\n")) for token in tokens])
    return _Vocabulary(known, begins, np.array([not token.strip(b" \n") for token in tokens]))


def _agrees(tokenizer: Tokenizer, tokens: list[bytes]) -> bool:
    """Whether the bytes of a text's tokens are what the tokenizer itself makes of them, but for a blank before it."""
    ids = [i for i in tokenizer.encode(_PROBE, False) if i < len(tokens) and i not in tokenizer.special_ids]
    return b"".join(tokens[i] for i in ids).decode(errors="replace").lstrip() == tokenizer.decode(ids).lstrip()


def _made(guide: Guide, vocabulary: _Vocabulary) -> _Ready:
    grammar = _grammar(guide)
    plain = vocabulary.matcher(grammar)
    if plain.is_error():
        raise _refused(guide, plain.get_error(), vocabulary)
    if guide.kind == "schema":
        _require_multiples(json.loads(guide.text), vocabulary)
    if (vocabulary.first(plain) & vocabulary.begins_blank).any():
        return _Ready(plain, False)
    lead = vocabulary.matcher(_with_lead(grammar))
    if not plain.is_accepting() and not (vocabulary.first(lead) & ~vocabulary.blank).any():
        what = f"{guide.kind}: there is no text that it allows and this model's tokens can begin"
        raise OptionError(what, _FIXES[guide.kind])
    return _Ready(lead, True)


def _require_multiples(schema: dict[str, Any], vocabulary: _Vocabulary) -> None:
    """llguidance 1.6 writes no negative multiples, and takes a schema that has no others."""
    for place, part in parts_of(schema):
        if "multipleOf" in part:
            alone = {key: value for key, value in part.items() if key in _OF_NUMBERS}
            matcher = vocabulary.matcher(_grammar(Guide("schema", json.dumps(alone))))
            if not matcher.is_error() and not vocabulary.first(matcher).any():
                what = f"schema, at {place}: with multipleOf no negative numbers can be written"
                raise OptionError(what, "leave multipleOf out, or allow numbers from 0 on")


def _grammar(guide: Guide) -> str:
    """The guide as llguidance takes it, JSON. Raises OptionError for a schema with settings that it does not take."""
    from llguidance import LLMatcher

    if guide.kind == "schema":
        try:
            return LLMatcher.grammar_from_json_schema(guide.text, defaults=_JSON)
        except ValueError as error:
            raise OptionError(f"schema: {error}", "correct it") from None
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.text)
    text = guide.text
    if guide.kind == "choices":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        text = f"start: CHOICE\nCHOICE: {choices}\n"
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _with_lead(grammar: str) -> str:
    """The grammar behind some whitespace."""
    parts = json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": _LEAD}, {**parts[0], "name": "answer"}, *parts[1:]]})


def _refused(guide: Guide, message: str, vocabulary: _Vocabulary) -> OptionError:
    def error_of(schema: str) -> str:
        try:
            return vocabulary.matcher(_grammar(Guide("schema", schema))).get_error()
        except OptionError as error:
            return error.message

    place = ""
    if guide.kind == "schema":
        at, message = failing_part(json.loads(guide.text), message, error_of)
        place = f", at {at}"
    return OptionError(f"{guide.kind}{place}: {_first_line(message)}", _FIXES[guide.kind])


_FIXES = {
    "schema": "leave out or change what stands there; llguidance's list of what it takes: "
    "github.com/guidance-ai/llguidance, docs/json_schema.md",
    "regex": "write it as Rust's regex library reads it: no look-around, no back references",
    "choices": "give shorter or fewer choices",
    "grammar": "see github.com/guidance-ai/llguidance, docs/syntax.md",
}


def _first_line(message: str) -> str:
    """An error's message on one line, without what stands for the state that is not told."""
    return " ".join(message.partition("<non-verbose/>")[0].split())
