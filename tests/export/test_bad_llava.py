"""LLaVA checkpoints whose files contradict each other, or ask for something that nobody handles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.errors import ConfigError, WeightsError
from tests.export.test_bad_input import assert_fails, edit_json, edit_weights
from tests.tiny import save_tiny_llava


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    save_tiny_llava(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.update(projector_hidden_act="swish"), "projector_hidden_act = 'swish'"),
        (lambda c: c.update(vision_feature_layer=-5), "vision_feature_layer = -5"),
        (lambda c: c.update(vision_feature_layer=[1, 4]), "vision_feature_layer = [1, 4]"),
        (lambda c: c.update(vision_feature_layer=[]), "vision_feature_layer = []"),
        (lambda c: c.update(vision_feature_layer=0), "vision_feature_layer = 0"),
        (lambda c: c.update(vision_feature_select_strategy="cls"), "vision_feature_select_strategy"),
        (lambda c: c.update(image_token_index=3), "image_token_id = 3"),
        (lambda c: c.pop("text_config"), "llava-hf/llava-1.5-7b-hf"),
        (lambda c: c["text_config"].update(model_type="gpt_neox"), "text_config.model_type = 'gpt_neox'"),
        (lambda c: c["text_config"].update(vocab_size=280), "vocab_size is 280"),
        (lambda c: c["vision_config"].update(model_type="dinov2"), "vision_config.model_type = 'dinov2'"),
        (lambda c: c["vision_config"].update(hidden_act="gelu_new"), "hidden_act = 'gelu_new'"),
        (lambda c: c["vision_config"].update(image_size=[48, 32]), "image_size = [48, 32]"),
        (lambda c: c["vision_config"].update(num_attention_heads=3), "number of attention heads (3)"),
    ],
)
def test_config(checkpoint: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    edit_json(checkpoint / "config.json", change)
    assert_fails(checkpoint, ConfigError, word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c["image_processor"].update(crop_size=56), "56×56 px, the vision tower takes 48×48 px"),
        (lambda c: c["image_processor"].update(crop_size={"height": 40, "width": 48}), "40×48 px"),
        (lambda c: c["image_processor"].update(do_center_crop=False), "images of any size"),
        (lambda c: c["image_processor"].update(size={"longest_edge": 48}), "longest_edge"),
        (lambda c: c["image_processor"].update(do_rescale=False), "do_rescale"),
        (lambda c: c["image_processor"].update(do_pad=True), "do_pad"),
        (lambda c: c["image_processor"].update(resample=9), "resample"),
        (lambda c: c["image_processor"].update(image_processor_type="ViTImageProcessor"), "ViTImageProcessor"),
        (lambda c: c.pop("image_processor"), "preprocessor_config.json"),
        (lambda c: c.update(patch_size=16), "9 tokens for an image, the model makes 36"),
        (lambda c: c.update(num_additional_image_tokens=0), "35 tokens for an image, the model makes 36"),
        (lambda c: c.update(vision_feature_select_strategy="full"), "37 tokens for an image"),
        (lambda c: c.update(image_token="<picture>"), "<picture>"),
    ],
)
def test_processor(checkpoint: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    edit_json(checkpoint / "processor_config.json", change)
    assert_fails(checkpoint, ConfigError, word)


def test_weights_of_another_layout(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda w: w.pop("language_model.model.embed_tokens.weight"))
    assert_fails(checkpoint, WeightsError, "model.language_model.embed_tokens.weight")


@pytest.mark.parametrize(
    "name", ["vision_tower.encoder.layers.1.mlp.fc1.bias", "multi_modal_projector.linear_2.weight"]
)
def test_missing_weight(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda w: w.pop(name))
    assert_fails(checkpoint, WeightsError, name)


@pytest.mark.parametrize("name", ["vision_tower.class_head.weight", "language_model.model.layers.7.mlp.up_proj.weight"])
def test_unused_weight(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda w: w.update({name: np.zeros((1, 64), np.float32)}))
    assert_fails(checkpoint, WeightsError, name, "drop it silently")
