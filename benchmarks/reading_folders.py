"""Folders as several versions and tools leave them: one tiny checkpoint a family, and changes to its files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests import tiny
from tests.tiny_internvl import save_tiny_internvl

__all__ = ["FAMILIES", "Folder", "folders", "make", "save_base"]

FAMILIES: Mapping[str, Callable[..., Any]] = {
    "idefics3": tiny.save_tiny_idefics3,
    "smolvlm": partial(tiny.save_tiny_idefics3, model_type="smolvlm"),
    "llava": tiny.save_tiny_llava,
    "qwen2_vl": tiny.save_tiny_qwen2_vl,
    "internvl": save_tiny_internvl,
}
# The key of a file is taken away, or null.
ABSENT, NULL = object(), None
_FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Folder:
    """A checkpoint of `family` after `change`; `name` says what was changed."""

    family: str
    name: str
    change: Change


def save_base(family: str, folder: Path) -> None:
    """The family's checkpoint as transformers 5 saves it: the image processor inside processor_config.json."""
    FAMILIES[family](folder)
    own = folder / "preprocessor_config.json"
    if own.is_file():
        edit("processor_config.json", image_processor=json.loads(own.read_text()))(folder)
        own.unlink()


def make(base: Path, folder: Path, change: Change) -> None:
    """A copy of the checkpoint in `base` with `change` made to it; weights are shared."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        (os.link if path.suffix == ".safetensors" else shutil.copy)(path, folder / path.name)
    change(folder)


def folders() -> Iterator[Folder]:
    """Every family with every change; the numbers of tokens and pixels stay those of the model."""
    for family in FAMILIES:
        yield Folder(family, "as saved", lambda folder: None)
        for name, change in (*_templates(), *_images(family), *_tokens(family), *_stops(), *_weights()):
            yield Folder(family, name, change)


# ---------------------------------------------------------------- files
def edit(name: str, **values: Any) -> Change:
    """Set keys of a JSON file, which is made where it is not there; ABSENT takes a key away."""

    def change(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in values.items():
            if value is ABSENT:
                data.pop(key, None)
            else:
                data[key] = value
        path.write_text(json.dumps(data))

    return change


def together(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


# ---------------------------------------------------------------- chat templates
def _put(place: str, tag: str) -> Change:
    """The checkpoint's template, marked with `tag`, into one of the places that may hold one."""

    def change(folder: Path) -> None:
        template = (folder / ".template").read_text() + tag
        if place.endswith(".jinja"):
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_text(template)
        elif place == "tokenizer_config.json, named":
            named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": template}]
            edit("tokenizer_config.json", chat_template=named)(folder)
        else:
            edit(place, chat_template=template)(folder)

    return change


PLACES = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer_config.json, named",
    "additional_chat_templates/default.jinja",
)


def _no_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    shutil.move(path, folder / ".template")


def _templates() -> Iterator[tuple[str, Change]]:
    for i, place in enumerate(PLACES):
        yield f"template in {place}", together(_no_template, _put(place, " a"))
        for other in PLACES[i + 1 :]:
            if place.split(",")[0] != other.split(",")[0]:
                pair = together(_no_template, _put(place, " a"), _put(other, " b"))
                yield f"templates in {place} and {other}", pair
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        yield f"chat_template null in {name}", edit(name, chat_template=NULL)


# ---------------------------------------------------------------- images
_OTHER: dict[str, dict[str, Any]] = {
    "idefics3": {"do_image_splitting": False},
    "smolvlm": {"do_image_splitting": False},
    "llava": {"resample": 2},
    "qwen2_vl": {"size": {"shortest_edge": 4 * 256, "longest_edge": 16 * 256}},
    "internvl": {"max_patches": 3},
}


def _images(family: str) -> Iterator[tuple[str, Change]]:
    other: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], **_OTHER[family]}

    def moved(*, keep: bool, drop: tuple[str, ...] = (), **changed: Any) -> Change:
        """The image processor's settings into preprocessor_config.json, `changed` there."""

        def change(folder: Path) -> None:
            path = folder / "processor_config.json"
            data = json.loads(path.read_text())
            settings = {**data["image_processor"], **changed}
            (folder / "preprocessor_config.json").write_text(
                json.dumps({k: v for k, v in settings.items() if k not in drop})
            )
            if not keep:
                del data["image_processor"]
            path.write_text(json.dumps(data))

        return change

    def nested(**changed: Any) -> Change:
        def change(folder: Path) -> None:
            path = folder / "processor_config.json"
            data = json.loads(path.read_text())
            data["image_processor"] |= changed
            data["image_processor"] = {k: v for k, v in data["image_processor"].items() if v is not ABSENT}
            path.write_text(json.dumps(data))

        return change

    yield "images in preprocessor_config.json", moved(keep=False)
    yield "images in both files, alike", moved(keep=True)
    yield "images in both files, another mean", moved(keep=True, image_mean=[0.1, 0.2, 0.3])
    yield "images in both files, contradicting", moved(keep=True, **other)
    yield "images nested, other settings", nested(**other)
    yield "images in preprocessor_config.json, other settings", moved(keep=False, **other)
    for key in ("do_rescale", "do_normalize", "do_resize", "do_convert_rgb", "image_mean", "image_std", "resample"):
        yield f"images: {key} null", nested(**{key: NULL})
        yield f"images: {key} absent", nested(**{key: ABSENT})
    yield "images: type absent", nested(image_processor_type=ABSENT)
    yield "images: type of a backend", moved(keep=False, **_fast(family))
    yield "images: rescale_factor null", nested(rescale_factor=NULL)
    yield "images: unknown key", nested(do_wonders=True)
    for key in ("image_seq_len", "image_seq_length", "patch_size", "num_additional_image_tokens", "image_token"):
        yield f"processor: {key} null", edit("processor_config.json", **{key: NULL})
    yield (
        "no processor_config.json",
        together(moved(keep=False), lambda folder: (folder / "processor_config.json").unlink()),
    )
    yield (
        "processor: class in preprocessor_config.json",
        together(
            moved(keep=False, processor_class=_CLASSES[family]), edit("processor_config.json", processor_class=ABSENT)
        ),
    )
    yield "settings for video beside", edit("video_preprocessor_config.json", do_resize=False, size={"height": 1})
    yield "processor: class absent", edit("processor_config.json", processor_class=ABSENT)


_CLASSES = {
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "llava": "LlavaProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "internvl": "InternVLProcessor",
}


def _fast(family: str) -> dict[str, Any]:
    names = {
        "idefics3": "Idefics3",
        "smolvlm": "SmolVLM",
        "llava": "CLIP",
        "qwen2_vl": "Qwen2VL",
        "internvl": "GotOcr2",
    }
    return {"image_processor_type": f"{names[family]}ImageProcessorFast"}


# ---------------------------------------------------------------- tokens
def _tokens(family: str) -> Iterator[tuple[str, Change]]:
    config, special = "tokenizer_config.json", "special_tokens_map.json"
    start, end = "<|im_start|>", "<|im_end|>" if family in ("qwen2_vl", "internvl") else "<end_of_utterance>"
    named = _bos_template
    full = {"__type": "AddedToken", "content": start, "special": True, **_FLAGS}
    yield "bos written by the template", named
    yield "bos in the map only", together(named, edit(config, bos_token=ABSENT), edit(special, bos_token=start))
    yield "bos in both, alike", together(named, edit(config, bos_token=start), edit(special, bos_token=start))
    yield "bos in both, contradicting", together(named, edit(config, bos_token=start), edit(special, bos_token=end))
    yield "bos null", together(named, edit(config, bos_token=NULL))
    yield "bos null in the map", together(named, edit(config, bos_token=start), edit(special, bos_token=NULL))
    yield "bos absent", together(named, edit(config, bos_token=ABSENT))
    yield "bos with its flags", together(named, edit(config, bos_token=full))
    yield "bos as content in the map", together(named, edit(special, bos_token={"content": start, **_FLAGS}))
    yield "eos in both, contradicting", edit(special, eos_token=start)
    yield "eos null", edit(config, eos_token=NULL)
    yield "eos changed", edit(config, eos_token=start)
    yield "pad changed", edit(config, pad_token=end)
    yield "pad null", edit(config, pad_token=NULL)
    yield "no tokenizer_config.json", lambda folder: (folder / config).unlink()
    yield "added_tokens_decoder, alike", _decoder()
    yield "added_tokens_decoder, contradicting", _decoder(swap=True)
    yield "added_tokens_decoder, and a map", together(_decoder(), named, edit(special, bos_token=end))
    for kind in ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2TokenizerFast", ABSENT):
        yield f"tokenizer_class {kind if isinstance(kind, str) else 'absent'}", edit(config, tokenizer_class=kind)
    yield "an extra special token", _extra("<new>")
    yield "a named special token", _named(family)
    yield "additional_special_tokens", edit(config, additional_special_tokens=[start, end])
    yield "add_bos_token", together(edit(config, add_bos_token=True, bos_token=start))
    yield (
        "add_bos_token and a template that writes it",
        together(named, edit(config, add_bos_token=True, bos_token=start)),
    )
    yield "add_eos_token", together(edit(config, add_eos_token=True))
    yield "a post-processor that adds bos", _post_processor(start)
    yield "a post-processor, and a template that writes it", together(named, _post_processor(start))
    yield (
        "added_tokens.json, alike",
        edit("added_tokens.json", **{start: _number(family, start), end: _number(family, end)}),
    )
    yield "added_tokens.json, contradicting", edit("added_tokens.json", **{start: _number(family, end)})
    yield "added_tokens.json, a token more", edit("added_tokens.json", **{"<more>": 310})
    yield (
        "files of another tokenizer beside",
        together(edit("vocab.json", a=0, b=1), _write("merges.txt", "#version: 0.2\na b\n")),
    )
    yield "legacy", edit(config, legacy=True)
    yield "split_special_tokens", edit(config, split_special_tokens=True)
    yield "chat template in the tokenizer's own name", edit(config, chat_template="{{ 1 }}")
    yield "truncation left by training", _state(truncation={"direction": "Right", "max_length": 8, **_TRUNCATION})
    yield "padding left by training", _state(padding=_PADDING)
    yield "model_max_length", edit(config, model_max_length=16)
    yield "padding_side", edit(config, padding_side="left")
    yield "clean_up_tokenization_spaces", edit(config, clean_up_tokenization_spaces=True)


def _number(family: str, token: str) -> int:
    """The id of a token in the tiny checkpoints: special ones follow the 256 bytes in their order."""
    order = (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        if family == "qwen2_vl"
        else ("<|im_start|>", "<end_of_utterance>")
    )
    return 256 + order.index(token) if token in order else 297


def _write(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


_TRUNCATION = {"strategy": "LongestFirst", "stride": 0}
_PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "!",
}


def _bos_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text().removeprefix("<|im_start|>")
    path.write_text("{{ bos_token }}" + text)


def _decoder(swap: bool = False) -> Change:
    def change(folder: Path) -> None:
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        stated = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens}
        if swap:
            a, b, *_ = stated
            stated[a], stated[b] = stated[b], stated[a]
        edit("tokenizer_config.json", added_tokens_decoder=stated)(folder)

    return change


def _extra(token: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        stated = json.loads(path.read_text()).get("extra_special_tokens") or []
        more = {**stated, "new_token": token} if isinstance(stated, dict) else [*stated, token]
        edit(path.name, extra_special_tokens=more)(folder)

    return change


def _named(family: str) -> Change:
    token = {"qwen2_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}.get(family, "<image>")
    return edit("tokenizer_config.json", image_token=token)


def _post_processor(token: str) -> Change:
    def change(folder: Path) -> None:
        from tokenizers import Tokenizer, processors

        path = str(folder / "tokenizer.json")
        core = Tokenizer.from_file(path)
        core.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, core.token_to_id(token))]
        )
        core.save(path)

    return change


def _state(**state: Any) -> Change:
    return edit("tokenizer.json", **state)


# ---------------------------------------------------------------- stop ids and weights
def _stops() -> Iterator[tuple[str, Change]]:
    own, config = "generation_config.json", "config.json"
    for name, value in (("null", NULL), ("absent", ABSENT), ("another", 261), ("a list", [257, 262])):
        yield f"stop id {name} in {own}", edit(own, eos_token_id=value)
        yield f"stop id {name} at the top of {config}", edit(config, eos_token_id=value)
        yield f"no {own}, stop id {name} at the top", together(_without(own), edit(config, eos_token_id=value))
        yield f"no {own}, stop id {name} in text_config", together(_without(own), _text(eos_token_id=value))
    yield (
        f"no {own}, both, contradicting",
        together(_without(own), edit(config, eos_token_id=260), _text(eos_token_id=262)),
    )
    for name, value in (
        ("repetition_penalty", 1.3),
        ("suppress_tokens", [3, 4]),
        ("bad_words_ids", [[5, 6]]),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 2),
        ("stop_strings", ["end"]),
        ("do_sample", True),
        ("num_beams", 3),
    ):
        yield f"{name} in {own}", edit(own, **{name: value})


def _without(name: str) -> Change:
    return lambda folder: (folder / name).unlink(missing_ok=True)


def _text(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text())
        for key, value in values.items():
            if value is ABSENT:
                data["text_config"].pop(key, None)
            else:
                data["text_config"][key] = value
        path.write_text(json.dumps(data))

    return change


def _weights() -> Iterator[tuple[str, Change]]:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    yield "an index left over", edit("model.safetensors.index.json", **index)
    yield "quantization_config left over", edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    yield "dtype null", edit("config.json", dtype=NULL)
    yield "architectures null", edit("config.json", architectures=NULL)
