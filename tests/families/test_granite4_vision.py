"""Granite 4 Vision: what is special about it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Granite4VisionConfig
from transformers.models.granite4_vision.modeling_granite4_vision import (
    interpolate_downsample,
    spatial_offset_downsample,
)

from mllm_edge.export import pipeline
from mllm_edge.export.pipeline import export
from mllm_edge.export.vision.granite4_vision import Projector, QFormerConfig, WindowConfig, window_derived


def test_large_model_is_compared_by_its_first_layers(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features for the layers that are left out go nowhere, on both sides."""
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(saved("granite4_vision")), tmp_path / "out", recipe_name="fp32")
    assert report.parity["scope"] == "decoder: first 2 layers and head"


@pytest.mark.parametrize(("side", "window", "query"), [(6, 2, 1), (8, 4, 2), (24, 8, 4)])
def test_sampled_patches_are_those_of_transformers(side: int, window: int, query: int) -> None:
    """A feature's patches by rows and columns, window by window."""
    projectors = (Projector("means", 0, 0, 0), *(Projector("corners", i, 0, 1 + i) for i in range(4)))
    sizes = QFormerConfig(1, 1, 4, 1, "gelu", 1e-12)
    config = WindowConfig(sizes, 4, 4, side, window, query, projectors)
    patches = np.random.default_rng(0).standard_normal((1, side**2, 4)).astype(np.float32)
    derived, seen = window_derived(config, "corners"), torch.from_numpy(patches)
    expected = [interpolate_downsample(seen, side, side // 2)]
    expected += [spatial_offset_downsample(seen, side, i) for i in range(4)]
    for projector, theirs in zip(projectors, expected, strict=True):
        ours = derived[f"{projector.kind}.{projector.number}.sampling"]() @ patches[0]
        count = side // window
        rows = ours.reshape(count, count, query, query, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)
        np.testing.assert_allclose(rows, theirs[0].numpy(), atol=1e-6)


def test_only_this_model_makes_no_cache_of_its_own() -> None:
    """What `with_cache` is for: without it there is none. To be removed with the version that makes one."""
    from transformers import Granite4VisionForConditionalGeneration

    tiny = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Granite4VisionConfig(
        text_config={**tiny, "vocab_size": 8},
        vision_config={"model_type": "clip_vision_model", **tiny, "image_size": 16, "patch_size": 8},
        deepstack_layer_map=[[-1, 0]],
        downsample_rate="1/2",
    )
    model = Granite4VisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2]]), use_cache=True).cache is None
