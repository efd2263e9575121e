"""LLaVA: parity over a table of tiny configurations, and the prompt of a checkpoint without a template."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.export import pipeline
from mllm_edge.export.pipeline import export
from tests.families.parity import PROMPTS, Exported, check_parity, export_tiny, make_image
from tests.tiny import save_tiny_llava

SIGLIP = {"model_type": "siglip_vision_model"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_multi_head_no_template": {"text": {"num_key_value_heads": 4}, "template": None},
    "mistral_window": {"text": {"model_type": "mistral", "sliding_window": 24}, "config": {"vision_feature_layer": 2}},
    "qwen2_tied": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}},
    "gemma3_window": {
        "text": {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "config": {"tie_word_embeddings": True},
    },
    "last_layer_full": {"config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}},
    "several_layers": {"config": {"vision_feature_layer": [-2, 1, -1], "multimodal_projector_bias": False}},
    "several_layers_full": {
        "config": {"vision_feature_layer": [0, 3], "vision_feature_select_strategy": "full"},
        "vision": {"hidden_act": "gelu"},
    },
    "embeddings_only": {"config": {"vision_feature_layer": [0], "projector_hidden_act": "relu"}},
    "siglip_full_qwen2": {
        "text": {"model_type": "qwen2"},
        "vision": {**SIGLIP, "image_size": 54},
        "config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "images": "siglip",
    },
    "siglip_drops_a_patch": {"vision": {**SIGLIP, "vision_use_head": False}, "images": "siglip"},
    "padded_to_square": {"images": "llava", "image_settings": {"do_pad": True}},
    "larger_before_the_crop": {"image_settings": {"size": {"shortest_edge": 57}, "resample": 2}},
    "cropped_beyond_the_image": {"image_settings": {"size": {"shortest_edge": 31}}},
    "sharded": {"shard_size": "200KB", "seed": 3},
    "state_dict_names": {"names": "state_dict"},
    "hub_names": {"names": "hub", "config": {"projector_hidden_act": "gelu_pytorch_tanh"}},
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp(request.param), save_tiny_llava, **CONFIGS[request.param])


@pytest.mark.parametrize("case", PROMPTS)
def test_parity(exported: Exported, case: str) -> None:
    check_parity(exported, case)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("bare"), save_tiny_llava, template=None)


def test_prompt_of_a_checkpoint_without_a_template(bare: Exported) -> None:
    with VLM.load(bare.bundle) as vlm:
        asked = vlm.processor.process("What is it?", [make_image(40, 50, 0)])
        assert asked.text == "USER: <image>\nWhat is it? ASSISTANT:"
        assert vlm.processor.process("Hello.").text == "USER: Hello. ASSISTANT:"
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ]
        text = vlm.processor.process(messages, [make_image(40, 50, 0)]).text
        assert text == "Be brief. USER: <image>\nWhat? ASSISTANT: A cup. USER: Sure? ASSISTANT:"


def test_one_placeholder_per_feature(bare: Exported) -> None:
    with VLM.load(bare.bundle) as vlm:
        image = make_image(30, 90, 0)
        assert len(vlm.processor.process("Hi", [image, image]).image_positions) == 2 * (48 // 8) ** 2
        assert vlm.count_tokens("Hi", [(30, 90)]) == len(vlm.processor.process("Hi", [image]).token_ids)


def test_layers_behind_the_last_tap_are_left_out(tmp_path: Path) -> None:
    sizes = {}
    for layer in (1, -1):
        save_tiny_llava(tmp_path / str(layer), config={"vision_feature_layer": layer})
        report = export(str(tmp_path / str(layer)), tmp_path / "out", dry_run=True)
        sizes[layer] = report.components["vision_encoder"]
    assert sizes[1] < 0.6 * sizes[-1]  # one layer of three, and what the layers share


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_export_compares_with_the_source(tmp_path: Path, recipe: str) -> None:
    save_tiny_llava(tmp_path / "checkpoint", text={"model_type": "qwen2"})
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name=recipe)
    assert report.parity["samples"] == 3
    assert report.parity["pixel_values"] <= 1.0
    assert np.isfinite(list(report.parity["errors"].values())).all()


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_large_model_is_compared_by_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    save_tiny_llava(tmp_path / "checkpoint", text={"model_type": model_type, "num_hidden_layers": 3})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["scope"] == "decoder: first 2 layers and head"


def test_sharded_configuration_has_several_files(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path, **CONFIGS["sharded"])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
