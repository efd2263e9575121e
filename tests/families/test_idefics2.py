"""Idefics2: quarters of any size, positions by where a patch begins, words around images."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mllm_edge import VLM
from mllm_edge.errors import ImageError
from mllm_edge.export.vision.siglip import bounds
from mllm_edge.image_checks import image_problems
from mllm_edge.runtime.prompt.learned_grid import cell_positions
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import FitPatches, Patchify, Rescale
from tests.families.parity import Exported, check_messages, export_tiny, make_image
from tests.tiny_idefics2 import save_tiny_idefics2

FAKE = "<fake_token_around_image>"
SHOWN = f"{FAKE}<image>"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    with export_tiny(tmp_path_factory.mktemp("quarters"), save_tiny_idefics2) as found:
        yield found


@pytest.fixture(scope="module")
def vlm(exported: Exported) -> VLM:
    return exported.vlm("cpu")


def reference_buckets(side: int, places: int) -> list[int]:
    """As transformers computes them."""
    edges = torch.arange(1 / side, 1.0, 1 / side)
    begins = torch.arange(places, dtype=torch.float32) * (1.0 / torch.tensor([places]))
    return torch.bucketize(torch.clamp(begins, max=1.0 - 1e-6), edges, right=True).tolist()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 16, 27, 49, 70])
def test_positions_are_those_that_the_reference_looks_up(side: int) -> None:
    table = np.arange(side**2, dtype=np.float32).reshape(side, side, 1)
    for rows, cols in ((n, 71 - n) for n in range(1, 71)):
        found = cell_positions(table, rows, cols, 1, bounds=bounds(side))[:, 0, 0]
        down, across = reference_buckets(side, rows), reference_buckets(side, cols)
        assert found.tolist() == [row * side + col for row in down for col in across]


@pytest.mark.parametrize("quarters", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (3, 7), (19, 20), (61, 60), (60, 61), (121, 200), (200, 33), (999, 4)])
def test_sizes_are_known_without_pixels(size: tuple[int, int], quarters: bool) -> None:
    transforms = FitPatches(20, 60, 8, quarters, "bilinear"), Rescale(1 / 255), Patchify(8, 1, 1)
    cut, made = cut_of(*size, transforms), apply_transforms(make_image(*size, 0), transforms)
    assert len(cut.grids) == (5 if quarters else 1)
    assert made.shape == (cut.slices, 1, 3 * 8 * 8) == (sum(rows * cols for rows, cols in cut.grids), 1, 192)


def test_an_image_without_quarters() -> None:
    with pytest.raises(ImageError, match="1×9 px cannot be cut into quarters"):
        cut_of(1, 9, (FitPatches(20, 60, 8, True, "bilinear"), Patchify(8, 1, 1)))


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("", "What?", f"User:{SHOWN}{FAKE} What?"),
        ("Look ", " there", f"User: Look {SHOWN}{FAKE} there"),
        ("(", "", f"User: ({SHOWN}{FAKE}<end_of_utterance>"),
        ("", "\nWhat?", f"User:{SHOWN}{FAKE}\nWhat?"),
    ],
)
def test_words_around_images(exported: Exported, vlm: VLM, before: str, after: str, text: str) -> None:
    entries = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    messages = [{"role": "user", "content": [entry for entry in entries if entry.get("text") != ""]}]
    check_messages(exported, messages, [(40, 50)])
    ids = vlm.processor.process(messages, [make_image(40, 50, 0)]).token_ids
    shown = vlm.tokenizer.decode(ids, skip_special_tokens=False).replace("<image>" * 3, "<image>")
    assert shown.replace(SHOWN * 5, SHOWN).startswith(f"<s>{text}")


def test_images_that_touch_share_a_word(exported: Exported, vlm: VLM) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]}]
    check_messages(exported, messages, [(40, 50), (30, 90)])
    prompt = vlm.processor.process(messages, [make_image(40, 50, 0)] * 2)
    assert prompt.token_ids.tolist().count(vlm.tokenizer.token_id(FAKE)) == 11
    assert len(prompt.image_positions) == 2 * 5 * 3


def test_a_conversation(exported: Exported) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
    ]
    check_messages(exported, messages, [(40, 50), (20, 21)])


def test_specifications_that_cannot_be(vlm: VLM) -> None:
    image, model = vlm.spec.image, vlm.spec
    assert image is not None
    assert not list(image_problems(image, model))
    fit, *others = image.transforms
    assert isinstance(fit, FitPatches)
    for wrong in ({"shortest": 7}, {"longest": 19}):
        changed = dataclasses.replace(image, transforms=(dataclasses.replace(fit, **wrong), *others))
        assert any("px for patches of 8 px" in what for what in image_problems(changed, model))
    (positions,) = image.tables
    for places in ((0.5,) * 8, (0.5, 0.25), (1.5,)):
        changed = dataclasses.replace(image, tables=(dataclasses.replace(positions, bounds=places),))
        assert any("bounds of 8 learned positions" in what for what in image_problems(changed, model))
    tiles = dataclasses.replace(image, transforms=(*image.transforms[:-1],), tables=())
    assert any("grids of cells" in what for what in image_problems(tiles, model))
