"""Reading weights and writing data files: whole, in pieces, and when the disk or the file gives up."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from mllm_edge.errors import WeightsError
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.graph import chunks
from mllm_edge.graph.datafile import DataFile


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8])
def test_tensors_are_read_as_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 10)
    random = np.random.default_rng(0)
    stored = {name: (9 * random.normal(size=shape)).astype(dtype) for name, shape in (("a", (7, 5)), ("b", (3,)))}
    stored |= {"scalar": np.array(2, dtype), "empty": np.zeros((0, 4), dtype)}
    save_file(stored, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    for name, tensor in stored.items():
        read = weights.use(name, tensor.shape)()
        assert read.dtype == np.float32
        assert np.array_equal(read, tensor.astype(np.float32))
    assert np.array_equal(weights.rows("a", 2, 6), stored["a"][2:6].astype(np.float32))
    read[...] = 1  # a copy of the caller's own


def test_two_tensors_as_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    stored = {name: random.normal(size=(rows, 5)).astype(np.float16) for name, rows in (("a", 7), ("b", 2), ("c", 1))}
    save_file(stored | {"thin": np.ones((3, 4), np.float16)}, tmp_path / "model.safetensors")
    weights, whole = open_weights(tmp_path), np.concatenate([stored["a"], stored["b"]]).astype(np.float32)
    weights.alter("b", lambda values, start: np.add(values, start + 1, out=values))
    whole[7:] += 1
    weights.extend("a", "b")
    assert weights.shape("a") == (9, 5)
    for read in (weights.use("a", (9, 5)), lambda: weights.read("a"), lambda: weights.view("a")):
        assert np.array_equal(read(), whole)
    for start, stop in ((0, 9), (2, 7), (3, 8), (6, 9), (7, 9), (8, 9)):
        expected = np.concatenate([stored["a"], stored["b"]]).astype(np.float32)
        expected[7:] += 1 + max(start - 7, 0)
        assert np.array_equal(weights.rows("a", start, stop), expected[start:stop])
    assert weights.unused() == ["c", "thin"]
    with pytest.raises(WeightsError, match=r"thin has shape \[3, 4\], and stands behind c"):
        weights.extend("c", "thin")
    with pytest.raises(WeightsError, match="no tensor missing"):
        weights.extend("c", "missing")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": np.ones((64, 64), np.float32)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="shorter"):
        weights.read("a")


def test_data_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    arrays = [np.full((n, 512), n, np.float32) for n in (1, 2, 3)]
    with DataFile(tmp_path / "data") as data:
        tensors = [data.add(f"t{a.shape[0]}", ir.DataType.FLOAT, a.shape, lambda a=a: a) for a in arrays]
    content = (tmp_path / "data").read_bytes()
    assert data.entry.sha256 == hashlib.sha256(content).hexdigest()
    assert data.nbytes == len(content)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)


def test_error_of_writing_is_raised(tmp_path: Path) -> None:
    array = np.ones((512, 512), np.float32)

    def fill() -> None:
        with DataFile(tmp_path / "data") as data:
            data._file.close()
            data.add("t", ir.DataType.FLOAT, array.shape, lambda: array)

    with pytest.raises(ValueError, match="closed file"):
        fill()
