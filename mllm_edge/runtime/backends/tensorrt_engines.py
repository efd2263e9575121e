"""Engines of a bundle: which shapes they take, under which names they lie in `engines/`, when one is good.

An engine's file says which component, target, GPU and TensorRT it is for, and the hash of the graph and its weights;
a JSON file beside it holds its limits and its own hash. What does not match is never opened.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mllm_edge.bundle import Bundle, sha256
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.tensorrt_build import Module, Options, Range, Sizes, build, modules
from mllm_edge.runtime.doctor import MINIMUM
from mllm_edge.runtime.generate import PREFILL_CHUNK
from mllm_edge.spec import ImageSpec, Variant

__all__ = [
    "FOLDER",
    "Limits",
    "StoredEngine",
    "build_inputs",
    "build_workspace",
    "builders",
    "building_memory",
    "default_limits",
    "find_engine",
    "make_engine",
    "usable",
]

FOLDER = "engines"
# Caches have a multiple of so many places: every sequence of a batch begins where TensorRT takes an address.
_PLACES = 64
# A longest sequence that no one asked for: longer ones cost memory from the start.
_USUAL_SEQ = 4096
# Tokens in one run of a decode profile. One alone would make TensorRT keep the weights twice.
_DECODE = 8
_ROWS = 8
# Host memory for a build, measured with TensorRT for RTX: 3 times the weights, and what the builder itself takes.
_WEIGHTS_TIMES, _BUILDER = 3, 500 << 20


@dataclass(frozen=True)
class Limits:
    """The largest shapes an engine takes. `max_seq`: tokens of prompt and answer together; `max_images`: images or
    tiles in one run of the vision encoder; `max_batch`: sequences at once."""

    max_seq: int
    max_images: int = 4
    max_batch: int = 1

    def covers(self, other: "Limits") -> bool:
        """Whether everything that `other` allows fits."""
        return all(mine >= its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True))

    def sizes(self, variant: Variant) -> dict[str, int]:
        """Symbol → the largest size that a caller may use."""
        if variant.kv_mode is None:
            return {"tiles": self.max_images}
        batch = 1 if variant.kv_mode == "append" else self.max_batch
        return {"batch": batch, "sequence": _prefill(self), "capacity": self.max_seq}


@dataclass(frozen=True)
class StoredEngine:
    """An engine in its file, and what was found out about it."""

    path: Path
    limits: Limits


def default_limits(bundle: Bundle, max_seq: int | None = None, max_images: int = 4, max_batch: int = 1) -> Limits:
    """Limits for a bundle, `max_seq` rounded up; raises BackendError when it is beyond the model's context."""
    context = bundle.manifest.model.context_length
    if max_seq is not None and not 2 <= max_seq <= context:
        raise BackendError(
            f"--max-seq {max_seq} does not fit the model, whose context holds {context} tokens",
            f"--max-seq between 2 and {context}",
        )
    wanted = max_seq or min(context, _USUAL_SEQ)
    return Limits(-(-wanted // _PLACES) * _PLACES, max_images, max_batch)


def building_memory(bundle: Bundle, variant: Variant) -> int:
    """Bytes of host memory that building the engine of a variant takes, roughly."""
    data = bundle.manifest.files.get(f"{variant.file}.data")
    weights = bundle.manifest.files[variant.file].nbytes + (data.nbytes if data else 0)
    return _WEIGHTS_TIMES * weights + _BUILDER


def build_workspace(cuda: Cuda) -> int:
    """Bytes that kernels may work in: half of what is free, for weights and caches want the rest."""
    return cuda.free_memory() // 2


def builders(minimum: Mapping[str, str], device: str, here: str) -> list[Module]:
    """Modules (name → lowest version) that build for a GPU ("sm86"), on a machine with the GPU `here` ("": none).

    Raises BackendError that says why, when none does.
    """
    found, problems = [], []
    for module in modules(minimum):
        try:
            if module.builds_ahead:
                module.capability(device)
            elif device != here:
                what = f"{module.title} builds for the GPU it runs on ({here or 'here is none'}), not for {device}"
                raise BackendError(what, 'build on the device itself, or pip install "mllm-edge[rtx]"')
            found.append(module)
        except BackendError as e:
            problems.append(e)
    if not found:
        raise problems[0]
    return found


def usable(target: str) -> bool:
    """Whether this machine has a GPU, cuda-bindings, and a TensorRT that builds for both."""
    try:
        device = Cuda().capability
        return bool(builders(MINIMUM[target], device, device))
    except BackendError:
        return False


def find_engine(bundle: Bundle, variant: Variant, module: Module, device: str) -> StoredEngine | None:
    """The engine for a GPU ("sm86"), None when there is none or it is damaged or another's."""
    path = _path(bundle, variant, module, device)
    try:
        facts = json.loads(_facts(path).read_text(encoding="utf-8"))
        good = facts["identity"] == _identity(bundle, variant, module, device) and facts["sha256"] == sha256(path)
        return StoredEngine(path, Limits(**facts["limits"])) if good else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_inputs(bundle: Bundle, variant: Variant, limits: Limits) -> tuple[list[dict[str, Range]], Options]:
    """Profiles, and what has to be known about caches and logits, to `build` the engine of a variant with."""
    best = variant.kv_mode is not None and any(t.name == "logits" for t in variant.outputs)
    if variant.kv_mode != "in_place":
        options = Options(cache_updates=0, best=best)
    else:
        options = Options({"capacity": limits.max_seq}, 2 * bundle.manifest.model.cache.layers, best=best)
    return _profiles(variant, limits, bundle.manifest.model.image), options


def make_engine(
    bundle: Bundle,
    variant: Variant,
    module: Module,
    device: str,
    limits: Limits,
    workspace: int = 0,
    progress: Callable[[float], None] | None = None,
) -> StoredEngine:
    """Build the engine for a GPU and store it in the bundle; an engine that was there is replaced at the end.

    Raises BackendError when TensorRT refuses or the bundle cannot be written.
    """
    path = _path(bundle, variant, module, device)
    with _writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    profiles, sizes = build_inputs(bundle, variant, limits)
    timings = None if module.builds_ahead else path.parent / f"timings-{_engine_of(module)}-{device}.cache"
    options = replace(sizes, workspace=workspace, timing_cache=timings, progress=progress)
    capabilities = [module.capability(device)] if module.builds_ahead else []
    with _writing(path.parent):
        engine = build(bundle.listed(variant.file), profiles, capabilities, module, options)
    digest = hashlib.sha256(engine.data).hexdigest()
    facts = {"identity": _identity(bundle, variant, module, device), "limits": asdict(limits), "sha256": digest}
    with _writing(path.parent):
        _facts(path).unlink(missing_ok=True)
        _write(path, engine.data)
        _write(_facts(path), json.dumps(facts, indent=1).encode())
    return StoredEngine(path, limits)


def _profiles(variant: Variant, limits: Limits, image: ImageSpec | None) -> list[dict[str, Range]]:
    """Prefill and decode for a decoder, one for all else: the shapes of every input."""
    if variant.kv_mode is None:
        most, cells = limits.max_images, _most_cells(limits, image)
        return [_ranges(variant, {"tiles": (1, min(most, 2), most), "cells": (1, min(cells, 256), cells)})]
    longest, most = limits.max_seq, _prefill(limits)
    usual, half = min(256, most), max(1, longest // 2)
    append = variant.kv_mode == "append"
    batch = 1 if append else limits.max_batch
    found = []
    for sequence in ((1, usual, most), (1, 1, min(_DECODE, most))):
        # Every number of new tokens may stand behind every past, as far as `max_seq`.
        past = (0, half - 1, longest - 1)
        spanned = tuple(old + new for old, new in zip(past, sequence, strict=True))
        length = (1, max(half, usual), longest) if not append else spanned
        symbols: dict[str, Sizes] = {
            "batch": (1, 1, batch),
            "rows": (1, 1, min(_ROWS, most)),
            "sequence": sequence,
            "past": past,
            "length": (length[0], length[1], length[2]),
            "capacity": (longest, longest, longest),
        }
        found.append(_ranges(variant, symbols))
    return found


def _most_cells(limits: Limits, image: ImageSpec | None) -> int:
    """Cells of the largest image that its transforms make and the context takes, for each of them is a token."""
    areas = [t.max_pixels // t.multiple**2 for t in image.transforms if t.op == "resize_to_pixels"] if image else []
    return min([limits.max_seq, *areas])


def _ranges(variant: Variant, symbols: Mapping[str, Sizes]) -> dict[str, Range]:
    unknown = {s for t in variant.inputs for s in t.shape if isinstance(s, str)} - set(symbols)
    if unknown:
        what = f"{variant.file}: no range is known for the dimension {sorted(unknown)[0]!r}"
        raise BackendError(what, "use --backend cpu for this bundle, and please report this")

    def shape(which: int, dims: tuple[int | str, ...]) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else symbols[d][which] for d in dims)

    return {t.name: (shape(0, t.shape), shape(1, t.shape), shape(2, t.shape)) for t in variant.inputs}


def _prefill(limits: Limits) -> int:
    return min(PREFILL_CHUNK, limits.max_seq)


def _identity(bundle: Bundle, variant: Variant, module: Module, device: str) -> dict[str, str]:
    """What an engine is of and for."""
    files = bundle.manifest.files
    names = [name for name in (variant.file, f"{variant.file}.data") if name in files]
    graph = hashlib.sha256("".join(files[name].sha256 for name in names).encode()).hexdigest()
    return {"graph": graph, "module": module.name, "version": module.version, "device": device}


def _path(bundle: Bundle, variant: Variant, module: Module, device: str) -> Path:
    graph = _identity(bundle, variant, module, device)["graph"][:12]
    name = f"{Path(variant.file).stem}-{graph}-{_engine_of(module)}-{device}.engine"
    return bundle.file(f"{FOLDER}/{name}")


def _engine_of(module: Module) -> str:
    return f"{'rtx' if module.builds_ahead else 'trt'}{module.version}"


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        fix = "make the bundle's folder writable, free space there, or copy the bundle"
        raise BackendError(f"{folder}: engines cannot be stored here: {e.strerror}", fix) from e


def _write(path: Path, data: bytes | memoryview) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
