"""What a row does not show of Emu3: images left whole, the canvas that those of a prompt share, codes in pieces."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ImageError
from mllm_edge.export.vision import vqgan
from mllm_edge.image_checks import image_problems
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.budget import image_cost
from mllm_edge.runtime.planning.shapes import layouts_of, stage_runs
from mllm_edge.spec import Resize

pytestmark = pytest.mark.xdist_group("bundle-emu3")
SMALL, WIDE = (np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 40), (24, 88)))


@pytest.fixture(scope="module")
def vlm(floats: Callable[[str], Path]) -> Iterator[VLM]:
    with VLM(Bundle.load(floats("emu3")), OnnxRuntimeCpu()) as found:
        yield found


def test_images_of_a_prompt_share_a_canvas(vlm: VLM) -> None:
    alone, both = (vlm.processor.process("Which?", images) for images in ([SMALL], [SMALL, WIDE]))
    assert alone.pixel_values is not None
    assert both.pixel_values is not None
    assert alone.pixel_values.shape == (1, 3, 40, 40)
    assert both.pixel_values.shape == (2, 3, 40, 88)
    np.testing.assert_array_equal(both.pixel_values[0, :, :, :40], alone.pixel_values[0])
    assert not both.pixel_values[0, :, :, 40:].any()
    # 5 × 5 and 3 × 11 codes, an end for each row.
    assert [layout.tokens for layout in both.layouts] == [30, 36]
    assert len(vlm.image_features(both)) == 66


def test_each_row_has_an_end(vlm: VLM) -> None:
    rows = vlm.image_features(vlm.processor.process("What?", WIDE)).reshape(3, 12, -1)
    np.testing.assert_array_equal(rows[:, -1], np.repeat(vlm.bundle.array("row_end.npy"), 3, axis=0))
    assert (np.abs(rows[:, :-1] - rows[0, -1]).max(-1) > 0).all()


def test_what_an_image_takes_is_known_from_its_size(vlm: VLM) -> None:
    cost = image_cost(vlm.bundle, (24, 88))
    assert (cost.tiles, cost.grid, cost.cells, cost.image_tokens) == (1, (3, 11), True, 36)
    variants = {stage.component: vlm.bundle.variant(stage.component, "cpu") for stage in vlm.spec.stages}
    layouts = layouts_of(vlm.spec.image, [(40, 40), (88, 24)])
    for stage in vlm.spec.stages[:1]:
        runs = stage_runs(vlm.spec, stage, variants, layouts)
        assert [sizes["height"] * sizes["width"] for sizes, _ in runs] == [40 * 88] * 2


def test_an_image_that_is_too_thin_is_refused(vlm: VLM) -> None:
    with pytest.raises(ImageError, match="more than 200 times"):
        vlm.count_tokens("What?", [(2, 500)])


def test_what_is_left_whole_is_neither_cut_nor_looked_at(vlm: VLM) -> None:
    image = vlm.spec.image
    assert image is not None
    assert not list(image_problems(image, vlm.spec))
    for wrong in (replace(image, into="cross_attention"), replace(image, tiles=2), replace(image, features=2)):
        assert any("left whole" in problem for problem in image_problems(wrong, vlm.spec))
    several = replace(vlm.spec, stages=tuple(replace(stage, per="slice") for stage in vlm.spec.stages))
    assert any("several images at once" in problem for problem in image_problems(image, several))
    assert list(image_problems(replace(image, most_images=0), vlm.spec))
    assert not list(image_problems(replace(image, transforms=(Resize(8, 8, "bicubic"),)), vlm.spec))


def test_codes_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codebook = vqgan.Codebook(4, 5, 37, 6)
    for parameter in codebook.parameters():
        parameter.data = torch.randn_like(parameter)
    codebook.codes.data[:, 30], codebook.lengths.data[30] = codebook.codes[:, 2], codebook.lengths[2]
    hidden = torch.randn(2, 4, 30, 5)
    whole = codebook(hidden)
    monkeypatch.setattr(vqgan, "_TOGETHER", 8)
    assert torch.equal(codebook(hidden), whole)
