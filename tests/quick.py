"""The quick tier: what a developer runs between two changes. `make test-quick` is `make test` without what takes long.

It has two families, one of tiles and one of cells of patches, and leaves out the files that export, calibrate and build
engines many times.
"""

import pytest

__all__ = ["is_quick"]

FAMILIES = ("idefics3", "qwen2_vl")
# They make up most of the whole suite's time.
LONG = frozenset(
    (
        "test_adapter_names.py",
        "test_adapters.py",
        "test_answers.py",
        "test_best.py",
        "test_build.py",
        "test_dlpack.py",
        "test_engines.py",
        "test_export.py",
        "test_florence2.py",
        "test_half.py",
        "test_idefics.py",
        "test_idefics2.py",
        "test_instructblip.py",
        "test_instructblip_video.py",
        "test_int8_cache.py",
        "test_interrupt.py",
        "test_judge.py",
        "test_lfm2_vl.py",
        "test_llava_videos.py",
        "test_loss.py",
        "test_mllama.py",
        "test_more_bits.py",
        "test_onevision_video.py",
        "test_optimum.py",
        "test_package.py",
        "test_quantize.py",
        "test_quantize_resume.py",
        "test_perception_lm.py",
        "test_phi4_multimodal.py",
        "test_qwen25_vl.py",
        "test_qwen3_vl.py",
        "test_reading.py",
        "test_readme.py",
        "test_recurrent.py",
        "test_sample_model.py",
        "test_speculation.py",
        "test_targets.py",
        "test_tensorrt_runs.py",
        "test_timm.py",
        "test_tower_engines.py",
        "test_videos.py",
        "test_vision_attention.py",
    )
)


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is in the quick tier."""
    return item.path.name not in LONG and family_of(item) in (None, *FAMILIES)


def family_of(item: pytest.Item) -> str | None:
    """The family that a test goes through, by its group."""
    from tests.families.row import rows

    for mark in item.iter_markers("xdist_group"):
        name = str(mark.args[0]).removeprefix("bundle-")
        for family in sorted(rows(), key=len, reverse=True):
            if name == family or name.startswith(f"{family}-"):
                return family
    return None
