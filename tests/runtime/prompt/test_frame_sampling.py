"""Which frames are taken of a recording."""

import itertools

import numpy as np
import pytest
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor
from transformers.video_utils import VideoMetadata

from mllm_edge.errors import OptionError
from mllm_edge.runtime.prompt.frame_sampling import ALL, DEFAULT, frames_on_show, positions, told
from mllm_edge.spec import FrameSampling

# What the families' own rules take is compared in tests/families/test_videos.py.
TOTALS = (1, 2, 7, 8, 31, 90, 241, 300, 899, 5400, 53_946)
RATES = (1.0, 12.5, 23.976, 24000 / 1001, 25.0, 29.97, 30.0, 59.94, 120.0)


@pytest.mark.parametrize("settings", [{"num_frames": 8}, {"fps": 2}, {"fps": 0.3}, {"num_frames": 1}])
def test_the_plain_rule_is_that_of_transformers(settings: dict[str, float]) -> None:
    reference = LlavaNextVideoVideoProcessor(**settings)
    ours = FrameSampling("even", fps=settings.get("fps"), frames=settings.get("num_frames"))  # type: ignore[arg-type]
    for total, rate in itertools.product(TOTALS, RATES):
        if settings.get("num_frames", 1) <= total and settings.get("fps", 0) <= rate:  # it refuses others
            known = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
            assert positions(ours, total, rate) == [int(i) for i in reference.sample_frames(known)], (total, rate)


@pytest.mark.parametrize("rule", ["even", "stride", "ends", "steps", "inner"])
def test_every_rule_takes_frames_that_there_are(rule: str) -> None:
    for total, rate, fps in itertools.product((1, 2, 3, 40, 2000), (0.1, 7.0, 240.0), (0.01, 2.0, 500.0)):
        for shift in (0.0, None, 7.5):
            sampling = FrameSampling(rule, fps, least=4, most=30, shift=shift, seconds=2.0)  # type: ignore[arg-type]
            found = positions(sampling, total, rate)
            assert found == sorted(found)
            assert 0 <= found[0] <= found[-1] < total


# ---------------------------------------------------------------- by time
EVEN = [i / 30 for i in range(90)]
UNEVEN = [0.0, 0.1, 0.2, 4.0, 4.1, 9.0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (told(fps=1), [0, 30, 60]),
        (told(fps=0.1), [0]),
        (told(fps=29.97), list(range(90))),
        (told(fps=1000), list(range(90))),
        (told(fps=1e9), list(range(90))),
        (told(frames=3), [0, 30, 60]),
        (told(frames=500), list(range(90))),
        (told(fps=10, frames=2), [0, 45]),
        (told(fps=1, frames=50), [0, 30, 60]),
        (told(frames="all"), list(range(90))),
        (DEFAULT, [0, 11, 22, 33, 45, 56, 67, 78]),
    ],
)
@pytest.mark.parametrize("begin", [0.0, 17.4])
def test_at_equal_distances(sampling: FrameSampling, expected: list[int], begin: float) -> None:
    times = [begin + time for time in EVEN]
    assert frames_on_show(sampling, times, begin + 3, 30.0) == expected
    assert frames_on_show(sampling, times, begin + 3, None) == expected
    rounded = [round(time, 3) for time in times]  # as Matroska tells them
    assert frames_on_show(sampling, rounded, begin + 3, 30.0) == expected


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (told(fps=1), [0, 2, 3, 4, 5]),
        (told(fps=10), [0, 1, 2, 3, 4, 5]),
        (told(fps=10, frames=4), [0, 2, 4]),
        (told(frames=5), [0, 2, 3, 4]),
        (ALL, [0, 1, 2, 3, 4, 5]),
        (FrameSampling("ends", fps=1.0, least=2, most=768), [0, 2, 4]),
        (FrameSampling("steps", fps=0.5, seconds=300.0), [0, 2, 4, 4]),
    ],
)
def test_at_unequal_distances(sampling: FrameSampling, expected: list[int]) -> None:
    found = frames_on_show(sampling, UNEVEN, 10.0, 0.6)
    assert found == frames_on_show(sampling, [7 + time for time in UNEVEN], 17.0, 0.6)
    assert found == expected


def test_one_frame() -> None:
    for sampling in (told(fps=5), told(frames=5), ALL, DEFAULT, FrameSampling("inner", fps=1.0, most=64, seconds=1.0)):
        assert sampling is not None
        assert frames_on_show(sampling, [0.0], 0.0, None) == [0]
        assert frames_on_show(sampling, [3.0], 3.04, 25.0) == [0]


@pytest.mark.parametrize(
    ("fps", "frames", "word"),
    [(0, None, "fps"), (float("nan"), None, "fps"), ("2", None, "fps"), (None, 1.5, "frames"), (None, 0, "frames"),
     (None, "every", "frames is 'every'"), (2, "all", "frames is 'all'"), (np.inf, None, "fps"), (True, None, "fps")],
)  # fmt: skip
def test_numbers_that_cannot_be(fps: object, frames: object, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        told(fps, frames)


def test_nothing_told() -> None:
    assert told() is None
