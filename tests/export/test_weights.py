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
