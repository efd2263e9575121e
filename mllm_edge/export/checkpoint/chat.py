"""The chat template of a checkpoint, out of the files that may hold one."""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.processing import read_tokenizer, stated_settings
from mllm_edge.export.checkpoint.source import Source

__all__ = ["chat_template"]

JINJA, JSON, NAMED = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_CONFIGS = ("processor_config.json", "tokenizer_config.json")


def chat_template(source: Source, fallback: str, tokenizer: Any = None) -> str:
    """What transformers' processor renders prompts with, else what its tokenizer does, else `fallback`; of several
    named templates the one named default. A notice tells of files that say something else.

    Raises ConfigError when there is none of that name, or when transformers refuses the files.
    """
    found = stated_settings(source).get("chat_template")
    if not found:
        found = (tokenizer or read_tokenizer(source)).chat_template
    template = _default(source, found) if isinstance(found, Mapping) else found
    if not template:
        if fallback:
            source.notices.add(
                f"{source.folder}: no chat template; prompts are written in the form of this model family"
            )
        return fallback
    _tell_others(source, template)
    return str(template)


def _default(source: Source, templates: Mapping[str, str]) -> str:
    if "default" not in templates:
        raise ConfigError(
            f"{source.folder}: none of the chat templates ({', '.join(templates)}) is named default",
            f"put the one to use into {source.folder / JINJA}",
        )
    return templates["default"]


def _tell_others(source: Source, taken: str) -> None:
    """A notice of the files whose template is another one than that which transformers took."""
    stated = _stated(source)
    holders = [name for name, text in stated.items() if _plain(text) == _plain(taken)]
    others = [name for name, text in stated.items() if _plain(text) != _plain(taken)]
    if not others:
        return
    used = holders[0] if holders else "another file"
    text = f"{source.folder}: {used} and {' and '.join(others)} hold different chat templates; {used} counts, as in "
    text += "transformers' processor"
    newer = [name for name in others if holders and _time(source, name) > _time(source, used)]
    if newer:
        text += f"; {newer[0]} was saved later and is not read: if it is the one you want, delete the other"
    source.notices.add(text)


def _stated(source: Source) -> dict[str, str]:
    """The default template of each file that states one."""
    found: dict[str, Any] = {name: source.json(name).get("chat_template") for name in (_CONFIGS[0], JSON)}
    for name in (JINJA, f"{NAMED}/default.jinja"):
        path = source.folder / name
        found[name] = path.read_text(encoding="utf-8") if path.is_file() else None
    found[_CONFIGS[1]] = source.json(_CONFIGS[1]).get("chat_template")
    return {name: text for name, value in found.items() if (text := _text(value))}


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
    if isinstance(value, Mapping):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").rstrip("\n")


def _time(source: Source, name: str) -> int:
    return (source.folder / name).stat().st_mtime_ns
