"""The profiler: statistics that admit what they cannot know, and calls of equal length."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import BundleError
from mllm_edge.runtime.profile import PERCENTILES, Distribution, profile, samples_needed, synthetic_image


def test_distribution_of_one_sample_has_no_percentiles() -> None:
    assert Distribution.of([3.0]) == Distribution(1, 3.0, 3.0, 3.0, {})


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_percentiles_need_enough_samples(percentile: int) -> None:
    needed = samples_needed(percentile)
    samples = np.random.default_rng(0).random(needed)
    full = Distribution.of(samples.tolist()).percentiles
    assert full[f"p{percentile}"] == pytest.approx(np.percentile(samples, percentile))
    assert f"p{percentile}" not in Distribution.of(samples[:-1].tolist()).percentiles


def test_samples_needed() -> None:
    assert [samples_needed(p) for p in PERCENTILES] == [10, 10, 20, 100]


def test_synthetic_image_is_always_the_same() -> None:
    first, second = (np.asarray(synthetic_image()) for _ in range(2))
    assert first.shape == (480, 640, 3)
    assert np.array_equal(first, second)


def test_every_call_has_the_tokens_asked_for(tiny_bundle: Path) -> None:
    calls: list[int] = []
    result = profile(tiny_bundle, "Hi", new_tokens=12, warmup=1, iterations=4, progress=calls.append)
    assert calls == [1] * 5
    assert result.new_tokens == 12
    assert result.tpot is not None
    assert result.tpot.count == 4 * 11
    assert set(result.stages) == {"preprocess", "vision_encoder", "connector", "embed", "prefill", "ttft", "total"}
    assert all(d.count == 4 and 0 < d.minimum <= d.median <= d.maximum for d in result.stages.values())
    assert result.tiles > 0
    for nbytes in (result.kv_cache_bytes, result.peak_rss, result.bundle_bytes):
        assert nbytes > 0


def test_the_models_end_is_ignored(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle) as vlm:
        first = vlm.generate("Hi", max_new_tokens=1).token_ids[0]
        vlm.stop_ids = frozenset({first})
        assert vlm.generate("Hi", max_new_tokens=5).token_ids == ()
        assert len(vlm.generate("Hi", max_new_tokens=5, ignore_eos=True).token_ids) == 5


def test_one_token_has_no_intervals(tiny_bundle: Path) -> None:
    result = profile(tiny_bundle, "Hi", new_tokens=1, warmup=0, iterations=1)
    assert result.tpot is None
    assert result.tokens_per_second == 0
    assert result.as_dict()["tpot"] is None


def test_given_images_are_used(tiny_bundle: Path) -> None:
    images = [np.zeros((64, 64, 3), np.uint8)] * 2
    one, two = (profile(tiny_bundle, "Hi", images[:n], new_tokens=2, warmup=0, iterations=1) for n in (1, 2))
    assert (one.image, two.image) == ("ndarray", "ndarray, ndarray")
    assert two.tiles == 2 * one.tiles


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        profile(tmp_path, "Hi")
