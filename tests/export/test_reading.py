"""Folders with files of several ages, read as transformers reads them; what a user must know is told."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.reading import read_all
from benchmarks.reading_folders import FAMILIES
from mllm_edge.compare.cases import Case
from mllm_edge.errors import ConfigError, ParityError, PromptError, SourceError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.diagnosis import diagnose_checkpoint
from mllm_edge.export.family import open_weights, understand
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.vlm import VLM
from tests import tiny
from tests.tiny_internvl import save_tiny_internvl_chat


@pytest.mark.parametrize("family", FAMILIES)
def test_read_as_transformers_reads(family: str) -> None:
    results = read_all(family)
    loaded = [r for r in results if r["verdict"] != "transformers refuses"]
    assert [r for r in results if r["verdict"] in ("different", "error")] == []
    assert sum(r["verdict"] == "alike" for r in loaded) >= 0.95 * len(loaded) > 90


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_tiny_llava(tmp_path / "m")
    return tmp_path / "m"


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**data, **changes}))


def notices(folder: Path) -> str:
    source = open_source(str(folder))
    understand(source, open_weights(source))
    return "\n".join(source.notices)


def test_nothing_is_told_of_a_folder_in_order(folder: Path) -> None:
    assert notices(folder) == ""


def test_two_templates(folder: Path) -> None:
    """The one that the user just saved may be the one that is not read."""
    edit(folder / "chat_template.json", chat_template=(folder / "chat_template.jinja").read_text() + " older")
    later = (folder / "chat_template.json").stat().st_mtime + 10
    os.utime(folder / "chat_template.jinja", (later, later))
    told = notices(folder)
    assert "chat_template.json and chat_template.jinja hold different chat templates; chat_template.json counts" in told
    assert "chat_template.jinja was saved later and is not read" in told


def test_equal_templates_are_no_contradiction(folder: Path) -> None:
    edit(folder / "chat_template.json", chat_template=(folder / "chat_template.jinja").read_text().rstrip("\n"))
    assert notices(folder) == ""


def test_two_image_configurations(folder: Path) -> None:
    nested = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit(folder / "preprocessor_config.json", **{**nested, "image_mean": [0.5, 0.5, 0.5]})
    told = notices(folder)
    assert "processor_config.json and preprocessor_config.json differ in image_mean" in told
    assert "processor_config.json counts" in told


def test_two_names_of_a_token(folder: Path) -> None:
    edit(folder / "special_tokens_map.json", eos_token="<|im_start|>")
    told = notices(folder)
    assert "eos_token is '<|im_start|>' by special_tokens_map.json" in told
    assert "tokenizer_config.json says '<end_of_utterance>'" in told


def test_token_that_only_other_files_name(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", extra_special_tokens=["<new>"])
    assert "tokenizer.json does not hold '<new>' (297)" in notices(folder)


def test_two_tokens_with_one_id(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"259": {"content": "<|im_start|>"}})
    assert "id 259 is '<|im_start|>' in tokenizer_config.json and '<image>' in tokenizer.json" in notices(folder)


def test_stop_ids_that_contradict_each_other(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=260)
    edit(folder / "config.json", eos_token_id=257)
    told = notices(folder)
    assert "answers end at 260, as transformers reads it; config.json (257) says otherwise" in told
    assert "the tokenizer's eos_token '<end_of_utterance>' (257) is no stop id" in told


def test_no_stop_id_in_the_generation_settings(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 257
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(str(folder))
    plan = understand(source, open_weights(source))
    assert plan.texts.generation.eos_token_ids == (257,)
    assert "no stop id, with which transformers' answers do not end" in "\n".join(source.notices)


def test_settings_that_no_runtime_applies(folder: Path) -> None:
    edit(folder / "generation_config.json", num_beams=4, do_sample=True, typical_p=0.5)
    told = notices(folder)
    assert "num_beams = 4, typical_p = 0.5 is applied by transformers and not by this runtime" in told
    assert "do_sample = True" in told


def test_generation_settings_of_the_wrong_type(folder: Path) -> None:
    edit(folder / "generation_config.json", repetition_penalty="high")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        notices(folder)


# ---------------------------------------------------------------- the comparison
def test_own_picture_and_prompt(folder: Path, tmp_path: Path) -> None:
    """A photograph that lies on its side, in a file."""
    from PIL import Image

    from tests.families.parity import make_image

    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(60, 90, 3).save(tmp_path / "photo.jpg", exif=exif)
    case = Case("What <is> it?", (str(tmp_path / "photo.jpg"),))
    done = export(str(folder), tmp_path / "out", recipe_name="fp32", verify_cases=[case])
    assert done.parity["samples"] == 4
    assert done.parity["greedy_agreement"] == 1.0


def test_a_picture_of_16_bits(folder: Path, tmp_path: Path) -> None:
    """Pillow alone would call all but its darkest levels white."""
    grey = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "depth.png")
    case = Case("What is it?", (str(tmp_path / "depth.png"),))
    assert export(str(folder), tmp_path / "out", recipe_name="fp32", verify_cases=[case]).parity["samples"] == 4


@pytest.mark.parametrize("prompt", ["What is <image>?", "Go on.<end_of_utterance>"])
def test_a_question_that_spells_a_control_token(folder: Path, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(PromptError, match=r"spells '<.*stays text here") as caught:
        export(str(folder), tmp_path / "out", recipe_name="fp32", verify_cases=[Case(prompt)])
    assert "--verify-prompt" in caught.value.fix
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- values that nothing can be made of
ADAPTER = "adapter_model.safetensors"
WRONG: list[tuple[str, tuple[str, ...], Any]] = [
    ("config.json", ("text_config", "rope_parameters", "rope_theta"), "x"),
    ("config.json", ("text_config", "rope_parameters", "rope_type"), [None]),
    ("config.json", ("text_config", "num_hidden_layers"), 10**30),
    ("config.json", ("text_config", "head_dim"), 0),
    ("config.json", ("quantization_config",), "awq"),
    ("generation_config.json", ("eos_token_id",), [[1]]),
    ("processor_config.json", ("image_processor",), True),
    ("processor_config.json", ("image_processor", "crop_size"), None),
    ("processor_config.json", ("image_processor", "resample"), "bicubic"),
    ("processor_config.json", ("image_processor", "rescale_factor"), [None]),
    ("processor_config.json", ("image_token",), {}),
    ("processor_config.json", ("patch_size",), [None]),
]


@pytest.mark.parametrize(("name", "keys", "value"), WRONG)
def test_values_of_a_wrong_type(folder: Path, tmp_path: Path, name: str, keys: tuple[str, ...], value: Any) -> None:
    data = json.loads((folder / name).read_text())
    part = data
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (folder / name).write_text(json.dumps(data))
    with pytest.raises(SourceError) as caught:
        export(str(folder), tmp_path / "out", recipe_name="fp32", verify_mode="off")
    assert caught.value.fix
    assert not diagnose_checkpoint(folder).exports


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["null", "[]", '{"a":' * 100000 + "1" + "}" * 100000])
def test_files_that_hold_no_object(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert not diagnose_checkpoint(folder).exports


def test_an_adapter_with_a_broken_pattern(folder: Path) -> None:
    """PEFT's patterns are regular expressions."""
    key = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({key.format("A"): np.ones((2, 64), "f"), key.format("B"): np.ones((64, 2), "f")}, folder / ADAPTER)
    assert f"{ADAPTER} without adapter_config.json" in notices(folder)
    edit(folder / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"])
    assert diagnose_checkpoint(folder).exports
    edit(folder / "adapter_config.json", rank_pattern={"(": 2})
    assert not diagnose_checkpoint(folder).exports


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("gone")
    assert not diagnose_checkpoint(folder).exports


def test_tokens_of_a_tile_that_no_file_states(tmp_path: Path) -> None:
    """transformers takes 169 then, whatever the model makes."""
    tiny.save_tiny_idefics3(tmp_path / "m")
    settings = json.loads((tmp_path / "m/processor_config.json").read_text())
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (tmp_path / "m/processor_config.json").unlink()
    assert "image_seq_len = 16 is taken of it" in notices(tmp_path / "m")


def test_wrong_text_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime renders is compared with what transformers renders from the folder."""
    from mllm_edge.runtime.prompt.tokenizer import ChatTemplate

    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: render(*a, **k).replace("USER", "user"))
    with pytest.raises(ParityError, match=r"the prompt's text .* differ from transformers' at 0: 'user"):
        export(str(folder), tmp_path / "out", recipe_name="fp32")
    assert not (tmp_path / "out").exists()


def test_wrong_ids_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.runtime.prompt.tokenizer import Tokenizer

    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, *a: [*encode(self, *a)[:-1], 5])
    with pytest.raises(ParityError, match=r"the prompt's ids .* differ from transformers'"):
        export(str(folder), tmp_path / "out", recipe_name="fp32")


def test_wrong_pixels_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.runtime.prompt import shown

    load = shown.load_image
    monkeypatch.setattr(shown, "load_image", lambda source: load(source).transpose(0))
    with pytest.raises(ParityError, match="pixel_values differ"):
        export(str(folder), tmp_path / "out", recipe_name="fp32")


def test_a_reference_of_our_own_is_told(tmp_path: Path) -> None:
    save_tiny_internvl_chat(tmp_path / "m")
    done = export(str(tmp_path / "m"), tmp_path / "out", recipe_name="fp32")
    assert any("transformers has no class for this checkpoint" in note for note in done.parity["notes"])


def test_template_for_plain_text(tmp_path: Path) -> None:
    """transformers cannot render it with an image; the family's own markers go around it, and the result says so."""
    turns = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tiny.save_tiny_qwen2_vl(tmp_path / "m", template=turns)
    done = export(str(tmp_path / "m"), tmp_path / "out", recipe_name="fp32")
    assert any("cannot render this chat template with images" in note for note in done.parity["notes"])
    from tests.families.parity import make_image

    with VLM.load(tmp_path / "out") as vlm:
        text = vlm.processor.process("What?", [make_image(40, 40, 0)]).text
    assert "<|vision_start|><|image_pad|><|vision_end|>\nWhat?" in text


def test_the_first_idefics3(tmp_path: Path) -> None:
    """Its vocabulary holds three markers; the words for the whole image and for rows are plain text."""
    from transformers import PreTrainedTokenizerFast

    core = tiny.byte_tokenizer("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_start|>"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "make_tokenizer", lambda *a, **k: tokenizer)
        tiny.save_tiny_idefics3(tmp_path / "m")
    done = export(str(tmp_path / "m"), tmp_path / "out", recipe_name="fp32")
    assert done.parity["greedy_agreement"] == 1.0
