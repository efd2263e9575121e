"""InternVL in both layouts: parity over a table of tiny configurations, and what only this family has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.export import pipeline
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.families.internvl import FAMILY
from mllm_edge.export.pipeline import export
from tests.families.parity import PROMPTS, Exported, check_parity, export_tiny, make_image
from tests.tiny_internvl import save_tiny_internvl, save_tiny_internvl_chat

ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
QK_NORM = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}

# transformers' layout.
SAVED: dict[str, dict[str, Any]] = {
    "qwen2_untied": {},
    "qwen2_tied": {"config": {"tie_word_embeddings": True}},
    "llama_no_template": {"text": {"model_type": "llama", "num_key_value_heads": 4}, "template": None},
    "qwen3": {"text": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}},
    "state_dict_names": {"names": "state_dict", "images": {"min_patches": 2, "max_patches": 3}},
    "rms_norm_qk_norm": {"vision": QK_NORM, "images": {"crop_to_patches": True}},
    "one_tile": {"images": {"max_patches": 1, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
    "inner_layer": {"config": {"vision_feature_layer": -2}},
    "last_layer_before_the_norm": {"config": {"vision_feature_layer": 3}, "vision": {"use_mean_pooling": False}},
    "last_norm_mask_token": {"vision": {"use_mean_pooling": False, "use_mask_token": True}},
    "quarter_relu": {
        "config": {"downsample_ratio": 0.25, "projector_hidden_act": "relu"},
        "vision": {"image_size": 48},
    },
    "sharded_many_tiles": {"shard_size": "300KB", "seed": 3, "images": {"max_patches": 12}},
}
# The original layout.
CHAT: dict[str, dict[str, Any]] = {
    "chat_qwen2": {},
    "chat_qwen2_tied": {"config": {"tie_word_embeddings": True}, "top": {"use_thumbnail": False}},
    "chat_llama": {"text": {"model_type": "llama"}, "top": {"min_dynamic_patch": 2, "max_dynamic_patch": 4}},
    "chat_qwen3": {"text": {"model_type": "qwen3"}, "top": {"force_image_size": None}},
    "chat_internlm2": {"internlm2": True, "text": {"num_key_value_heads": 1}},
    "chat_internlm2_dynamic_sharded": {"internlm2": True, "text": {"rope_parameters": ROPE}, "shards": 2, "seed": 1},
    "chat_internlm2_multi_head_tied": {
        "internlm2": True,
        "text": {"num_key_value_heads": 4},
        "config": {"tie_word_embeddings": True},
    },
    "chat_rms_norm_qk_norm": {"vision": QK_NORM, "top": {"max_dynamic_patch": 1}},
    "chat_static": {"top": {"dynamic_image_size": False}, "vision": {"norm_type": "rms_norm"}},
    "chat_inner_layer": {"config": {"vision_feature_layer": -2}, "vision": {"attention_bias": False}},
}
CONFIGS = {**SAVED, **CHAT}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strips": ("Read.", [(2, 400), (350, 3)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    save = save_tiny_internvl_chat if request.param in CHAT else save_tiny_internvl
    return export_tiny(tmp_path_factory.mktemp(request.param), save, **CONFIGS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_parity(exported: Exported, case: str) -> None:
    check_parity(exported, case, CASES)


def test_every_model_type_of_the_family_is_in_the_table(tmp_path: Path) -> None:
    save_tiny_internvl(tmp_path / "saved", **SAVED["qwen2_untied"])
    save_tiny_internvl_chat(tmp_path / "chat", **CHAT["chat_qwen2"])
    tested = {open_source(str(tmp_path / name)).model_type for name in ("saved", "chat")}
    assert tested == set(FAMILY.model_types)


@pytest.mark.parametrize("name", CHAT)
def test_reference_of_the_original_layout_is_the_model_itself(tmp_path: Path, name: str) -> None:
    saved = save_tiny_internvl_chat(tmp_path / "chat", **CHAT[name]).state_dict()
    loaded = FAMILY.load_model(open_source(str(tmp_path / "chat"))).state_dict()
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2_untied", "rms_norm_qk_norm", "chat_internlm2", "chat_qwen2_tied"])
def test_export_compares_with_the_source(tmp_path: Path, name: str, recipe: str) -> None:
    save = save_tiny_internvl_chat if name in CHAT else save_tiny_internvl
    save(tmp_path / "checkpoint", **CONFIGS[name])
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name=recipe)
    assert report.parity["samples"] == 3
    assert report.parity["pixel_values"] <= 1.0
    assert np.isfinite(list(report.parity["errors"].values())).all()


@pytest.mark.parametrize("name", ["qwen3", "chat_internlm2", "chat_qwen2"])
def test_large_model_is_compared_by_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save = save_tiny_internvl_chat if name in CHAT else save_tiny_internvl
    config = CONFIGS[name]
    save(tmp_path / "checkpoint", **{**config, "text": {**config.get("text", {}), "num_hidden_layers": 3}})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["scope"] == "decoder: first 2 layers and head"
    assert len(Bundle.load(tmp_path / "out").manifest.model.state[0].layers) == 3


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("chat"), save_tiny_internvl_chat)


def test_prompt_of_an_original_checkpoint(chat: Exported) -> None:
    with VLM.load(chat.bundle) as vlm:
        asked = vlm.processor.process("What is it?", [make_image(40, 40, 0)]).text
        system, _, rest = asked.partition("<|im_end|>\n")
        assert system.startswith("<|im_start|>system\n你是书生·万象")
        assert rest == "<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            {"role": "user", "content": "Bye."},
        ]
        turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Bye.")]
        expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        assert vlm.processor.process(messages).text == f"{expected}<|im_start|>assistant\n"


def test_older_templates_have_no_line_break_between_turns(tmp_path: Path) -> None:
    exported = export_tiny(
        tmp_path, save_tiny_internvl_chat, internlm2=True, top={"system_message": 'It\'s "one".\nTwo.'}
    )
    with VLM.load(exported.bundle) as vlm:
        text = vlm.processor.process("Hi").text
    assert text == (
        '<|im_start|>system\nIt\'s "one".\nTwo.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n'
    )


def test_original_code_makes_the_prompt_whatever_the_tokenizer_has(tmp_path: Path) -> None:
    save_tiny_internvl_chat(tmp_path / "a", template="the decoder's own", top={"system_message": None})
    save_tiny_internvl_chat(tmp_path / "b", template="the decoder's own")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    texts = []
    for name in ("a", "b"):
        export(str(tmp_path / name), tmp_path / f"{name}.bundle", verify_mode="off")
        with VLM.load(tmp_path / f"{name}.bundle") as vlm:
            texts.append(vlm.processor.process("Hi").text)
    assert texts[0].startswith("<|im_start|>system\n你是书生·万象")
    assert texts[0].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1] == "Hi!"


def test_template_of_the_tokenizer_serves_an_unknown_one_even_if_it_reads_strings_only(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    exported = export_tiny(tmp_path, save_tiny_internvl_chat, template=template, top={"template": "unheard-of"})
    with VLM.load(exported.bundle) as vlm:
        image = make_image(64, 64, 0)
        asked = vlm.processor.process("What is it?", [image, image])
        assert asked.text == "<user><IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat is it?"
        assert len(asked.image_positions) == 2 * 5 * 16


def test_an_original_checkpoint_stops_at_the_end_of_a_turn(chat: Exported, tmp_path: Path) -> None:
    with VLM.load(chat.bundle) as vlm:
        assert vlm.tokenizer.encode("<|im_end|>")[0] in vlm.stop_ids
    save_tiny_internvl_chat(tmp_path / "more", internlm2=True, text={"eos_token_id": 2})
    export(str(tmp_path / "more"), tmp_path / "bundle", verify_mode="off")
    assert set(Bundle.load(tmp_path / "bundle").generation().eos_token_ids) == {2, 297}


def test_tiles_stand_between_two_words_and_are_counted_beforehand(chat: Exported) -> None:
    with VLM.load(chat.bundle) as vlm:
        for (height, width), tiles in {(20, 20): 1, (64, 64): 5, (30, 90): 4, (300, 40): 7}.items():
            asked = vlm.processor.process("Hi", [make_image(height, width, 0)])
            assert len(asked.pixel_values) == tiles
            assert len(asked.image_positions) == tiles * 16
            assert np.array_equal(np.diff(asked.image_positions), np.ones(tiles * 16 - 1))
            first, last = asked.image_positions[[0, -1]]
            around = [vlm.tokenizer.token(int(asked.token_ids[i])) for i in (first - 1, last + 1)]
            assert around == ["<img>", "</img>"]
            assert vlm.count_tokens("Hi", [(height, width)]) == len(asked.token_ids)


def test_layers_behind_the_chosen_one_are_left_out(tmp_path: Path) -> None:
    sizes = {}
    for layer in (1, -1):
        save_tiny_internvl(tmp_path / str(layer), config={"vision_feature_layer": layer})
        sizes[layer] = export(str(tmp_path / str(layer)), tmp_path / "out", dry_run=True).components["vision_encoder"]
    assert sizes[1] < 0.6 * sizes[-1]  # one layer of three, and what the layers share


def test_sharded_configurations_have_several_files(tmp_path: Path) -> None:
    save_tiny_internvl(tmp_path / "saved", **SAVED["sharded_many_tiles"])
    save_tiny_internvl_chat(tmp_path / "chat", **CHAT["chat_internlm2_dynamic_sharded"])
    for folder in ("saved", "chat"):
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 1
