"""PerceptionLM: its image processor against transformers', which needs torchvision; frames of videos."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_edge import VLM, Video
from mllm_edge.errors import BundleError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for
from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.runtime.prompt.transforms.apply import cut_of
from mllm_edge.spec import FillTiles, ImagePrompt, ImageSpec
from tests.families.parity import Exported, export_tiny
from tests.families.rows.perception_lm import CONFIGS
from tests.families.torchvision_processor import ask_transformers, picture
from tests.tiny_perception_lm import save_tiny_perception_lm

IMAGE, VIDEO = "<|image|>", "<|video|>"
# The sizes of the published checkpoint's images, beside those of the rows.
COMPARED: dict[str, dict[str, Any]] = {
    "tiles_and_the_whole": CONFIGS["tiles_and_the_whole"],
    "without_class_token": CONFIGS["without_class_token"],
    "one_tile": {"image_settings": {"vision_input_type": "vanilla"}, "video_settings": {}},
    "published": {
        "tower": {"img_size": [448, 448], "ref_feat_shape": [32, 32], "depth": 1},
        "image_settings": {"max_num_tiles": 36},
    },
}
SIDES = (1, 7, 55, 56, 57, 100, 112, 168, 223, 224, 225, 447, 448, 449, 900, 1344, 1345, 2688, 5000, 16128, 16129)
# What makes a prompt: (height, width, kind); transformers takes several images only of as many tiles each.
SMALL = [[(56, 56, "smooth")], [(301, 60, "noise")], [(1, 1, "smooth")], [(90, 330, "noise"), (100, 331, "smooth")]]
LARGE = [[(480, 640, "noise")], [(300, 1000, "smooth")]]


def sizes() -> list[tuple[int, int]]:
    """Sides that are multiples and beside them, with each other and with random ones."""
    random = np.random.default_rng(0)
    return [(a, b) for a in SIDES for b in SIDES] + [tuple(map(int, p)) for p in random.integers(1, 4000, (600, 2))]


def pictures(name: str) -> list[list[tuple[int, int, str]]]:
    return LARGE if name == "published" else SMALL


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for each of `COMPARED`, and beside it what transformers' own processor makes of what it is asked."""
    folder = tmp_path_factory.mktemp("compared")
    for name, config in COMPARED.items():
        save_tiny_perception_lm(folder / "in" / name, **{"video_settings": {}, **config})
        (folder / "in" / name / "asked.json").write_text(json.dumps({"pictures": pictures(name), "sizes": sizes()}))
    ask_transformers(folder)
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_prompts_and_pixels_are_those_of_transformers(compared: Path, name: str) -> None:
    """Ids are equal; a pixel is two levels of 255 away at most, and hardly any is. In noise some are farther: a cubic
    overshoots there, which is cut off between the two directions, and torchvision takes these in another order."""
    source, found = open_source(str(compared / "in" / name)), np.load(compared / "out" / f"{name}.npz")
    processor = family_for(source).load_processor(source)
    for i, shown in enumerate(pictures(name)):
        inputs = processor(text=IMAGE * len(shown) + "?", images=[picture(*p) for p in shown], return_tensors="pt")
        np.testing.assert_array_equal(inputs["input_ids"], found[f"{i}.input_ids"])
        ours, theirs = inputs["pixel_values"].numpy(), found[f"{i}.pixel_values"]
        levels = np.abs(ours.reshape(theirs.shape) - theirs) * 255 * max(processor.image_processor.image_std)
        noisy = any(kind == "noise" for *_, kind in shown)
        assert (levels > 2.0 + 1e-4).mean() <= (0.02 if noisy else 0)
        assert levels.mean() <= (0.5 if noisy else 0.05)


@pytest.mark.parametrize("name", ["tiles_and_the_whole", "without_class_token", "published"])
def test_grids_are_those_of_transformers(compared: Path, name: str) -> None:
    settings = json.loads((compared / "in" / name / "preprocessor_config.json").read_text())
    step = FillTiles(settings["tile_size"], settings["max_num_tiles"], "bicubic")
    expected = np.load(compared / "out" / f"{name}.npz")["layouts"].tolist()
    for (height, width), (rows, cols) in zip(sizes(), expected, strict=True):
        cut = cut_of(height, width, (step,))
        assert (cut.rows, cut.cols, cut.slices) == (rows, cols, rows * cols + 1), (height, width)


def test_the_overview_is_there_beside_one_tile() -> None:
    prompt = ImagePrompt(".", 3, "{image}", begin="{image}", tile="{image}")
    image = ImageSpec((FillTiles(8, 1, "nearest"),), prompt, 8, 8, 2)
    found = layout_of(image, 5, 90)
    assert (found.slices, found.text) == (2, "....")


def test_a_second_cut_is_refused() -> None:
    step = FillTiles(8, 4, "nearest")
    with pytest.raises(BundleError, match="comes after another split"):
        cut_of(64, 16, (step, step))


# ---------------------------------------------------------------- videos
@pytest.fixture(scope="module", params=["tiles_and_the_whole", "one_tile"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp(request.param), save_tiny_perception_lm, **COMPARED[request.param])


def shown(frames: int) -> Video:
    """A video whose frames are of unequal sizes."""
    random = np.random.default_rng(frames)
    return Video([random.integers(0, 256, (40 + 7 * i, 99 - 6 * i, 3), dtype=np.uint8) for i in range(frames)])


@pytest.mark.parametrize("given", [(1,), (5,), (2, 3)], ids=str)
def test_frames_are_what_the_source_model_makes_of_them(exported: Exported, given: tuple[int, ...]) -> None:
    model, videos = exported.model, [shown(frames) for frames in given]
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56}}
    images = CLIPImageProcessorPil(**own, do_center_crop=False, resample=3)
    pixels = [images(list(video.frames), return_tensors="pt").pixel_values for video in videos]
    with VLM.load(exported.bundle, backend="cpu") as vlm:
        prompt = vlm.processor.process("What happens?", videos)
        message = {"role": "user", "content": [*({"type": "video"} for _ in videos)]}
        message["content"].append({"type": "text", "text": "What happens?"})
        text = exported.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        assert text.count(VIDEO) == len(given)
        tokens = exported.processor.tokenizer(text, add_special_tokens=False).input_ids
        counts = iter([frames * vlm.spec.image.features for frames in given])
        repeats = [next(counts) if token == model.config.video_token_id else 1 for token in tokens]
        np.testing.assert_array_equal(prompt.token_ids, np.repeat(tokens, repeats))
        assert vlm.count_tokens("What happens?", [(n, *videos[i].frames[0].shape[:2]) for i, n in enumerate(given)])
        encoded = vlm.encode(prompt)
        (answer,) = vlm.greedy([encoded], 8, stop_ids=())
        found = vlm.steps(encoded, answer)
    ids = torch.tensor(np.concatenate([prompt.token_ids, answer[:-1]]))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values_videos=torch.cat(pixels)[None]).logits[0, -len(answer) :].numpy()
    np.testing.assert_array_equal(answer, logits.argmax(axis=1))
    np.testing.assert_allclose(found, logits, atol=1e-4 * np.ptp(logits))


def test_a_text_that_spells_the_placeholder_shows_nothing(exported: Exported) -> None:
    with VLM.load(exported.bundle, backend="cpu") as vlm:
        prompt = vlm.processor.process(f"What is {VIDEO}?")
        assert VIDEO in vlm.tokenizer.decode(prompt.token_ids.tolist())
        assert exported.model.config.video_token_id not in prompt.token_ids
