"""Answers that a guide allows. llguidance (extra `[guidance]`) follows the guide; this file alone knows it, and imports
it when the first such answer is asked for.

It is given the vocabulary as bytes, and tells behind each token which may follow (github.com/guidance-ai/llguidance).
The vocabulary is made of the bundle's tokenizer as it is open already: one of 140,000 tokens takes 28 MB more when
llguidance makes it of the file, and byte-level and byte-fallback tokenizers are all that it reads.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import BackendError, BundleError, OptionError
from mllm_edge.install import install_hint
from mllm_edge.runtime.decode.guide import Guide
from mllm_edge.runtime.decode.schema_parts import failing_part
from mllm_edge.runtime.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Guided", "Guides"]

# As json.dumps writes it, and models have seen it most: with one spelling there is less to choose and more to guess,
# and no answer is all blanks. A schema's own "x-guidance" may say otherwise.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What models write before an answer, and what is no part of it.
_LEAD = 'start: (" " | "\\n" | "\\n\\n")? @answer'
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
        self._vocabulary: LLTokenizer | None = None
        self._ready: OrderedDict[Guide, _Ready] = OrderedDict()

    def start(self, guide: Guide, stop_ids: Collection[int]) -> "Guided":
        """The guide for one answer, which `stop_ids` end. Raises OptionError for a guide that no answer can follow,
        BackendError where llguidance is missing, BundleError for a tokenizer whose tokens are not pieces of text."""
        with self._lock:
            ready = self._ready.pop(guide, None) or self._made(guide)
            self._ready[guide] = ready
            if len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
            return Guided(guide.kind, ready, self._size, stop_ids)

    def _made(self, guide: Guide) -> _Ready:
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._size)
        grammar = _grammar(guide)
        plain = _matcher(self._vocabulary, grammar)
        if plain.is_error():
            raise _refused(guide, plain.get_error(), lambda text: _error_of(self._vocabulary, text))
        if not plain.is_accepting():
            self._require_a_beginning(guide, plain)
        if any(plain.validate_tokens(self._vocabulary.tokenize_str(blank)) for blank in (" ", "\n")):
            return _Ready(plain, False)
        return _Ready(_matcher(self._vocabulary, _with_lead(grammar)), True)

    def _require_a_beginning(self, guide: Guide, matcher: "LLMatcher") -> None:
        try:
            Guided(guide.kind, _Ready(matcher, False), self._size, ()).allowed()
        except OptionError as error:
            raise OptionError(
                f"{guide.kind}: there is no text that it allows and this model's tokens can begin", _FIXES[guide.kind]
            ) from error


class Guided:
    """Follows a guide along one answer; see `Constraint`. The end is allowed where the guide's text may end."""

    def __init__(self, kind: str, ready: _Ready, vocab_size: int, stop_ids: Collection[int]):
        self._kind, self.lead = kind, ready.lead
        self._matcher = ready.matcher.deep_copy()
        self._stop_ids, self._stops = frozenset(stop_ids), np.array([*stop_ids], np.int64)
        self._size = vocab_size
        # One bit a token, and one for the end, which is a token of llguidance's own.
        self._bits = np.zeros(-(-(vocab_size + 1) // 32), np.int32)
        self._allowed: np.ndarray | None = None

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allows(self, token: int) -> bool:
        if token in self._stop_ids:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> np.ndarray:
        if self._allowed is None:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self._require_no_error()
            bits = np.unpackbits(self._bits.view(np.uint8), count=self._size + 1, bitorder="little").view(bool)
            self._allowed, end = bits[:-1], bits[-1]
            self._allowed[self._stops] = end
            if not self._allowed.any() and not end:
                raise self._stuck("no token of the vocabulary may come next, and the answer may not end")
        return self._allowed

    def observe(self, token: int) -> None:
        if token not in self._stop_ids:
            self._allowed = None
            if not self._matcher.consume_token(token):
                self._require_no_error()

    def forced(self) -> list[int]:
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

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


class _Vocabulary:
    """What llguidance asks of a tokenizer. Without an end of its own, it adds one behind the last token."""

    eos_token_id = bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]):
        self._tokenizer, self.tokens = tokenizer, tokens
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < len(tokens))

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(), False)


def _vocabulary(tokenizer: Tokenizer, size: int) -> "LLTokenizer":
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
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, tokens)))


def _agrees(tokenizer: Tokenizer, tokens: list[bytes]) -> bool:
    """Whether the bytes of a text's tokens are what the tokenizer itself makes of them, but for a blank before it."""
    ids = [i for i in tokenizer.encode(_PROBE, False) if i < len(tokens) and i not in tokenizer.special_ids]
    return b"".join(tokens[i] for i in ids).decode(errors="replace").lstrip() == tokenizer.decode(ids).lstrip()


def _matcher(vocabulary: "LLTokenizer", grammar: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


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


def _error_of(vocabulary: "LLTokenizer | None", schema: str) -> str:
    """What llguidance has against a schema; empty: nothing."""
    assert vocabulary is not None
    try:
        return _matcher(vocabulary, _grammar(Guide("schema", schema))).get_error()
    except OptionError as error:
        return error.message


def _refused(guide: Guide, message: str, error_of: Callable[[str], str]) -> OptionError:
    if guide.kind != "schema":
        return OptionError(f"{guide.kind}: {_first_line(message)}", _FIXES[guide.kind])
    place, message = failing_part(json.loads(guide.text), message, error_of)
    return OptionError(f"schema, at {place}: {_first_line(message)}", _FIXES["schema"])


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
