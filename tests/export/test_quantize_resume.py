"""A quantization that was interrupted: it goes on, says from where, and makes again what cannot be read."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle import Bundle
from mllm_edge.calibration import calibrate as calibrate_module
from mllm_edge.calibration.findings import is_whole, save_arrays
from mllm_edge.errors import DataError, ExportError, LockedError, MllmEdgeError
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import QuantizeReport, quantize
from mllm_edge.lock import locked
from tests.tiny import save_tiny_idefics3


class Stages:
    """Keeps the titles of the stages."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def stage(self, title: str, total: int = 0) -> None:
        self.titles.append(title)

    def advance(self, amount: int) -> None: ...

    def notice(self, text: str) -> None: ...


def samples() -> list[dict[str, Any]]:
    pixels = np.random.default_rng(0)
    return [
        {"image": pixels.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8), "prompt": "What?", "answer": "a cat"}
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bundle, and `interrupted`: what a quantization leaves that ends behind two pieces of the decoder."""
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_idefics3(folder / "model")
    export(str(folder / "model"), folder / "fp16", recipe_name="fp16", verify_mode="off")
    finish = calibrate_module._State.finish

    def stop(self: Any, number: int) -> None:
        finish(self, number)
        if self._folder.name == "decoder" and number == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module._State, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder / "fp16", folder / "interrupted" / "out", recipe="int4", data=samples())
    quantize(folder / "fp16", folder / "whole", recipe="int4", data=samples())
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted work; the bundle will be `out` in it."""
    shutil.copytree(folder / "interrupted", tmp_path / "copy")
    return tmp_path / "copy"


def again(folder: Path, place: Path, progress: Any = None) -> QuantizeReport:
    return quantize(folder / "fp16", place / "out", recipe="int4", data=samples(), progress=progress)


def weights(bundle: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in Bundle.load(bundle).manifest.files.items() if name.endswith(".data")}


def test_it_says_from_where(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Stages()
    again(folder, place, progress)
    told = next(title for title in progress.titles if title.startswith("going on where it was interrupted"))
    assert "the samples are recorded" in told
    assert "2 pieces of the decoder" in told
    assert "pieces of the vision encoder" in told
    assert "recording the samples" not in progress.titles
    assert weights(place / "out") == weights(folder / "whole")
    assert [path.name for path in place.iterdir()] == ["out"]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


KINDS = [
    "key",
    "recorded",
    "feeds/decoder/*.npz",
    "feeds/vision_encoder/*.npz",
    "vision_encoder/layers/*.npz",
    "vision_encoder/done-0",
    "decoder/layers/*.npz",
    "decoder/passing-exact-1-*.npz",
    "decoder/passing-rounded-1-*.npz",
    "decoder/done-1",
    "decoder/piece.onnx",
    "decoder/piece.onnx.data",
]


@pytest.mark.parametrize("damage", [emptied, gone])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_made_again(
    folder: Path, place: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    found = sorted((place / ".out.calibration").glob(kind))
    if not found:
        assert kind.startswith("decoder/piece")
        return
    damage(found[-1])
    again(folder, place)
    assert weights(place / "out") == weights(folder / "whole")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_folder_in_the_place_of_a_file(folder: Path, place: Path) -> None:
    (place / ".out.calibration" / "key").unlink()
    (place / ".out.calibration" / "key").mkdir()
    again(folder, place)
    assert weights(place / "out") == weights(folder / "whole")


def test_a_second_one_is_told_and_takes_nothing_away(folder: Path, place: Path) -> None:
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    with locked(place / "out"):
        with pytest.raises(LockedError, match="works on it"):
            again(folder, place)
        with pytest.raises(LockedError, match="works on it"):
            export(str(folder / "model"), place / "out", recipe_name="fp32")
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before


def test_a_full_disk_on_the_way_keeps_what_was_found(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mllm_edge.calibration.findings.np.savez", full)
        with pytest.raises(MllmEdgeError, match=r"\.out\.calibration.*No space left on device.*MB free") as caught:
            again(folder, place)
    assert "free some space" in caught.value.fix
    assert not (place / "out").exists()
    assert (place / ".out.calibration" / "decoder" / "done-1").exists()
    monkeypatch.setattr("mllm_edge.calibration.quantize_job.record", None)  # would fail: it must not record again
    again(folder, place)


def test_a_full_disk_at_the_end_is_an_export_error(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mllm_edge.calibration.quantize_job.save_model", full)
    with pytest.raises(ExportError, match="No space left on device"):
        again(folder, place)
    assert not (place / "out").exists()


# ---------------------------------------------------------------- bad pictures
def pictures(folder: Path) -> Path:
    for name in ("1.png", "2.png", "sub/9.png", "sub/10.png", "sub/deep/a.png", "b.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (20, 90, 200)).save(path)
    return folder


def test_the_first_bad_picture_is_named_with_the_option(folder: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures")
    cut(data / "sub" / "9.png")
    with pytest.raises(DataError, match=r"sub/9\.png") as caught:
        quantize(folder / "fp16", tmp_path / "out", recipe="int4", data=data)
    assert "--skip-bad" in caught.value.fix
    assert not (tmp_path / ".out.calibration").exists()


def test_bad_pictures_can_be_left_out_and_are_listed(folder: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures")
    emptied(data / "sub" / "9.png")
    report = quantize(folder / "fp16", tmp_path / "out", recipe="int4", data=data, skip_bad=True)
    assert (report.samples, report.held_back) == (4, 1)
    assert len(report.skipped) == 1
    assert "9.png" in report.skipped[0]
    assert report.as_dict()["skipped"] == list(report.skipped)


def test_too_few_are_left(folder: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures")
    for name in ("1.png", "sub/10.png"):
        emptied(data / name)
    with pytest.raises(DataError, match=r"4 samples \(2 others cannot be read, the first: .*1\.png"):
        quantize(folder / "fp16", tmp_path / "out", recipe="int4", data=data, skip_bad=True)


# ---------------------------------------------------------------- one file
def test_an_npz_is_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for damage in (emptied, cut, zeroed, one_byte, gone):
        save_arrays(path, {"x": np.arange(1000.0)})
        assert is_whole(path)
        damage(path)
        assert not is_whole(path)
