"""Phi-4 multimodal: its image processor against transformers', which needs torchvision; its adapter for images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BundleError, ImageError
from mllm_edge.export.checkpoint.adapter_files import NONE
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for, open_weights
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.prompt.learned_grid import cubic
from mllm_edge.runtime.prompt.shown_patches import shown_inputs, shown_patches
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import FitTiles, Normalize, Rescale, ShownPatches, WholeBefore
from tests.families.parity import Exported, export_tiny, make_image
from tests.families.torchvision_processor import ask_transformers, picture
from tests.tiny_phi4 import save_tiny_phi4

IMAGE, WEIGHT = "<|endoftext10|>", "model.layers.1.self_attn.qkv_proj.weight"
# As many patches a tile as the published checkpoint has, which transformers counts with whatever there are; and its
# sizes themselves.
COMPARED: dict[str, dict[str, Any]] = {
    "four_tiles": {"vision": {"patch_size": 2}},
    "one_tile": {
        "vision": {"image_size": 96, "crop_size": 96, "patch_size": 3},
        "image_settings": {"dynamic_hd": 1, "image_std": [0.3, 0.4, 0.5]},
    },
    "eight_tiles": {"vision": {"patch_size": 2}, "image_settings": {"dynamic_hd": 8}},
    "published": {
        "vision": {"image_size": 448, "crop_size": 448, "patch_size": 14, "num_hidden_layers": 1, "feature_layer": -1},
        "image_settings": {"dynamic_hd": 36},
    },
}
SIDES = (1, 9, 10, 11, 31, 33, 62, 63, 64, 65, 95, 96, 97, 128, 129, 160, 191, 193, 256, 300, 448, 500)
# What makes a prompt: (height, width, kind).
SMALL = [
    [(64, 64, "smooth")],
    [(301, 60, "noise"), (20, 55, "noise")],
    [(12, 12, "smooth"), (150, 190, "noise")],
    [(60, 101, "noise")],
]
LARGE = [[(480, 640, "smooth")], [(1344, 500, "noise")]]


def sizes() -> list[tuple[int, int]]:
    """Sides that are multiples and beside them, with each other and with random ones."""
    random = np.random.default_rng(0)
    return [(a, b) for a in SIDES for b in SIDES] + [tuple(map(int, p)) for p in random.integers(1, 600, (300, 2))]


def pictures(name: str) -> list[list[tuple[int, int, str]]]:
    return LARGE if name == "published" else SMALL


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for each of `COMPARED`, and beside it what transformers' own processor makes of what it is asked."""
    folder = tmp_path_factory.mktemp("compared")
    for name, config in COMPARED.items():
        save_tiny_phi4(folder / "in" / name, **config)
        (folder / "in" / name / "asked.json").write_text(json.dumps({"pictures": pictures(name), "sizes": sizes()}))
    ask_transformers(folder)
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_prompts_and_pixels_are_those_of_transformers(compared: Path, name: str) -> None:
    """Ids, sizes and masks are equal; a pixel of a tile is one level of 255 away at most, and of the overview two:
    torchvision rounds once where Pillow rounds twice, and a cubic enlarges that."""
    source, found = open_source(str(compared / "in" / name)), np.load(compared / "out" / f"{name}.npz")
    processor = family_for(source).load_processor(source)
    for i, shown in enumerate(pictures(name)):
        inputs = processor(text=IMAGE * len(shown) + "?", images=[picture(*p) for p in shown], return_tensors="pt")
        ours = {key: tensor.numpy() for key, tensor in inputs.items()}
        assert set(ours) == {key.split(".", 1)[1] for key in found.files if key.startswith(f"{i}.")}
        for key in ("input_ids", "attention_mask", "image_sizes", "image_attention_mask"):
            np.testing.assert_array_equal(ours[key], found[f"{i}.{key}"])
        theirs = found[f"{i}.image_pixel_values"]
        std = np.array(processor.image_processor.image_std)[:, None, None]
        levels = np.abs(ours["image_pixel_values"] - theirs) * 255 * std
        assert levels[:, 1:].max() <= 1.0 + 1e-4
        assert levels[:, 0].max() <= 2.0 + 1e-4


@pytest.mark.parametrize("name", COMPARED)
def test_layouts_are_those_of_transformers(compared: Path, name: str) -> None:
    settings = json.loads((compared / "in" / name / "preprocessor_config.json").read_text())
    step = FitTiles(settings["size"]["height"], settings["dynamic_hd"], 10, "bilinear")
    refused = 0
    expected = np.load(compared / "out" / f"{name}.npz")["layouts"].tolist()
    for (height, width), layout in zip(sizes(), expected, strict=True):
        if not any(layout):
            with pytest.raises(ImageError, match="10 px are the least"):
                cut_of(height, width, (step,))
            refused += 1
            continue
        cut = cut_of(height, width, (step,))
        assert [cut.rows, cut.cols, *shown_patches(cut, settings["patch_size"])] == layout, (height, width)
    assert refused


def test_overview_is_made_of_values() -> None:
    """Against torch, for a picture whose tiles are no square."""
    steps = (FitTiles(16, 6, 1, "nearest"), Rescale(1 / 255), Normalize((0.5,) * 3, (0.5,) * 3), WholeBefore())
    made = apply_transforms(make_image(32, 48, 0), steps)
    tiles = torch.from_numpy(made[1:]).reshape(2, 3, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 48)
    expected = torch.nn.functional.interpolate(tiles, size=(16, 16), mode="bicubic", align_corners=False)[0]
    np.testing.assert_allclose(made[0], expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(cubic(made[0], 16, 16), made[0])


def test_what_shows_nothing_is_hidden_and_has_no_place() -> None:
    spec = ShownPatches(4, 2, (0.5,))
    found = shown_inputs(spec, cut_of(8, 20, (FitTiles(16, 4, 1, "nearest"), WholeBefore())))
    places, bias = found["patch_places"].reshape(3, 4, 4), found["patch_bias"].reshape(3, 4, 4)
    whole = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert places[0].tolist() == whole
    assert (bias[0] == 0).all()
    # 20 × 8 px become 32 × 12 of 32 × 16: three of four rows of patches.
    assert places[1].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [0, 0, 0, 0]]
    assert ((bias[1] < -1e4) == (np.arange(4) == 3)[:, None]).all()


def test_cuts_that_cannot_be_are_refused() -> None:
    step = FitTiles(8, 4, 1, "nearest")
    with pytest.raises(BundleError, match="comes after another split"):
        cut_of(64, 16, (step, step))
    with pytest.raises(BundleError, match="rescale' comes after whole_before"):
        apply_transforms(make_image(8, 8, 0), (step, WholeBefore(), Rescale(1.0)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_phi4)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("are not fitted into tiles", lambda image: image["transforms"].pop()),
        ("patches of 3 px of tiles of 64 x 64 px", lambda image: image["shown"].update(patch=3)),
        ("2 bounds of 2 learned positions", lambda image: image["shown"].update(side=2, bounds=[0.3, 0.6])),
        ("features of 3 x 3 patches", lambda image: image["pack"][0].update(side=3)),
        (r"model\.image\.pack\.side is 0", lambda image: image["pack"][0].update(side=0)),
        ("nothing gives its input patch_bias", lambda image: image["shown"].update(names=["patch_places", "other"])),
    ],
)
def test_a_contradiction_is_named(plain: Exported, tmp_path: Path, words: str, change: Callable[[Any], Any]) -> None:
    bundle = Path(shutil.copytree(plain.bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    del data["checksum"]
    change(data["model"]["image"])
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=words):
        Bundle.load(bundle)


# ---------------------------------------------------------------- the adapter for images
def test_the_adapter_in_its_folder_is_merged(tmp_path: Path) -> None:
    model = save_tiny_phi4(tmp_path, adapter=True)
    merged, plain = model.get_parameter(WEIGHT).detach().numpy(), open_source(str(tmp_path), adapters=[NONE])
    source = open_source(str(tmp_path))
    np.testing.assert_allclose(open_weights(source).read(WEIGHT), merged, atol=1e-6)
    assert any("sees images with is merged" in text for text in source.notices)
    assert np.abs(open_weights(plain).read(WEIGHT) - merged).max() > 0.01
    # Named by hand, it is merged once.
    named = open_source(str(tmp_path), adapters=[str(tmp_path / "vision-lora")])
    assert len(named.adapters) == 1


def test_a_checkpoint_without_it_is_told(tmp_path: Path) -> None:
    save_tiny_phi4(tmp_path)
    source = open_source(str(tmp_path))
    assert source.adapters == ()
    assert any("right only if these weights hold it already" in text for text in source.notices)


def test_the_export_says_what_is_left_out(tmp_path: Path) -> None:
    save_tiny_phi4(tmp_path / "model", adapter=True)
    export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32")
    manifest = Bundle.load(tmp_path / "bundle").manifest
    assert any("parts for speech are left out" in text for text in manifest.provenance["notices"])
    assert [adapter["name"] for adapter in manifest.provenance["adapters"]] == ["vision-lora"]
    assert manifest.parity["errors"]
