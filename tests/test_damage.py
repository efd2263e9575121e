"""Damage that keeps a file's size: named at load or at the first read, never an answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.checksums import FileHasher, Touched, damaged_block, file_entry
from mllm_edge.errors import BundleError, MllmEdgeError
from mllm_edge.spec import FileEntry

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def flip(path: Path, place: int, nbytes: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + nbytes] = bytes(b ^ 1 for b in data[place : place + nbytes])
    path.write_bytes(data)


def answer(bundle: Path) -> tuple[int, ...]:
    with VLM.load(bundle, threads=1) as vlm:
        return vlm.generate("What is in the picture?", PICTURE, max_new_tokens=4).token_ids


READ = sorted(
    [
        *(f"{name}.onnx{data}" for name in ("vision_encoder", "connector", "decoder") for data in ("", ".data")),
        "chat_template.jinja",
        "generation.json",
        "tokenizer.json",
    ]
)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_changed_byte_in_what_a_load_reads_is_named(bundle: Path, name: str, where: float) -> None:
    path = bundle / name
    flip(path, int((path.stat().st_size - 1) * where))
    with pytest.raises(BundleError, match=rf"{name} is damaged: bytes \d+ to \d+") as caught:
        VLM.load(bundle)
    assert "copy the bundle again" in caught.value.fix
    assert "recipe" not in str(caught.value)


def test_every_file_is_checked_by_load_or_when_it_is_read(tiny_bundle: Path) -> None:
    files = set(Bundle.load(tiny_bundle).manifest.files)
    assert files == {*READ, "embed_tokens.npy"}
    assert all(entry.xxh3 for entry in Bundle.load(tiny_bundle).manifest.files.values())


def test_damaged_embeddings_are_named_when_a_row_is_read(bundle: Path) -> None:
    path, table = bundle / "embed_tokens.npy", Bundle.load(bundle).embeddings()
    with VLM.load(bundle) as vlm:
        used = vlm.processor.process("Hi", []).token_ids
    row = table.nbytes // len(table)
    flip(path, path.stat().st_size - table.nbytes + int(used[0]) * row)
    with VLM.load(bundle) as vlm, pytest.raises(BundleError, match=r"embed_tokens\.npy is damaged"):
        vlm.generate("Hi", max_new_tokens=2)


def test_a_damaged_header_of_the_embeddings_is_named_at_load(bundle: Path) -> None:
    flip(bundle / "embed_tokens.npy", 20)
    with pytest.raises(BundleError, match=r"embed_tokens\.npy is damaged"):
        VLM.load(bundle)


def test_verify_reads_everything_first(bundle: Path) -> None:
    VLM.load(bundle, verify=True).close()
    flip(bundle / "embed_tokens.npy", (bundle / "embed_tokens.npy").stat().st_size - 1)
    with pytest.raises(BundleError, match=r"embed_tokens\.npy differs"):
        VLM.load(bundle, verify=True)


def test_check_all_finds_damage_anywhere(bundle: Path) -> None:
    Bundle.load(bundle).check_all()
    flip(bundle / "embed_tokens.npy", (bundle / "embed_tokens.npy").stat().st_size - 1)
    with pytest.raises(BundleError, match=r"embed_tokens\.npy is damaged"):
        Bundle.load(bundle).check_all()


def test_a_bundle_without_checksums_loads_and_is_verified_by_sha256(bundle: Path) -> None:
    expected, path = answer(bundle), bundle / "manifest.json"
    data = json.loads(path.read_text())
    for entry in data["files"].values():
        del entry["block"], entry["xxh3"]
    path.write_text(json.dumps(data))
    assert answer(bundle) == expected
    flip(bundle / "decoder.onnx.data", 100)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data differs"):
        VLM.load(bundle, verify=True)


def test_nan_is_no_question_of_the_recipe_alone() -> None:
    from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams

    with pytest.raises(MllmEdgeError, match="NaN") as caught:
        Sampler(SamplingParams(), np.zeros(0, np.int64)).sample(np.array([0.0, np.nan], np.float32))
    assert caught.value.fix.startswith("check the files with `mllm-edge inspect BUNDLE --verify`")


# ---------------------------------------------------------------- blocks
@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_any_byte_of_any_block(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    entry = file_entry(path)
    assert damaged_block(path, entry) is None
    for place in {0, size // 2, size - 1} if size else ():
        flip(path, place)
        found = damaged_block(path, entry)
        assert found is not None
        assert place in found
        flip(path, place)
    if size:
        path.write_bytes(path.read_bytes()[:-1])
        assert damaged_block(path, entry) is not None


def test_pieces_of_any_size_give_the_same_entry(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((2 << 20) + 5)
    (tmp_path / "data").write_bytes(data)
    hasher = FileHasher("data")
    for start in range(0, len(data), 70_001):
        hasher.update(data[start : start + 70_001])
    assert hasher.entry() == file_entry(tmp_path / "data")


def told(place: range) -> Exception:
    return BundleError(f"{place.start}-{place.stop}")


@pytest.mark.parametrize(
    ("span", "damage", "found"),
    [
        ((0, 1), 0, "0-65536"),
        ((65535, 65537), 65536, "65536-131072"),
        ((0, 200_000), 131_072, "131072-196608"),
        ((199_999, 200_000), 199_999, "196608-200000"),
        ((0, 65536), 65536, None),
        ((5, 5), 0, None),
    ],
)
def test_only_touched_blocks_are_read(tmp_path: Path, span: tuple[int, int], damage: int, found: str | None) -> None:
    path = tmp_path / "rows.npy"
    path.write_bytes(np.random.default_rng(0).bytes(200_000))
    entry = file_entry(path)
    flip(path, damage)
    touched: Callable[[int, int], None] = Touched(path, entry, told)
    if found is None:
        touched(*span)
    else:
        with pytest.raises(BundleError, match=found):
            touched(*span)


def test_a_block_is_compared_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    path.write_bytes(bytes(100))
    touched = Touched(path, file_entry(path), told)
    touched(0, 10)
    path.unlink()
    touched(0, 100)


def test_a_file_without_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    Touched(tmp_path / "nothing", FileEntry(5, ""), told)(0, 5)
    assert damaged_block(tmp_path / "nothing", FileEntry(5, "")) is None
