"""Qwen2-VL checkpoints whose files contradict each other or ask for what nobody handles, and images at the limits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import ConfigError, ImageError, OptionError, PromptError, WeightsError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.families.qwen2_vl import FAMILY
from mllm_edge.export.pipeline import export
from tests.export.test_bad_input import assert_fails, edit_json, edit_weights
from tests.families.parity import make_image
from tests.tiny import save_tiny_qwen2_vl


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    save_tiny_qwen2_vl(folder)
    return folder


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def test_undamaged_checkpoint_is_accepted(checkpoint: Path, tmp_path: Path) -> None:
    assert export(str(checkpoint), tmp_path / "out", dry_run=True).nbytes > 0


@pytest.mark.parametrize(
    ("section", "key", "value", "word"),
    [
        (None, "image_token_id", 3, "image_token_id = 3"),
        (None, "image_token_id", None, "image_token_id"),
        ("vision_config", "patch_size", 16, "patch_size is 8, the vision tower's 16"),
        ("vision_config", "spatial_merge_size", 4, "merge_size is 2, the vision tower's 4"),
        ("vision_config", "temporal_patch_size", 1, "temporal_patch_size is 2, the vision tower's 1"),
        ("vision_config", "spatial_merge_size", 0, "spatial_merge_size = 0"),
        ("vision_config", "patch_size", -8, "patch_size = -8"),
        ("vision_config", "hidden_size", 48, "hidden_size 48, but the text model's is 64"),
        ("vision_config", "num_heads", 8, "embed_dim 48 does not make num_heads 8 heads"),
        ("vision_config", "num_heads", 0, "num_heads = 0"),
        ("vision_config", "hidden_act", "gelu_new", "hidden_act = 'gelu_new'"),
        ("vision_config", "in_channels", 4, "in_channels = 4"),
        ("vision_config", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "linear"),
        ("vision_config", "rope_parameters", {"rope_type": "axial", "rope_theta": 1e4, "factor": 2.0}, "factor"),
        ("text_config", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("text_config", "vocab_size", 260, "vocab_size is 260"),
        (
            "text_config",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 3]},
            "mrope_section",
        ),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "mrope_section"),
    ],
)
def test_config(checkpoint: Path, section: str | None, key: str, value: Any, word: str) -> None:
    edit_json(checkpoint / "config.json", lambda c: (c[section] if section else c).update({key: value}))
    assert_fails(checkpoint, ConfigError, word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda i: i.update(patch_size=16), "patch_size is 16, the vision tower's 8"),
        (lambda i: i.update(merge_size=1), "merge_size is 1, the vision tower's 2"),
        (lambda i: i.update(temporal_patch_size=4), "temporal_patch_size is 4, the vision tower's 2"),
        (
            lambda i: i.update(size={"shortest_edge": 5000, "longest_edge": 4999}),
            "at least 5000 pixels of an image and at most 4999",
        ),
        (
            lambda i: i.update(min_pixels=20_000, max_pixels=19_999),
            "at least 20000 pixels of an image and at most 19999",
        ),
        (lambda i: i.update(min_pixels=0), "'shortest_edge': 0"),
        (lambda i: i.update(max_pixels="many"), "many"),
        (lambda i: i.update(size={"height": 64, "width": 64}), "'height': 64"),
        (lambda i: i.update(do_resize=False), "do_resize"),
        (lambda i: i.update(do_convert_rgb=False), "do_convert_rgb"),
        (lambda i: i.update(do_rescale=False), "do_rescale"),
        (lambda i: i.update(do_normalize=False), "do_normalize"),
        (lambda i: i.update(resample=9), "resample"),
        (lambda i: i.update(image_mean=[0.5, 0.5]), "image_mean"),
        (lambda i: i.update(image_mean=["a", 0.5, 0.5]), "image_mean"),
        (lambda i: i.update(image_std=[0.5, 0.0, 0.5]), "image_std = [0.5, 0.0, 0.5]"),
        (lambda i: i.update(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor"),
        (lambda i: i.clear(), "preprocessor_config.json"),
    ],
)
def test_image_processor(checkpoint: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    edit_json(checkpoint / "processor_config.json", lambda c: change(c["image_processor"]))
    assert_fails(checkpoint, ConfigError, word)


def test_image_processor_in_a_file_of_its_own(checkpoint: Path) -> None:
    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text())
    stated = settings.pop("image_processor")
    path.write_text(json.dumps(settings))
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({**stated, "merge_size": 3}))
    assert_fails(checkpoint, ConfigError, "merge_size is 3, the vision tower's 2", "preprocessor_config.json")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_special_token_missing(checkpoint: Path, token: str) -> None:
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace(token, "<|other|>"))
    assert_fails(checkpoint, ConfigError, token, "is missing")


def test_image_token_with_another_id(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    swapped = path.read_text().replace("<|image_pad|>", "<|swap|>").replace("<|video_pad|>", "<|image_pad|>")
    path.write_text(swapped.replace("<|swap|>", "<|video_pad|>"))
    assert_fails(checkpoint, ConfigError, "<|image_pad|> has id", "image_token_id")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "visual.blocks.1.attn.qkv.bias",
        "visual.merger.ln_q.weight",
        "visual.patch_embed.proj.weight",
    ],
)
def test_missing_weight(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda w: w.pop(name))
    assert_fails(checkpoint, WeightsError, name)


@pytest.mark.parametrize("name", ["visual.blocks.2.norm1.weight", "visual.patch_embed.proj.bias", "model.layers.9.x"])
def test_unused_weight(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda w: w.update({name: np.zeros((1, 48), np.float32)}))
    assert_fails(checkpoint, WeightsError, name, "drop it silently")


def test_patches_of_another_shape(checkpoint: Path) -> None:
    name = "visual.patch_embed.proj.weight"
    edit_weights(checkpoint, lambda w: w.update({name: w[name][:, :, :1].copy()}))
    assert_fails(checkpoint, WeightsError, name, "[48, 3, 1, 8, 8]", "[48, 3, 2, 8, 8]")


# ---------------------------------------------------------------- images
@pytest.fixture(scope="module")
def bundle(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "fp32"
    export(str(sound), out, recipe_name="fp32", verify_mode="off")
    return out


def test_aspect_ratio_beyond_the_limit(bundle: Path) -> None:
    with VLM.load(bundle) as vlm:
        assert vlm.count_tokens("Hi", [(1, 200)]) > 0
        for call in (
            lambda: vlm.generate("Hi", make_image(1, 201, 0)),
            lambda: vlm.generate("Hi", [make_image(40, 40, 0), make_image(402, 2, 0)]),
            lambda: vlm.count_tokens("Hi", [(201, 1)]),
        ):
            with pytest.raises(ImageError, match="more than 200 times") as error:
                call()
            assert "aspect ratio" in error.value.fix


def test_what_is_no_image(bundle: Path) -> None:
    with VLM.load(bundle) as vlm:
        with pytest.raises(OptionError, match="height of an image size"):
            vlm.count_tokens("Hi", [(0, 5)])
        with pytest.raises(PromptError, match="video"):
            vlm.generate([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("least", [1, 4 * 16**2])
def test_images_smaller_than_a_patch_are_what_the_reference_makes_of_them(
    checkpoint: Path, tmp_path: Path, least: int
) -> None:
    edit_json(checkpoint / "processor_config.json", lambda c: c["image_processor"].update(min_pixels=least))
    export(str(checkpoint), tmp_path / "out", recipe_name="fp32", verify_mode="off")
    reference = FAMILY.load_processor(open_source(str(checkpoint)))
    with VLM.load(tmp_path / "out") as vlm:
        for height, width in ((1, 1), (3, 5), (7, 1), (1, 150), (120, 1)):
            image = make_image(height, width, 0)
            ours = vlm.processor.process("Hi", image)
            expected = reference(text=ours.text, images=[image], return_tensors="np")
            assert ours.token_ids.tolist() == expected["input_ids"][0].tolist()
            assert [(1, 2 * layout.rows, 2 * layout.cols) for layout in ours.layouts] == [
                (*expected["image_grid_thw"][0],)
            ]
            theirs = expected["pixel_values"].reshape(ours.pixel_values.shape)
            np.testing.assert_allclose(ours.pixel_values, theirs, atol=4 / 255)
            assert vlm.generate("Hi", image, max_new_tokens=2, ignore_eos=True).metrics.new_tokens == 2
