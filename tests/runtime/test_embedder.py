"""Rows of the embeddings, from memory and from a mapped file."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.spec import EmbeddingSpec


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_file_and_memory_give_the_same_rows(tmp_path: Path, dtype: str, scale: float) -> None:
    table = np.random.default_rng(0).normal(size=(300, 24)).astype(dtype)
    np.save(tmp_path / "table.npy", table)
    spec = EmbeddingSpec("table.npy", dtype, 300, scale)
    mapped = Embedder(np.load(tmp_path / "table.npy", mmap_mode="r"), spec)
    for ids in ([0], [299, 0, 7, 7], [], [-1]):
        rows = mapped(np.array(ids, np.int64))
        np.testing.assert_array_equal(rows, table[ids].astype(np.float32).reshape(-1, 24) * scale)
        np.testing.assert_array_equal(rows, Embedder(table, spec)(np.array(ids, np.int64)).reshape(-1, 24))
        assert rows.dtype == np.float32
    with pytest.raises(IndexError):
        mapped(np.array([300]))
    mapped.close()
