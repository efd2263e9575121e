"""The newest frames of a camera."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mllm_edge import FrameWindow, Video
from mllm_edge.errors import ImageError, OptionError

FRAMES = [np.full((2, 2, 3), i % 256, np.uint8) for i in range(300)]


def clock_of(fps: float, begin: float = 1000.0) -> Callable[[], float]:
    """Tells the time of one frame after the other."""
    times = (begin + i / fps for i in range(10_000))
    return lambda: next(times)


def numbers(video: Video) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in video.frames]  # type: ignore[index]


def times(video: Video) -> list[float]:
    assert video.timing is not None
    return [round(time, 3) for time in video.timing.times]


def fed(count: int, rate: float = 30, **options: Any) -> FrameWindow:
    window = FrameWindow(clock=clock_of(rate), **options)
    for frame in FRAMES[:count]:
        window.add(frame)
    return window


def test_the_newest_of_all() -> None:
    window = fed(100, frames=4)
    assert numbers(window.video()) == [96, 97, 98, 99]
    assert times(window.video()) == [0, 0.033, 0.067, 0.1]
    assert len(window) == 4


def test_the_last_seconds_at_a_rate() -> None:
    window = fed(241, seconds=4, fps=2)  # 8 s and the first frame of the next one
    assert numbers(window.video()) == [134, 149, 164, 179, 194, 209, 224, 239, 240]
    assert window.times[-1] - window.times[0] <= 4
    assert times(window.video())[:3] == [0, 0.5, 1.0]


def test_no_more_than_so_many() -> None:
    window = fed(300, seconds=5, frames=5)  # one of each second
    assert len(window) == 5
    assert np.allclose(np.diff(window.times), 1)
    assert numbers(window.video())[-1] == 299 % 256


@pytest.mark.parametrize("options", [{}, {"fps": 7}, {"seconds": 0.4}, {"seconds": 3, "fps": 5}, {"frames": 1}])
def test_the_newest_frame_is_always_there(options: dict[str, Any]) -> None:
    window = FrameWindow(clock=clock_of(29.97), **options)
    for i, frame in enumerate(FRAMES):
        window.add(frame)
        assert numbers(window.video())[-1] == i % 256
        assert len(window) <= options.get("frames", 32)


def test_a_slow_camera_keeps_what_is_new_enough() -> None:
    window = fed(20, 0.5, seconds=5)
    assert numbers(window.video()) == [17, 18, 19]


def test_times_that_are_given() -> None:
    window = FrameWindow(seconds=10)
    for i, time in enumerate((0.0, 2.5, 2.5, 9.0, 12.5)):
        window.add(FRAMES[i], time)
    assert window.times == (2.5, 9.0, 12.5)
    with pytest.raises(OptionError, match=r"time must be a number from 12\.5"):
        window.add(FRAMES[9], 12.0)
    assert window.times == (2.5, 9.0, 12.5)
    assert times(window.video()) == [0, 6.5, 10]


def test_a_video_stays_as_it_was() -> None:
    window = fed(5)
    video = window.video()
    window.add(FRAMES[5])
    assert numbers(video) == [0, 1, 2, 3, 4]


def test_nothing_yet() -> None:
    with pytest.raises(ImageError, match="no frames have come yet") as caught:
        FrameWindow().video()
    assert caught.value.fix


# ---------------------------------------------------------------- an iterator
def test_follow_gives_a_video_with_each_frame() -> None:
    window = FrameWindow(frames=3, clock=clock_of(10))
    assert [numbers(video) for video in window.follow(iter(FRAMES[:4]))] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    assert [times(video) for video in FrameWindow().follow([(1.0, FRAMES[0]), (1.5, FRAMES[1])])] == [[0], [0, 0.5]]


def test_errors_of_the_camera_pass_and_nothing_is_lost() -> None:
    class Unplugged(Exception):
        pass

    def camera() -> Iterator[np.ndarray]:
        yield from FRAMES[:2]
        raise Unplugged

    window = FrameWindow(clock=clock_of(10))
    with pytest.raises(Unplugged):
        list(window.follow(camera()))
    assert numbers(window.video()) == [0, 1]
    assert [numbers(video) for video in window.follow(FRAMES[2:3])] == [[0, 1, 2]]


def test_an_iterator_without_frames() -> None:
    window = fed(2)
    with pytest.raises(ImageError, match="ended before the first one"):
        list(window.follow([]))
    assert numbers(window.video()) == [0, 1]


@pytest.mark.parametrize("options", [{"seconds": 0}, {"fps": -1}, {"frames": 0}, {"seconds": float("inf")}])
def test_numbers_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        FrameWindow(**options)
