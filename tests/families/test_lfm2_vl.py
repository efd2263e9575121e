"""LFM2-VL: its image processor against transformers', which needs torchvision; tiles, refusals, predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import BundleError, ImageError, OptionError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for, open_weights, understand
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.budget import image_cost
from mllm_edge.runtime.planning.shapes import layouts_of, stage_runs
from mllm_edge.runtime.profiling.memory import predict_images
from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.spec import ImageSpec
from tests.families.parity import Exported, export_tiny, make_image
from tests.families.rows.lfm2_vl import CONFIGS
from tests.families.torchvision_processor import ask_transformers, picture
from tests.tiny_lfm2_vl import save_tiny_lfm2_vl

PUBLISHED = {
    "vision": {"patch_size": 16},
    "image_settings": {"min_image_tokens": 64, "max_image_tokens": 256, "tile_size": 512, "max_tiles": 10},
}
COMPARED: dict[str, dict[str, Any]] = {
    **{name: CONFIGS[name] for name in ("tiles_and_the_whole", "without_the_whole", "never_cut")},
    "cells_of_nine_patches": CONFIGS["cells_of_nine_patches"],
    "twelve_tiles": {"image_settings": {"max_tiles": 12, "min_tiles": 3}},
    "published": PUBLISHED,
}
SIDES = (1, 7, 8, 16, 24, 31, 40, 63, 64, 90, 128, 160, 240, 511, 512, 513, 724, 900, 1080, 1920)
# What makes a prompt: (height, width, kind). Some tiles, some whole, one and several of one size or not.
SMALL = [
    [(64, 64, "smooth")],
    [(301, 60, "smooth"), (20, 55, "noise")],
    [(1, 1, "smooth"), (150, 190, "noise"), (150, 190, "smooth")],
    [(100, 330, "noise")],
]
LARGE = [[(480, 640, "noise")], [(1080, 1920, "smooth")], [(700, 300, "noise"), (1000, 1001, "noise")]]


def sizes() -> list[tuple[int, int]]:
    """Sides that are multiples and beside them, with each other and with random ones."""
    random = np.random.default_rng(0)
    return [(a, b) for a in SIDES for b in SIDES] + [
        tuple(map(int, pair)) for pair in random.integers(1, 900, (600, 2))
    ]


def pictures(name: str) -> list[list[tuple[int, int, str]]]:
    return LARGE if name == "published" else SMALL


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for each of `COMPARED`, and beside it what transformers' own processor makes of what it is asked."""
    folder = tmp_path_factory.mktemp("compared")
    for name, config in COMPARED.items():
        save_tiny_lfm2_vl(folder / "in" / name, **config)
        (folder / "in" / name / "asked.json").write_text(json.dumps({"pictures": pictures(name), "sizes": sizes()}))
    ask_transformers(folder)
    return folder


def spec_of(checkpoint: Path) -> ImageSpec:
    source = open_source(str(checkpoint))
    image = understand(source, open_weights(source)).model.image
    assert image is not None
    return image


@pytest.mark.parametrize("name", COMPARED)
def test_prompts_and_pixels_are_those_of_transformers(compared: Path, name: str) -> None:
    """Grids, ids and counts are equal; a pixel is one level of 255 away at most: torchvision rounds once where Pillow
    rounds twice, and on processors without AVX-512 as Pillow does."""
    source, found = open_source(str(compared / "in" / name)), np.load(compared / "out" / f"{name}.npz")
    processor = family_for(source).load_processor(source)
    for i, shown in enumerate(pictures(name)):
        inputs = processor(text="<image>" * len(shown) + "?", images=[picture(*p) for p in shown], return_tensors="pt")
        ours = {key: tensor.numpy() for key, tensor in inputs.items()}
        assert set(ours) == {key.split(".", 1)[1] for key in found.files if key.startswith(f"{i}.")}
        for key in ("input_ids", "attention_mask", "spatial_shapes"):
            np.testing.assert_array_equal(ours[key], found[f"{i}.{key}"])
        longest = ours["pixel_values"].shape[1]
        theirs, mask = found[f"{i}.pixel_values"], found[f"{i}.pixel_attention_mask"]
        np.testing.assert_array_equal(ours["pixel_attention_mask"], mask[:, :longest])
        assert not mask[:, longest:].any()
        levels = (
            np.abs(ours["pixel_values"] - theirs[:, :longest]).reshape(-1, 3)
            * 255
            * processor.image_processor.image_std
        )
        assert levels.max() <= 1.0 + 1e-4


@pytest.mark.parametrize("name", COMPARED)
def test_layouts_are_those_of_transformers(compared: Path, name: str) -> None:
    image = spec_of(compared / "in" / name)
    expected = np.load(compared / "out" / f"{name}.npz")["layouts"].tolist()
    refused, cut, patches = 0, 0, image.patches
    assert patches is not None
    tile, whole_behind = image.transforms[0].size // image.height, image.transforms[0].overview
    for (height, width), (rows, cols, high, wide, most) in zip(sizes(), expected, strict=True):
        whole = (high // image.height, wide // image.width)
        tiles = rows * cols if rows * cols > 1 else 0
        grids = [(tile, tile)] * tiles + [whole] * (whole_behind or not tiles)
        if max(a * b for a, b in grids) * patches.merge**2 > most:  # its own mask has no places for them
            with pytest.raises(ImageError, match="less extreme aspect ratio"):
                layout_of(image, height, width)
            refused += 1
            continue
        found = layout_of(image, height, width)
        assert found.grids == tuple(grids)
        assert found.tiles == len(grids)
        assert found.slices == found.tokens == sum(a * b for a, b in grids) == found.text.count("<image>")
        assert (found.rows, found.cols) == ((rows, cols) if tiles else whole)
        assert found.text.count("<|img_row_") == tiles
        cut += bool(tiles)
    assert refused
    assert bool(cut) == (name != "never_cut")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_lfm2_vl)


def test_text_of_an_image(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        image = vlm.spec.image
        assert image is not None
        small = layout_of(image, 30, 60)
        assert small.grids == ((2, 4),)
        assert small.text == "<|image_start|>" + "<image>" * 8 + "<|image_end|>"
        large = layout_of(image, 60, 190)
        assert large.grids == ((4, 4), (4, 4), (4, 4), (2, 7))
        tiles = "".join(f"<|img_row_1_col_{col}|>" + "<image>" * 16 for col in (1, 2, 3))
        assert large.text == f"<|image_start|>{tiles}<|img_thumbnail|>" + "<image>" * 14 + "<|image_end|>"
        asked = vlm.processor.process_text("<image>", make_image(30, 60, 0))
        assert len(asked.token_ids) == 10  # no token is added to a text, as in transformers' processor


def test_markers_in_a_text_stay_text(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        image = make_image(100, 200, 0)
        asked = vlm.processor.process("What is this?", image)
        for marker in ("<image>", "<|image_start|>", "<|img_row_1_col_2|>", "<|img_thumbnail|>", "<|im_end|>"):
            prompt = vlm.processor.process(f"What is {marker}?", image)
            number = vlm.tokenizer.token_id(marker)
            assert (prompt.token_ids == number).sum() == (asked.token_ids == number).sum()


def test_each_grid_has_a_run_and_positions_of_its_own(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        images = [make_image(60, 190, 0), make_image(30, 60, 1)]
        together = vlm.stage_outputs(vlm.processor.process("?", images))["vision_encoder"]["vision_hidden"]
        alone = [
            vlm.stage_outputs(vlm.processor.process("?", image))["vision_encoder"]["vision_hidden"] for image in images
        ]
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
        # A tile sees itself alone: with another neighbour it is the same.
        pixels = np.array(images[0].resize((192, 64), Image.Resampling.BILINEAR))
        pixels[:, 64:] = 0
        other = vlm.stage_outputs(vlm.processor.process("?", Image.fromarray(pixels)))["vision_encoder"][
            "vision_hidden"
        ]
        np.testing.assert_allclose(other[:16], alone[0][:16], atol=1e-4)
        assert np.abs(other[16:48] - alone[0][16:48]).max() > 0.1


def test_cost_and_predictions_follow_the_grids(plain: Exported) -> None:
    bundle = Bundle.load(plain.bundle)
    model, image = bundle.manifest.model, bundle.manifest.model.image
    assert image is not None
    layouts = layouts_of(image, [(190, 60), (60, 30)])  # (width, height)
    variants = {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}
    for stage in model.stages:
        runs = stage_runs(model, stage, variants, layouts)
        assert runs == [({"cells": n}, 1) for n in (16, 16, 16, 14, 8)]
    assert predict_images(bundle, layouts, [(190, 60), (60, 30)]) == 3 * (190 * 60 + 60 * 30) + 4 * 70 * 4 * 192
    cost = image_cost(bundle, (60, 190))
    assert (cost.tiles, cost.grid, cost.image_tokens) == (4, (1, 3), 62)
    with VLM.load(plain.bundle) as vlm:
        metrics = vlm.generate("", make_image(60, 190, 0), max_new_tokens=1).metrics
    assert (cost.tiles, cost.image_tokens, cost.prompt_tokens) == (4, metrics.image_tokens, metrics.prompt_tokens)
    for size, said in (("60x190", "4 tiles (1 x 3 and the whole), 62 image"), ("30x60", "2 x 4 cells, 8 image")):
        assert said in CliRunner().invoke(main, ["inspect", str(plain.bundle), "--image-size", size]).output


def test_what_cannot_be_is_refused(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        with pytest.raises(OptionError, match="speculation: this model has layers with a recurrent state"):
            vlm.generate("Hi", speculation=3)
        with pytest.raises(ImageError, match=r"an image of 2×300 px takes 1×\d+ cells, and the model 16 at most"):
            vlm.processor.process("Hi", make_image(2, 300, 0))
        image = vlm.spec.image
        assert image is not None
        with pytest.raises(BundleError, match=r"vision_positions\.npy: \[15, 48\], not \[16, 48\]"):
            table_inputs(image, 1, 1, {"vision_positions.npy": np.zeros((15, 48), np.float32)})


def test_the_comparison_says_whose_images_they_are(tmp_path: Path) -> None:
    save_tiny_lfm2_vl(tmp_path / "checkpoint", **CONFIGS["as_on_the_hub"])
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", targets=("cpu",), recipe_name="fp32")
    assert [note for note in report.parity["notes"] if "image processor runs on torchvision alone" in note]
    assert report.parity["greedy_agreement"] == 1
