"""Tokenizer, chat template, streaming detokenizer and stop strings, against the source library where it has them."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_edge.errors import BundleError, PromptError
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, StopStrings, StreamDecoder, Tokenizer

from . import reference
from .reference import NAMED_TOKENS, TEMPLATE, generation, host_tokenizer

CORES = {
    "byte level": reference.byte_level_bpe(),
    "byte fallback": reference.byte_fallback_bpe(),
    "word piece": reference.word_piece(),
    "metaspace": reference.metaspace_unigram(),
    "byte level and more": reference.byte_level_bpe(more=True),
}
TOKENIZERS = {name: host_tokenizer(core) for name, core in CORES.items()}
SOURCES = {
    name: PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    for name, core in CORES.items()
}
TEXTS = ["What is on the belt?", "naïve 你好 🙂", "", " two  spaces \n\n", "<image>plain<tool call> x", "the belt a"]


# ---------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_the_source_library(name, text):
    ids = TOKENIZERS[name].encode(text)
    assert ids == SOURCES[name](text)["input_ids"]
    for skip in (True, False):
        assert TOKENIZERS[name].decode(ids, skip) == SOURCES[name].decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_added_as_generation_json_says():
    core = CORES["byte fallback"]
    assert host_tokenizer(core).encode("a")[0] == 1
    plain = host_tokenizer(core, add_special_tokens=False)
    assert plain.encode("a") == host_tokenizer(core).encode("a")[1:]
    assert plain.encode("a", add_special_tokens=True)[0] == 1


def test_padding_and_truncation_in_the_file_are_switched_off(tmp_path):
    core = Core.from_str(CORES["byte level"].to_str())
    core.enable_truncation(3)
    core.enable_padding(length=5)
    core.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path, generation()).encode("What is on the belt? A red box.")) > 5
    assert len(Tokenizer.load(tmp_path, generation()).encode("a")) == 1


def test_decode_takes_arrays_and_ignores_unknown_ids():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("the belt")
    assert tokenizer.decode(np.array([*ids, 999_999])) == "the belt"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.zeros(0, np.int64)) == ""


def test_names_and_ids():
    tokenizer = TOKENIZERS["byte level"]
    image = tokenizer.token_id("<image>")
    assert tokenizer.encode("<image>") == [image]
    assert tokenizer.token(image) == "<image>"
    assert image in tokenizer.special_ids
    assert tokenizer.added_tokens[image] == "<image>"
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.bos_token == "<|im_start|>"


def test_text_that_is_not_unicode():
    with pytest.raises(PromptError, match="surrogate"):
        TOKENIZERS["byte level"].encode("half \ud83d")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}', "\udcff"])
def test_damaged_tokenizer_file(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, generation())


# ---------------------------------------------------------------- chat template
def source_render(template, messages, **variables):
    rendered, _ = render_jinja_template([messages], chat_template=template, **NAMED_TOKENS, **variables)
    return rendered[0]


MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "exact".'},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What's this?\n"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Ä crate."}]},
]
TEMPLATES = {
    "family": TEMPLATE,
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': ['ä', '<&>']} | tojson(indent=2, sort_keys=true) }}",
    "blocks": "  {% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n    {% endif %}\n  {% endfor %}\nz\n",
    "loop controls": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}\n{% endgeneration %}{% endfor %}|",
    "namespace": "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ ns.seen }}",
    "dict": "{{ dict(a=1, b=dict()) }}{{ dict([('x', 2)]) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ tools is none }}{{ documents }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0]['name'] is defined }}",
    "no escaping": "{{ messages[0].content }}{{ '<b>' }}",
    "trimmed": "{%- for m in messages -%} {{ m.role }} {%- if m.content is string -%} ! {% endif %} {%- endfor -%}\n",
    "generation prompt": "{% if add_generation_prompt %}Assistant:{% endif %}",
    "macro": "{% macro show(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_the_source_library(name, add_generation_prompt):
    messages = MESSAGES[1:] if name == "family" else MESSAGES
    expected = source_render(TEMPLATES[name], messages, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate(TEMPLATES[name], NAMED_TOKENS).render(messages, add_generation_prompt) == expected


def test_variables_reach_the_template():
    template = ChatTemplate("{{ thinking }} {{ tools | tojson }} {{ bos_token }}", NAMED_TOKENS)
    assert template.render([], thinking=True, tools=[{"a": 1}], bos_token="x") == 'True [{"a": 1}] x'


def test_strftime_now():
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([]) in {
        time.strftime("%Y-%m-%d", time.localtime(time.time() - seconds)) for seconds in (0, 60)
    }


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing.attribute }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
        ("{{ dict.__subclasses__() }}", ""),
        ("{% include 'other' %}", ""),
    ],
)
def test_failing_templates(source, told):
    with pytest.raises(PromptError, match="chat template rejects") as error:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert told in str(error.value)


def test_bad_template_file(tmp_path):
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path, generation())
    (tmp_path / "chat_template.jinja").write_text("line one\n{% for %}")
    with pytest.raises(BundleError, match="line 2"):
        ChatTemplate.load(tmp_path, generation())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}ä", encoding="utf-8")
    assert ChatTemplate.load(tmp_path, generation()).render([]) == "<|im_start|>ä"


@pytest.mark.parametrize(
    ("source", "strings", "lists"),
    [
        (TEMPLATE, False, True),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", True, False),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", True, False),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", True, False),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", True, False),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
            "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}",
            True,
            True,
        ),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", False, False),
        ("{{ raise_exception('never') }}", False, False),
    ],
)
def test_what_a_template_accepts(source, strings, lists):
    template = ChatTemplate(source)
    assert (template.accepts_strings(), template.accepts_lists("<image>")) == (strings, lists)


# ---------------------------------------------------------------- streaming
def stream(tokenizer, ids, skip=True):
    decoder = StreamDecoder(tokenizer, skip)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.flush()]


def ids_of(name):
    """Any ids of the vocabulary and beyond it, bytes and special tokens more often than by chance."""
    core = CORES[name]
    size = core.get_vocab_size()
    byte_tokens = [i for token, i in core.get_vocab().items() if len(token) == 1 or token.startswith("<0x")]
    some = [st.integers(0, size + 5), st.sampled_from(sorted(byte_tokens) or [0])]
    some += [st.sampled_from(sorted(core.get_added_tokens_decoder()) or [0])]
    return st.lists(st.one_of(some), max_size=40)


@pytest.mark.parametrize("name", CORES)
def test_pieces_join_to_the_whole_for_any_ids(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=400, deadline=None)
    @given(ids_of(name), st.booleans())
    def check(ids, skip):
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("name", ["byte level", "byte level and more", "byte fallback"])
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24))
@example(data=b"\xf0\x9f\x99\x82\xff")
@example(data=b"\xe2\x82A\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80")
def test_any_bytes(name, data):
    tokenizer = TOKENIZERS[name]
    alphabet = bytes_to_unicode()
    ids = [tokenizer.token_id(f"<0x{byte:02X}>" if name == "byte fallback" else alphabet[byte]) for byte in data]
    assert None not in ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["The belt 你好 🙂🚀 naïve", "عرض привет こんにちは"])
@pytest.mark.parametrize("name", ["byte level", "byte level and more", "byte fallback"])
def test_never_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "metaspace"])
def test_text_comes_without_delay(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the belt the belt", add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert pieces[-1] == ""
    assert all(pieces[:-1])


def test_unfinished_character_at_the_end():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a🙂")[:-1]
    assert stream(tokenizer, ids)[-1] == "\ufffd"


def test_spaces_at_the_start_of_a_stripping_decoder():
    tokenizer = TOKENIZERS["byte fallback"]
    space, two = tokenizer.token_id("▁"), tokenizer.token_id("▁▁")
    a = tokenizer.token_id("▁a")
    for ids in ([space, a], [two, a], [a, space, a], [space, space, space, a], [a, two, space, two, a], [two, two]):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_flush_starts_a_new_text():
    for tokenizer in (TOKENIZERS["byte level"], TOKENIZERS["byte fallback"]):
        ids = tokenizer.encode("the 你", add_special_tokens=False)
        decoder = StreamDecoder(tokenizer)
        texts = ["".join(map(decoder.push, ids)) + decoder.flush() for _ in range(2)]
        assert texts == ["the 你"] * 2


@pytest.mark.parametrize("name", CORES)
def test_cost_per_token_does_not_grow(name, monkeypatch):
    tokenizer = host_tokenizer(CORES[name])
    longest = 0
    decode = Tokenizer.decode

    def counting(self, ids, skip_special_tokens=True):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    ids = tokenizer.encode("the belt a red box, " * 100)
    stream(tokenizer, ids)
    assert len(ids) > 300
    assert longest <= 6


# ---------------------------------------------------------------- stop strings
def feed(stops, pieces):
    matcher = StopStrings(stops)
    out = [matcher.push(piece) for piece in pieces]
    return "".join(out) + matcher.flush(), matcher.matched


def test_stop_string_across_pieces():
    matcher = StopStrings(["\nUser:", "###"])
    assert [matcher.push(piece) for piece in ("Hello\n", "Us", "a\nUser", ": no")] == ["Hello", "", "\nUsa", ""]
    assert matcher.matched == "\nUser:"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_no_stop_strings_holds_nothing_back():
    matcher = StopStrings()
    assert matcher.push("abc") == "abc"
    assert matcher.flush() == ""
    assert matcher.matched is None


def test_only_what_may_begin_a_stop_string_is_held():
    matcher = StopStrings(["aab"])
    assert [matcher.push(piece) for piece in ("a", "a", "a", "c")] == ["", "", "a", "aac"]
    assert matcher.flush() == ""
    assert feed(["aab"], ["aa", "a"]) == ("aaa", None)


def test_first_complete_stop_string_wins():
    assert feed(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert feed(["c", "abc"], ["xabc"]) == ("x", "abc")
    assert feed("stop", ["a stop b"]) == ("a ", "stop")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.text("abcd", max_size=20),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_cutting_the_text_elsewhere_changes_nothing(stops, text, cuts):
    ends = [len(text[:end]) for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if ends:
        matched = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        expected = (text[: ends[0] - len(matched)], matched)
    else:
        expected = (text, None)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert feed(stops, pieces) == expected


@pytest.mark.parametrize("stops", [[""], ["ok", ""], [3], [None], [b"x"]])
def test_stop_strings_that_are_none(stops):
    with pytest.raises(ValueError, match="stop"):
        StopStrings(stops)
