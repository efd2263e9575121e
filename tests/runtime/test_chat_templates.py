"""Chat templates render as transformers renders them, wherever a checkpoint keeps them, and cannot get out."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from mllm_edge.errors import ConfigError, PromptError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.generation import generation_spec
from mllm_edge.export.checkpoint.source import Source, open_source
from mllm_edge.export.family import family_for, open_weights, understand
from mllm_edge.runtime.prompt import sandbox as runtime
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate
from tests.families.row import rows
from tests.tiny import make_tokenizer, save_tiny_llava

REFERENCE = make_tokenizer()
TOKENS = {k: str(v) for k, v in REFERENCE.special_tokens_map.items()}

PICTURE = {"type": "image"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": 'What\'s <b>this</b> & "that"?'}],
    "system": [
        {"role": "system", "content": "  Be exact.\n\n"},
        {"role": "user", "content": "Ünïcode 你好 😀\n  two\n"},
        {"role": "assistant", "content": " An answer. "},
        {"role": "user", "content": ""},
    ],
    "pictures": [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "One?"}, PICTURE, PICTURE]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ],
    "tools": [
        {"role": "user", "content": "Weather?", "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "now", "arguments": {"city": "Zürich", "n": 1.5}}}
            ],
        },
        {"role": "tool", "name": "now", "content": '{"t": 3}'},
        {"role": "assistant", "content": "Cold.", "reasoning": "3 is low."},
    ],
}
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "first_and_last": LOOP + "{{ loop.index0 }}/{{ loop.length }}{{ bos_token if loop.first }}{{ m['role'] | title }}: "
    "{{ m['content'] }}{{ eos_token if loop.last else '|' }}{% endfor %}",
    "system_taken_out": "{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = 'default' %}{% set rest = messages %}{% endif %}"
    "[{{ system | trim }}]{% for m in rest %}{{ m.content }}{% endfor %}",
    "roles_must_alternate": LOOP + "{% if m.role not in ['user', 'assistant', 'system', 'tool'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ loop.cycle('a', 'b') }}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(images=0, last='', seen=false) %}" + LOOP + "{% if m.content is not string %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{% set ns.images = ns.images + 1 %}"
    "Picture {{ ns.images }}: <image>{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}{% else %}"
    "{% set ns.seen = true %}{{ m.content }}{% endif %}{% set ns.last = m.role %}{% endfor %}"
    "{{ ns.last }}{{ ns.seen }}",
    "scoping": "{% set x = 1 %}" + LOOP + "{% set x = x + 1 %}{{ x }}{% generation %}{% set x = 9 %}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}{{ x }}",
    "generation": LOOP + "{% if m.role == 'assistant' %}\n  {%- generation -%}\n  {{ m.content }}{{ eos_token }}\n"
    "{%- endgeneration %}\n{% else %}\n{{ m.role }}\n{% endif %}\n{% endfor %}\n",
    "generation_keeps_newlines": LOOP + "{% generation %}\n{{ m.role }}\n\n{% endgeneration %}\n.{% endfor %}",
    "loop_controls": LOOP + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% else %}empty{% endfor %}",
    "whitespace": "\n  {% if true %}  \n    a\n  {%- endif %}\n\n {# a comment #}\n" + LOOP + "\n    {{- m.role -}}  \n"
    "\t{% if loop.last %}\n !{% endif %}\n  {% endfor %}\n  z \n\n",
    "raw_and_lines": "{% raw %}{{ not this }}{% endraw %}\r\n{{ 'x\\ny' }}\n",
    "json": "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':')) }}"
    "{{ {'b': 'ä', 'a': '<&>'} | tojson(sort_keys=true, ensure_ascii=true) }}{{ 1.0 | tojson }}{{ none | tojson }}",
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% else %}no tools{% endif %}"
    "{{ tools is defined }}{{ documents is none }}" + LOOP + "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }},{% endfor %})"
    "{% endfor %}{% endif %}{{ 'empty' if m.content is not defined }}{{ m.name is defined }}{% endfor %}",
    "reasoning": LOOP + "[{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}]{% endfor %}",
    "dates": "{{ strftime_now('%d %b %Y') }}{% if not date is defined %}{% set date = strftime_now('%Y') %}{% endif %}"
    "{{ date }}",
    "dicts": "{{ dict(a=1) }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ dict([('k', 'v')]).items() | list }}"
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}",
    "filters": LOOP + "{{ m.role | upper | replace('S', '$') }}{{ m.content | string | length }}"
    "{{ m.role | default('x') | indent(2) }}{% endfor %}{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [3, 1] | sort }}{{ 7 // 2 }}{{ 2 ** 3 }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | list }}{{ '%s-%d' | format('a', 3) }}",
    "strings": LOOP + "{{ m.role.upper() }}{{ m.role[0] }}{{ m.role[::-1] }}{{ m.role.startswith('us') }}"
    "{{ (m.role ~ ':' ~ loop.index).split(':')[-1] }}{{ m.role.strip('u').lstrip('s') }}{% endfor %}",
    "macros": "{% macro show(p) -%}<{{ p.type }}>{%- endmacro %}{% macro box() %}[{{ caller() }}]{% endmacro %}"
    + LOOP
    + "{% if m.content is iterable and m.content is not string %}{% for p in m.content %}{{ show(p) }}{% endfor %}"
    "{% endif %}{% call box() %}{{ m.role }}{% endcall %}{% endfor %}",
    "tests": LOOP + "{{ m.content is mapping }}{{ m is mapping }}{{ m.content is sequence }}{{ loop.index is odd }}"
    "{{ m.nothing is defined }}{{ m.role is eq 'user' }}{{ m.content is none }}{% endfor %}",
    "undefined": "{{ nothing }}{{ messages[9] }}{{ unk_token }}{% if sep_token is defined %}sep{% endif %}"
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "set_block": "{% set text %}{{ bos_token }}\n  x{% endset %}{{ text }}{{ text | length }}",
    "generation_prompt": "{{ add_generation_prompt }}"
    "{% if add_generation_prompt is defined and add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}{{ enable_thinking | default(true) }}",
    "comparisons": "{{ messages | length > 1 }}{{ (messages[-1].role if messages else '') == 'user' }}"
    "{{ messages[:-1] | length }}{{ not messages }}{{ 'a' in 'abc' and 1 != 2 or false }}",
}


class _Fixed(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "_Fixed":
        return cls(2024, 2, 9, 23, 59)


def _outcome(render: Callable[[], str]) -> str:
    """What a rendering gives, or that it fails."""
    try:
        return render()
    except Exception:  # the source library raises whatever the template does
        return "<fails>"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, conversation: str, add_generation_prompt: bool
) -> None:
    for module in (runtime, chat_template_utils):
        monkeypatch.setattr(module, "datetime", _Fixed)
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    expected = _outcome(
        lambda: REFERENCE.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )
    ours = ChatTemplate(template, TOKENS)
    assert _outcome(lambda: ours.render(messages, add_generation_prompt)) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_do_render(name: str) -> None:
    """The comparison above would hold for failures alone."""
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    outcomes = [_outcome(partial(template.render, messages)) for messages in CONVERSATIONS.values()]
    assert sum(outcome != "<fails>" for outcome in outcomes) >= 2


@pytest.mark.parametrize("variables", [{"tools": [{"type": "function", "function": {"name": "ä"}}]}, {"date": "today"}])
def test_variables_reach_the_template(variables: dict[str, Any]) -> None:
    for name in ("tools", "dates"):
        template, messages = TEMPLATES[name], CONVERSATIONS["question"]
        expected = REFERENCE.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
        assert ChatTemplate(template, TOKENS).render(messages, False, **variables) == expected


def test_a_message_is_left_as_it_was() -> None:
    message = {"role": "user", "content": "x", "name": None, "thinking": "y"}
    ChatTemplate(LOOP + "{{ m }}{% endfor %}").render([message])
    assert message == {"role": "user", "content": "x", "name": None, "thinking": "y"}


# ---------------------------------------------------------------- where a checkpoint keeps them
FALLBACK = "fallback {{ bos_token }}"


def _checkpoint(folder: Path, **files: Any) -> Source:
    """A directory with a tokenizer; `files` are contents by name, a dot written as two underscores."""
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, dict) and path.is_file():
            content = {**json.loads(path.read_text()), **content}
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return open_source(str(folder))


def _check(source: Source) -> str:
    """Our rendering of the checkpoint's template, which must be the reference's."""
    ours = ChatTemplate(chat_template(source, FALLBACK), generation_spec(source, {}).special_tokens)
    reference = AutoTokenizer.from_pretrained(source.folder)
    messages = CONVERSATIONS["question"]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(messages) == expected
    return expected


def test_template_in_its_own_file(tmp_path: Path) -> None:
    files = {"chat_template__jinja": "jinja {{ bos_token }}", "tokenizer_config__json": {"chat_template": "other"}}
    assert _check(_checkpoint(tmp_path, **files)) == "jinja <|im_start|>"


def test_template_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    assert _check(_checkpoint(tmp_path, tokenizer_config__json={"chat_template": "c {{ eos_token }}"})) == (
        "c <end_of_utterance>"
    )


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain {{ messages[0].role }}"}]
    assert _check(_checkpoint(tmp_path, tokenizer_config__json={"chat_template": named})) == "plain user"


def test_named_templates_without_a_default(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path, tokenizer_config__json={"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(ConfigError, match=r"\(rag\) is named default") as error:
        chat_template(source, FALLBACK)
    assert "chat_template.jinja" in error.value.fix


def test_named_special_tokens_of_the_model(tmp_path: Path) -> None:
    extra = {"image_token": "<image>", "boi_token": {"__type": "AddedToken", "content": "<global-img>"}}
    template = "{{ image_token }}{{ boi_token }}{{ unk_token is defined }}"
    files = {"tokenizer_config__json": {"chat_template": template, "extra_special_tokens": {"image_token": "<image>"}}}
    assert _check(_checkpoint(tmp_path / "a", **files)) == "<image>False"
    files["tokenizer_config__json"]["extra_special_tokens"] = extra
    source = _checkpoint(tmp_path / "b", **files)
    assert generation_spec(source, {}).special_tokens["boi_token"] == "<global-img>"


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_template_of_a_processor(tmp_path: Path, name: str) -> None:
    """These are the processor's; a whole processor is the reference."""
    save_tiny_llava(tmp_path)
    template = json.dumps((tmp_path / "chat_template.jinja").read_text() + "\nfrom " + name)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "chat_template": json.loads(template)}))
    source = open_source(str(tmp_path))
    found = chat_template(source, FALLBACK)
    assert found.endswith(name)
    processor = family_for(source).load_processor(source)
    messages = CONVERSATIONS["pictures"]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert ChatTemplate(found, generation_spec(source, {}).special_tokens).render(messages) == expected


@pytest.mark.parametrize("family", rows())
def test_every_family_has_a_template_of_its_own(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """For checkpoints without one: it renders pictures, several turns, and a text alone; but where a text encoder reads
    one question."""
    checkpoint = Path(shutil.copytree(saved(family), tmp_path / "checkpoint"))
    for name in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    source = open_source(str(checkpoint))
    plan = understand(source, open_weights(source))
    template = ChatTemplate(plan.texts.chat_template, plan.texts.generation.special_tokens)
    assert plan.model.image is not None
    token = plan.model.image.prompt.written
    assert template.accepts_lists(token)
    if plan.model.text_encoder is not None:
        (asked, *_) = (turn for turn in CONVERSATIONS["pictures"] if PICTURE in turn["content"])
        assert template.render([asked]).count(token) == asked["content"].count(PICTURE)
        with pytest.raises(PromptError, match="takes one message"):
            template.render(CONVERSATIONS["pictures"])
        return
    assert template.render(CONVERSATIONS["pictures"]).count(token) == 3
    answerless, asked = template.render(CONVERSATIONS["pictures"], False), template.render(CONVERSATIONS["pictures"])
    assert asked.startswith(answerless)
    assert asked != answerless
    assert "Three." in asked


def test_a_probe_that_fails_keeps_nobody_alive() -> None:
    """Else a model that is dropped stays until garbage is collected, with all its sessions."""

    class Caller:
        pass

    def probe() -> Any:
        caller = Caller()
        assert not ChatTemplate("{{ messages[0]['content'][0]['text'] + '.' }}", {}).accepts_strings()
        return weakref.ref(caller)

    gc.disable()
    try:
        assert probe()() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- templates from strangers
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.fromkeys.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(**{'__init__': 1}) }}",
    "{{ namespace({'__init__': 1}) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ ('%s' | format(messages)).__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{% for i in range(999999999) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% extends '/etc/passwd' %}",
    "{{ (messages | groupby('role'))[0].__class__.__mro__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{{ caller.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% generation %}{{ loop.__class__.__init__.__globals__ }}{% endgeneration %}",
]


# More work, or more text, than any prompt is. (The numbers keep a sandbox without bounds busy, not the machine.)
ENDLESS = [
    "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}",
    "{% for a in range(3000) %}{% for b in range(3000) %}x{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set n = namespace(x='xx') %}{% for i in range(30) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(30) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(30) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "{% set x = 'x' * 300000 %}{% for i in range(3000) %}{{ x }}{% endfor %}",
    "{{ ('x' * 1000000000) | length }}",
    "{{ (1000000000 * 'x') | length }}",
    "{{ 10 ** 10000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ 'x'.ljust(1000000000) | length }}",
    "{{ 'x' | center(1000000000) | length }}",
    "{{ '{:1000000000}'.format(1) | length }}",
    "{% call(a) m() %}{% endcall %}{% macro m() %}{% for i in range(90000) %}{% for j in range(90000) %}"
    "{{ caller(1) }}{% endfor %}{% endfor %}{% endmacro %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_template_without_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    with pytest.raises(PromptError, match="chat template rejects"):
        template.render([{"role": "user", "content": "x"}])


def test_a_bound_is_for_one_prompt() -> None:
    """What one rendering took does not count for the next; a long conversation fits."""
    loops = "{% for m in messages %}{% for i in range(400) %}{{ m.content | trim }}{% endfor %}{% endfor %}"
    template, messages = ChatTemplate(loops, TOKENS), [{"role": "user", "content": "x"}] * 1000
    for _ in range(2):
        assert len(template.render(messages)) == 400_000


@pytest.mark.parametrize("source", ESCAPES)
def test_dangerous_template_is_stopped(source: str) -> None:
    """It fails, or what it reached for is undefined: nothing of Python is printed."""
    messages = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(source, TOKENS).render(messages)
    except PromptError:
        text = ""
    assert text.strip() in ("", "<Namespace {}>")
    assert messages == [{"role": "user", "content": "x"}]
