"""Answers that a guide allows: JSON of a schema, a regular expression's, one of some texts, a grammar's; thinking that
has an end, and tokens that end an answer. A model with random weights wants none of it by itself."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken

from benchmarks.json_schemas import random_schema
from mllm_edge import VLM
from mllm_edge.errors import BackendError, BundleError, ContextError, OptionError
from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.guide import Guide, guide_of
from mllm_edge.runtime.decode.guided import Guides
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.schema_parts import failing_part
from mllm_edge.runtime.decode.thinking import Thinking, ThinkingTokens, thinking_tokens
from mllm_edge.runtime.decode.token_rules import TokenRules
from mllm_edge.runtime.prompt.tokenizer import Tokenizer
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import GenerationDefaults
from tests.runtime import reference

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "text": {"type": "string", "maxLength": 8},
    },
    "required": ["shape", "count", "text"],
    "additionalProperties": False,
}
ASKED = "What is there to see?"
END = "<global-img>"  # of the tiny model's added tokens one that is no text


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> Iterator[VLM]:
    with VLM.load(tiny_bundle, backend="cpu") as vlm:
        yield vlm


# ---------------------------------------------------------------- what comes out
@pytest.mark.parametrize("seed", range(20))
def test_answers_are_json_of_the_schema(vlm: VLM, seed: int) -> None:
    schema = random_schema(seed)
    result = vlm.generate(ASKED, schema=schema, max_new_tokens=600, temperature=float(seed % 2), seed=seed)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), schema)


@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]{2}-[a-f]{3}", r" yes| no", r"(red|red ones|blue)!?", r"\n\n[a-c]{4}", r"[äöü🙂]{3}", r"^a/b$", r""],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_answer_matches(vlm: VLM, pattern: str, temperature: float) -> None:
    result = vlm.generate(ASKED, regex=pattern, temperature=temperature, seed=1, max_new_tokens=40)
    assert result.finish_reason == "stop"
    assert re.fullmatch(pattern, result.text), result.text
    assert vlm.tokenizer.decode(result.token_ids).strip(" \n") == result.text.strip(" \n")


def test_the_answer_is_one_of_the_choices(vlm: VLM) -> None:
    choices = ['two "circles"', "a\nb\\", "ünï 🙂", "two", "<image>"]
    found = {vlm.generate(ASKED, choices=choices, temperature=3.0, seed=seed).text for seed in range(25)}
    assert found == set(choices)
    assert vlm.chat().ask(ASKED, choices=["one"]).__next__().text


def test_a_grammar(vlm: VLM) -> None:
    grammar = 'start: word ("," word)~2\nword: "left" | "right" | /u+p/\n'
    for seed in range(4):
        text = vlm.generate(ASKED, grammar=grammar, temperature=1.5, seed=seed, max_new_tokens=200).text
        assert re.fullmatch(r"(left|right|u+p)(,(left|right|u+p)){2}", text)
    with_json = 'start: "x=" %json {"type": "boolean"}'
    assert vlm.generate(ASKED, grammar=with_json).text in ("x=true", "x=false")


class Described:
    """As pydantic's models are."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


def test_a_schema_in_any_form(vlm: VLM) -> None:
    forms: list[Any] = [SCHEMA, json.dumps(SCHEMA), Described, Described()]
    assert len({vlm.generate(ASKED, schema=form).text for form in forms}) == 1
    other = {**SCHEMA, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert '{"shape":"' in vlm.generate(ASKED, schema=other).text


def test_conversations_are_guided_turn_by_turn(vlm: VLM) -> None:
    chat = vlm.chat()
    for schema, options in ((SCHEMA, {}), (None, {"choices": ["yes", "no"]}), (SCHEMA, {})):
        text = "".join(piece.text for piece in chat.ask(ASKED, schema=schema, **options))
        if schema:
            jsonschema.validate(json.loads(text), schema)
        else:
            assert text in ("yes", "no")
    assert chat.turns == 3


# ---------------------------------------------------------------- beside other options
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}])
def test_speculation_says_the_same(vlm: VLM, options: dict[str, Any]) -> None:
    asked = 'Say {"shape": "circle", "count": 12, "text": "abcabc"} again.'
    plain = vlm.generate(asked, schema=SCHEMA, **options)
    guessed = vlm.generate(asked, schema=SCHEMA, speculation=8, **options)
    assert guessed.token_ids == plain.token_ids
    jsonschema.validate(json.loads(plain.text), SCHEMA)


def test_what_is_forced_takes_no_step_of_its_own(vlm: VLM) -> None:
    plain = vlm.generate(ASKED, schema=SCHEMA)
    assert plain.metrics.decode_steps < len(plain.token_ids) / 2
    assert plain.metrics.accepted > len(plain.token_ids) / 2
    told = vlm.generate(ASKED, schema=SCHEMA, logprobs=1)
    assert told.token_ids == plain.token_ids
    # One token a step, as where an engine checks no guesses.
    encoded = vlm.encode(vlm.processor.process(ASKED))
    guide = guide_of(SCHEMA, None, None, None)
    assert guide is not None
    guided = Guides(vlm.tokenizer, vlm.spec.vocab_size).start(guide, vlm.stop_ids)
    vlm.decoder.start(encoded, 200)
    sampler = Sampler(SamplingParams(), (), None, guided)
    tokens = list(generate(vlm.decoder, vlm.embed, encoded, sampler, vlm.stop_ids, 200, Trace()))
    assert tuple(tokens) == plain.token_ids


def test_a_seed_repeats_the_answer(vlm: VLM) -> None:
    texts = [vlm.generate(ASKED, regex="[a-z]{12}", temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_scores_are_the_models_own(vlm: VLM) -> None:
    result = vlm.generate(ASKED, choices=["yes", "no"], logprobs=2)
    rows = vlm.score(vlm.encode(vlm.processor.process(ASKED)), np.array(result.token_ids)).astype(np.float64)
    logs = (
        rows
        - np.log(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - rows.max(axis=1, keepdims=True)
    )
    expected = logs[np.arange(len(rows)), list(result.token_ids)]
    np.testing.assert_allclose([score.logprob for score in result.logprobs], expected, atol=1e-4)


def test_rules_give_way_where_they_would_leave_nothing() -> None:
    guides = Guides(reference.host_tokenizer(reference.byte_level_bpe()), 700)
    rules = TokenRules(GenerationDefaults(no_repeat_ngram_size=1), (), (2,))
    sampler = Sampler(SamplingParams(), (), rules, guides.start(Guide("regex", "(x|y)zzz?"), (2,)))
    tokens = [sampler.sample(np.zeros(700, np.float32)) for _ in range(3)]
    text = reference.host_tokenizer(reference.byte_level_bpe()).decode(tokens)
    assert re.fullmatch("(x|y)zz", text.strip())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.5, "top_k": 5, "min_p": 0.1}]
)
def test_the_largest_logits_are_enough_where_they_are_allowed(options: dict[str, Any]) -> None:
    guides = Guides(reference.host_tokenizer(reference.byte_level_bpe()), 700)
    random, copied = np.random.default_rng(0), 0

    def whole(logits: np.ndarray) -> np.ndarray:
        nonlocal copied
        copied += 1
        return logits

    for seed in range(6):
        samplers = [
            Sampler(SamplingParams(seed=seed, **options), (), None, guides.start(Guide("regex", "[a-z ]{20}"), (2,)))
            for _ in range(2)
        ]
        for _ in range(8):
            logits = np.round(3 * random.standard_normal(700), 1).astype(np.float32)
            best = np.argsort(-logits, kind="stable")[:200]
            top = TopLogits(logits[best], best.astype(np.int32), float(logits.sum()), lambda row=logits: whole(row))
            assert samplers[0].sample(top) == samplers[1].sample(logits)
    assert copied < 24


# ---------------------------------------------------------------- where it ends
def test_an_answer_that_is_cut_is_a_beginning(vlm: VLM) -> None:
    whole = vlm.generate(ASKED, schema=SCHEMA)
    for most in (1, 7, len(whole.token_ids) - 1):
        cut = vlm.generate(ASKED, schema=SCHEMA, max_new_tokens=most)
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:most])
        assert whole.text.startswith(cut.text)
    full = vlm.generate(ASKED, schema=SCHEMA, max_new_tokens=len(whole.token_ids))
    assert (full.finish_reason, full.text) == ("stop", whole.text)


def test_no_half_a_character_is_left(vlm: VLM) -> None:
    for most in range(1, 5):  # one token a byte
        text = vlm.generate(ASKED, regex="🙂{2}", max_new_tokens=most).text
        assert "🙂🙂".startswith(text)


def test_more_tokens_end_an_answer(vlm: VLM) -> None:
    plain = vlm.generate(ASKED, max_new_tokens=8, ignore_eos=True)
    stop = next(i for i, token in enumerate(plain.token_ids) if token not in plain.token_ids[:i] and i)
    for given in (plain.token_ids[stop], [plain.token_ids[stop]], np.array([plain.token_ids[stop], 1])):
        result = vlm.generate(ASKED, max_new_tokens=8, ignore_eos=True, stop_token_ids=given)
        assert (result.token_ids, result.finish_reason) == (plain.token_ids[:stop], "stop")


def test_a_token_that_ends_comes_where_a_guide_ends(vlm: VLM) -> None:
    stop = vlm.tokenizer.encode("b")[0]
    for speculation in (0, 4):
        result = vlm.generate(ASKED, regex="aa?", stop_token_ids=stop, speculation=speculation)
        assert result.text in ("a", "aa")
    with pytest.raises(OptionError, match="cannot go on as regex wants it"):
        vlm.generate(ASKED, regex="ab", stop_token_ids=stop)


# ---------------------------------------------------------------- tokenizers
CORES = {
    "byte level": reference.byte_level_bpe(),
    "byte level and more": reference.byte_level_bpe(more=True),
    "byte fallback": reference.byte_fallback_bpe(),
    "metaspace": reference.metaspace_unigram(),
}


def drawn(tokenizer: Tokenizer, guide: Guide, size: int, seed: int) -> str:
    """A text of random logits."""
    stop = size - 1
    guided = Guides(tokenizer, size).start(guide, (stop,))
    sampler, random = Sampler(SamplingParams(temperature=1.0, seed=seed), (), None, guided), np.random.default_rng(seed)
    tokens: list[int] = []
    while not sampler.ended and stop not in tokens:
        tokens.append(sampler.sample(random.standard_normal(size).astype(np.float32)))
    return tokenizer.decode([token for token in tokens if token != stop]).lstrip(" \n")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [(n, "(s+( the| belt){1,2}s)|[你s]+") for n in CORES if n != "metaspace"]
    + [("metaspace", "(你|s+  ?)+s"), ("byte fallback", "[äé你🙂]{3}<tool>")],
)
def test_every_kind_of_tokenizer(name: str, pattern: str) -> None:
    tokenizer = reference.host_tokenizer(CORES[name])
    for seed in range(5):
        text = drawn(tokenizer, Guide("regex", pattern), 700, seed)
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_bytes_of_tokens_are_those_that_llguidance_reads(name: str) -> None:
    """Of the tokens that are text for both."""
    tokenizer, core = reference.host_tokenizer(CORES[name]), CORES[name]
    theirs = LLTokenizer(core.to_str())
    ours = tokenizer.token_bytes(theirs.vocab_size)
    assert ours is not None
    compared = [i for i in range(theirs.vocab_size) if i not in tokenizer.added_tokens and ours[i] != b"\xff"]
    assert len(compared) > 250
    assert [ours[i] for i in compared] == [theirs.decode_bytes([i]) for i in compared]


@pytest.mark.parametrize("size", [297, 200])
def test_logits_and_vocabulary_of_other_sizes(vlm: VLM, size: int) -> None:
    """More logits than tokens, which the tiny model has, or fewer."""
    assert re.fullmatch("[a-f]{9}", drawn(vlm.tokenizer, Guide("regex", "[a-f]{9}"), size, 0))


def test_words_are_no_pieces_of_text() -> None:
    guides = Guides(reference.host_tokenizer(reference.word_piece()), 20)
    with pytest.raises(BundleError, match=r"does not tell what text a token is .* WordPiece"):
        guides.start(Guide("regex", "a"), ())


# ---------------------------------------------------------------- thinking
def test_thinking_has_an_end(vlm: VLM) -> None:
    end = vlm.tokenizer.token_id(END)
    for budget, speculation in ((0, 0), (5, 0), (5, 4)):
        options: dict[str, Any] = {"max_thinking_tokens": budget, "thinking_end": END, "speculation": speculation}
        free = vlm.generate(ASKED, max_new_tokens=9, ignore_eos=True, **options)
        assert free.token_ids.index(end) <= budget
        guided = vlm.generate(ASKED, schema=SCHEMA, max_new_tokens=200, **options)
        at = guided.token_ids.index(end)
        assert at <= budget
        text = vlm.tokenizer.decode(guided.token_ids[at + 1 :])
        jsonschema.validate(json.loads(text), SCHEMA)
        assert guided.finish_reason == "stop"


def thinker() -> Tokenizer:
    core = reference.byte_level_bpe()
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return reference.host_tokenizer(core)


def test_which_tokens_are_around_it() -> None:
    tokenizer = thinker()
    names = {name: i for i, name in tokenizer.added_tokens.items()}
    tokens = thinking_tokens(tokenizer)
    assert tokens == ThinkingTokens(names["<think>"], names["</think>"])
    assert thinking_tokens(reference.host_tokenizer(reference.byte_level_bpe())) is None
    assert thinking_tokens(tokenizer, "<image>") == ThinkingTokens(None, names["<image>"])
    for text, opened in (("a<think>\n", True), ("<think>", True), ("<think>a", False), ("<think></think>", False)):
        assert tokens.opened(tokenizer.encode(text), tokenizer) == opened
    with pytest.raises(OptionError, match="'</x>' is none of"):
        thinking_tokens(tokenizer, "</x>")


@pytest.mark.parametrize("inside", [True, False])
def test_the_guide_begins_behind_it(inside: bool) -> None:
    """Where the prompt has not begun to think, the answer may."""
    tokenizer = thinker()
    tokens = thinking_tokens(tokenizer)
    assert tokens is not None
    guides, random, begun = Guides(tokenizer, 700), np.random.default_rng(0), set[bool]()
    for seed in range(12):
        guided = guides.start(Guide("regex", "[a-c]{3}"), (2,))
        thinking = Thinking(tokens, 4, inside, guided, 700, (2,))
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), None, thinking)
        found: list[int] = []
        while not sampler.ended:
            logits = random.standard_normal(700).astype(np.float32)
            logits[tokens.start] += 0 if found or inside else 5
            found.append(sampler.sample(logits))
        thought = inside or found[0] == tokens.start
        begun.add(thought)
        at = found.index(tokens.end) if thought else -1
        assert at <= 4 + (not inside)
        assert re.fullmatch("[a-c]{3}", tokenizer.decode(found[at + 1 :]).strip())
        assert 2 not in found
    assert begun == ({True} if inside else {True, False})


def test_a_model_that_does_not_think(vlm: VLM) -> None:
    with pytest.raises(OptionError, match="no token that ends a thinking part, such as </think>"):
        vlm.generate(ASKED, max_thinking_tokens=5)


# ---------------------------------------------------------------- errors
def property_of(part: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "array", "items": part}}, "required": ["a"]}


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"schema": property_of({"not": {"type": "string"}})},
        r"schema, at #/properties/a/items: Unimplemented keys: ..not",
    ),
    (
        {"schema": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 3}]}},
        "at #/anyOf/0: .*minimum .5. is greater",
    ),
    (
        {"schema": {"$ref": "#/$defs/b~1c", "$defs": {"b/c": {"type": "nothing"}}}},
        "at #/.defs/b~1c: Invalid type: nothing",
    ),
    ({"schema": {"type": "string", "pattern": "(?=a)"}}, "schema, at #: regex parse error"),
    ({"schema": "{"}, "schema is not JSON"),
    ({"schema": {"a": {1, 2}}}, "schema is not JSON"),
    ({"schema": [SCHEMA]}, "schema must be a JSON object"),
    ({"regex": "(a"}, "regex: .*unclosed group"),
    ({"regex": r"(?<!a)b"}, "regex: .*look-around"),
    ({"regex": r"[^\s\S]"}, "regex: there is no text that it allows"),
    ({"regex": 5}, "regex must be a string"),
    ({"regex": "\ud800"}, "regex is not valid Unicode"),
    ({"choices": []}, "choices is empty"),
    ({"choices": ["a", ""]}, "choices has an empty string"),
    ({"choices": "a"}, "choices must be a list of strings"),
    ({"choices": ["a", 5]}, "choices must be a list of strings"),
    ({"choices": ["a", "b" * 30], "max_new_tokens": 20}, "'b+' has 30 tokens, max_new_tokens is 20"),
    ({"grammar": "start: other"}, "grammar: .*unknown name"),
    ({"grammar": 'other: "a"'}, "grammar: no start rule"),
    ({"grammar": 'start: "a" other\nother: /[^\\s\\S]/'}, "cannot go on as grammar wants it: no text may come next"),
    ({"regex": "a", "choices": ["a"]}, "regex and choices are given"),
    ({"regex": "a", "raw": True}, "regex and raw exclude each other"),
    ({"regex": "a", "ignore_eos": True}, "regex and ignore_eos exclude each other"),
    ({"stop_token_ids": [320]}, "stop_token_ids must be a whole number from 0 to 319"),
    ({"stop_token_ids": "a"}, "stop_token_ids must be a list"),
    ({"max_thinking_tokens": -1}, "max_thinking_tokens must be"),
    ({"thinking_end": 5}, "thinking_end: 5"),
]


def test_negative_multiples_are_written_or_refused(vlm: VLM) -> None:
    """llguidance 1.6 takes a schema of nothing else and allows no number; 1.9 writes them."""
    schema = {"type": "number", "maximum": -1, "minimum": -9, "multipleOf": 0.5}
    try:
        number = json.loads(vlm.generate("Count.", schema=schema, max_new_tokens=60).text)
    except OptionError as error:
        number = -1 if "with multipleOf no negative" in error.message else None
    assert number is not None
    assert -9 <= number <= -1
    assert number * 2 % 1 == 0


@pytest.mark.parametrize(("options", "told"), WRONG, ids=[f"{i}-{next(iter(o))}" for i, (o, _) in enumerate(WRONG)])
def test_what_cannot_be_is_told(vlm: VLM, options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told) as raised:
        vlm.generate(ASKED, **options)
    assert raised.value.fix
    assert vlm.generate(ASKED, choices=["yes"]).text == "yes", "the next call is as ever"


def test_a_choice_must_fit_behind_the_prompt(vlm: VLM) -> None:
    with pytest.raises(ContextError, match="fit behind the prompt"):
        vlm.generate("word " * 150, choices=["b" * 300], max_new_tokens=400)


def test_llguidance_is_an_extra(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendError, match="need llguidance") as raised:
        Guides(vlm.tokenizer, 320).start(Guide("regex", "a"), ())
    assert "[guidance]" in raised.value.fix
    assert vlm.generate(ASKED, max_new_tokens=2, stop_token_ids=[5]).token_ids


def test_a_definition_that_refers_to_itself_comes_to_an_end() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}}}
    assert failing_part(schema, "wrong", lambda text: "wrong") == ("#/$defs/a/properties/b", "wrong")


def test_only_the_last_guides_are_kept() -> None:
    guides = Guides(reference.host_tokenizer(reference.byte_level_bpe()), 700)
    for i in range(20):
        guides.start(Guide("regex", f"a{{{i}}}"), (2,))
    assert len(guides._ready) < 10
