"""Video files: frames, their times, and what is said of files that cannot be shown."""

import io
import math
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import Video
from mllm_edge.errors import BackendError, ImageError, OptionError
from mllm_edge.runtime.prompt import video_file
from mllm_edge.runtime.prompt.image import load_image
from mllm_edge.runtime.prompt.sources import VideoFile
from mllm_edge.runtime.prompt.video_file import upright
from tests.video_files import even, number_of, save_sound, save_video

KINDS = {
    "clip.mp4": {"codec": "libx264"},  # with frames that are decoded before others and shown behind them
    "clip.mkv": {"codec": "libx264", "base": Fraction(1, 1000)},
    "clip.webm": {"codec": "libvpx", "base": Fraction(1, 1000)},
    "clip.mov": {"codec": "mpeg4"},
    "clip.avi": {"codec": "mpeg4", "base": Fraction(1, 30)},
    "clip.ts": {"codec": "libx264"},
    "clip.gif": {"codec": "gif", "base": Fraction(1, 100)},
    "clip.h264": {"codec": "libx264"},  # tells no times
}
UNEVEN = [0.0, 0.1, 0.2, 0.3, 5.0, 5.05, 5.1, 9.0, 9.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clips(folder: Path) -> dict[str, Path]:
    """Two seconds of 30 frames, of every kind; the GIF has 20."""
    times = {name: even(40, 20) if name.endswith("gif") else even(60) for name in KINDS}
    return {name: save_video(folder / name, times[name], **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def uneven(folder: Path) -> Path:
    return save_video(folder / "uneven.mp4", UNEVEN, "libx264", base=Fraction(1, 100))


@pytest.fixture(scope="module")
def hour(folder: Path) -> Path:
    """A frame every two seconds, for an hour."""
    return save_video(folder / "hour.mp4", even(1800, 0.5), size=(16, 16), gop=30, base=Fraction(1))


def shown(file: VideoFile) -> list[int]:
    return [number_of(np.asarray(load_image(frame))) for frame in file.read().frames]


def times(file: VideoFile) -> list[float]:
    timing = file.read().timing
    assert timing is not None
    return [round(time, 2) for time in timing.times]


# ---------------------------------------------------------------- frames
@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_of_every_kind(clips: dict[str, Path], name: str) -> None:
    every = Video.open(clips[name], frames="all")
    rate = {"clip.gif": 20, "clip.h264": 25}.get(name, 30)
    count = 40 if name == "clip.gif" else 60
    assert shown(every) == list(range(count))
    np.testing.assert_allclose(times(every), even(count, rate), atol=0.006)
    timing = every.read().timing
    assert timing is not None
    assert timing.duration == pytest.approx(count / rate, abs=0.05)
    assert shown(Video.open(clips[name], fps=2)) == [int(i * rate / 2) for i in range(math.ceil(count / rate * 2))]
    assert shown(Video.open(clips[name], frames=4)) == [0, count // 4, count // 2, 3 * count // 4]
    assert len(shown(Video.open(clips[name]))) == 8


def test_uneven_frames_are_taken_by_time(uneven: Path) -> None:
    assert times(Video.open(uneven, frames="all")) == UNEVEN
    assert times(Video.open(uneven, fps=1)) == [0.0, 0.3, 5.0, 5.1, 9.0]
    assert times(Video.open(uneven, fps=50)) == UNEVEN
    assert times(Video.open(uneven, fps=50, frames=3)) == [0.0, 0.3, 5.1]
    assert shown(Video.open(uneven, fps=1)) == [0, 3, 4, 6, 7]


def test_a_part(clips: dict[str, Path], uneven: Path) -> None:
    assert shown(Video.open(clips["clip.mp4"], fps=4, start=0.5, end=1.25)) == [15, 22, 30]
    assert times(Video.open(clips["clip.mp4"], frames=2, start=1)) == [1.0, 1.5]
    assert times(Video.open(uneven, frames="all", start=3, end=5.07)) == [
        0.3,
        5.0,
        5.05,
    ]  # on show at 3 s is that of 0.3
    part = Video.open(clips["clip.mp4"], start=1).read().timing
    assert part is not None
    assert part.duration == pytest.approx(2)


def test_an_hour_is_skipped_through(hour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few frames are decoded, fewer made into pixels, and those one by one."""
    decoded, made = [], []
    frames, pixels = video_file._frames, video_file._pixels_and_matrix

    def counted(*arguments: Any) -> Iterator[Any]:
        for one in frames(*arguments):
            decoded.append(one[0])
            yield one

    monkeypatch.setattr(video_file, "_frames", counted)
    monkeypatch.setattr(video_file, "_pixels_and_matrix", lambda frame: made.append(frame.pts) or pixels(frame))
    clip = Video.open(hour, fps=1 / 150).clip()
    numbers = []
    for i, frame in enumerate(clip.frames()):
        assert len(made) == i + 1
        numbers.append(number_of(frame))
    assert list(clip.times) == [150.0 * i for i in range(24)]
    assert numbers == [75 * i % 64 for i in range(24)]
    assert len(decoded) < 24 * 32


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.gif"])
def test_skipping_changes_nothing(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = Video.open(clips[name], frames=5).read().frames
    monkeypatch.setattr(video_file, "_FAR", 0)
    for one, other in zip(Video.open(clips[name], frames=5).read().frames, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_skipping_fails_all_is_decoded(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "_FAR", 0)
    monkeypatch.setattr(video_file, "_from_key", lambda *arguments: None)
    assert shown(Video.open(clips["clip.mp4"], frames=4)) == [0, 15, 30, 45]


@pytest.mark.parametrize(("turned", "corner"), [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1)), (0, (0, 0))])
def test_turned_by_a_phone(tmp_path: Path, turned: int, corner: tuple[int, int]) -> None:
    """The white corner, at the top left of what is stored."""
    file = save_video(tmp_path / "phone.mp4", even(3), "libx264", turned=turned)
    (frame,) = Video.open(file, frames=1).read().frames
    assert frame.shape == ((32, 48, 3) if turned % 180 == 0 else (48, 32, 3))
    assert frame[corner].min() > 230
    assert [y for y in (0, -1) for x in (0, -1) if frame[y, x].min() > 230] == [corner[0]]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
    ],
)
def test_every_way_to_turn(matrix: tuple[int, ...], expected: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    a, b, c, d = (value << 16 for value in matrix)
    np.testing.assert_array_equal(upright(pixels, (a, b, 0, c, d, 0, 0, 0, 1 << 30)), expected(pixels))
    assert upright(pixels, None) is pixels


# ---------------------------------------------------------------- where files are
def test_bytes_and_file_objects(clips: dict[str, Path]) -> None:
    data = clips["clip.mkv"].read_bytes()
    with clips["clip.mkv"].open("rb") as file:
        for source in (data, bytearray(data), memoryview(data), file, io.BytesIO(data), f"file://{clips['clip.mkv']}"):
            video = Video.open(source, frames=2)
            assert shown(video) == shown(video) == [0, 30]
        assert not file.closed


def test_the_callers_own_error_passes(clips: dict[str, Path]) -> None:
    class Mine(Exception):
        pass

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise Mine

    with pytest.raises(Mine):
        Video.open(Broken(clips["clip.mkv"].read_bytes())).read()


def test_a_stream_that_cannot_go_back() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(ImageError, match="cannot be read twice"):
        Video.open(Pipe(b"x")).read()


# ---------------------------------------------------------------- what cannot be shown
def damaged(data: bytes) -> bytes:
    half, end = len(data) // 2, len(data) * 2 // 3
    return data[:half] + bytes((b * 7 + 13) % 256 for b in data[half:end]) + data[end:]


@pytest.mark.parametrize(
    ("name", "made", "told"),
    [
        ("empty.mp4", lambda clips, path: path.write_bytes(b""), "no video, or a damaged one"),
        ("text.mp4", lambda clips, path: path.write_text("Hello, world! " * 99), "no video, or a damaged one"),
        ("sound.wav", lambda clips, path: save_sound(path), r"no video in it \(audio\)"),
        ("none.mkv", lambda clips, path: path.write_bytes(clips["clip.mkv"].read_bytes()[:300]), "no video"),
        ("half.mp4", lambda clips, path: path.write_bytes(clips["clip.mp4"].read_bytes()[:2000]), "no video, or"),
        ("half.mkv", lambda clips, path: path.write_bytes(clips["clip.mkv"].read_bytes()[:1400]), "cut off at"),
        ("front.mp4", lambda clips, path: cut_behind_its_index(path), "cut off at"),
        (
            "wrong.mov",
            lambda clips, path: path.write_bytes(damaged(clips["clip.mov"].read_bytes())),
            "damaged",
        ),
        ("list.mp4", lambda clips, path: path.write_text(playlist(clips["clip.ts"])), "no video, or a damaged one"),
        ("folder.mp4", lambda clips, path: path.mkdir(), "cannot be opened"),
    ],
)
def test_files_that_cannot_be_shown(
    clips: dict[str, Path], tmp_path: Path, name: str, made: Callable[[dict[str, Path], Path], Any], told: str
) -> None:
    made(clips, tmp_path / name)
    with pytest.raises(ImageError, match=told) as caught:
        Video.open(tmp_path / name, frames=50).read()
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.fix


def cut_behind_its_index(path: Path) -> None:
    whole = save_video(path, even(60), options={"movflags": "faststart"}).read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def playlist(other: Path) -> str:
    """Of HLS: nothing that a file names is opened."""
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n"


def test_what_there_is_of_a_file_that_was_cut_off(tmp_path: Path) -> None:
    cut_behind_its_index(tmp_path / "front.mp4")
    with pytest.raises(ImageError) as caught:
        Video.open(tmp_path / "front.mp4").read()
    end = float(caught.value.fix.rpartition("end=")[2])
    assert 0.5 < end < 2
    assert len(shown(Video.open(tmp_path / "front.mp4", end=end))) == 8


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.mp4: no such file"):
        Video.open(tmp_path / "absent.mp4")
    with pytest.raises(ImageError, match="cannot open a video from list"):
        Video.open([np.zeros((4, 4, 3), np.uint8)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"fps": 0}, "fps"),
        ({"frames": 0}, "frames"),
        ({"frames": "some"}, "frames is 'some'"),
        ({"frames": "all", "fps": 1}, "frames is 'all'"),
        ({"start": -1}, "start"),
        ({"start": 3, "end": 3}, "end must be a number above 3"),
    ],
)
def test_options_that_cannot_be(clips: dict[str, Path], options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        Video.open(clips["clip.mp4"], **options)


def test_a_part_that_is_not_there(clips: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match=r"clip\.mp4: no frames from 7 to .* s"):
        Video.open(clips["clip.mp4"], start=7).read()


def test_without_the_extra(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendError, match="video files need PyAV") as caught:
        Video.open(clips["clip.mp4"]).read()
    assert "[video]" in caught.value.fix
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize(
    "options",
    [{}, {"fps": 2.0}, {"frames": 3}, {"fps": 1.0, "frames": 4}, {"frames": "all"}, {"start": 1.0, "end": 2.0}],
)
def test_the_options_are_told_again(clips: dict[str, Path], options: dict[str, Any]) -> None:
    assert Video.open(clips["clip.mp4"], **options).stated == options
