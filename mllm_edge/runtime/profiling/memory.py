"""Memory: the peak while each stage ran, and what the bundle alone predicts.

Linux keeps a process's peak resident size and lets the process forget it (5 in /proc/self/clear_refs); elsewhere only
the peak of the whole process is known.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.bundle import Bundle
from mllm_edge.runtime.backends.base import Backend
from mllm_edge.runtime.budget import memory
from mllm_edge.runtime.limits import PREFILL_CHUNK
from mllm_edge.runtime.machine.cpu import peak_rss
from mllm_edge.runtime.planning.memory import MemoryModel
from mllm_edge.runtime.planning.shapes import crossed_bytes, stage_runs
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.runtime.trace import Metrics, Trace
from mllm_edge.spec import DECODER, DEEPSTACK, Variant

__all__ = [
    "MemoryUse",
    "Predicted",
    "WatchedTrace",
    "can_watch",
    "gpu_memory",
    "measured",
    "predict_activations",
    "predict_images",
]

_CLEAR = Path("/proc/self/clear_refs")
# Values that live at once in a layer, in tensors as large as its input: residual, norm, q, k, v, and a feed-forward
# part of four times the width.
_LIVE = 9


@dataclass(frozen=True)
class Predicted:
    """Bytes, from the bundle and the images' sizes: `weights` of all components, the `kv_cache`, `activations` of the
    runs of each component (an engine keeps that memory), `images` as they are decoded and as pixel values, and with the
    base the `total`. On the CPU they are those of `PlannedMemory`: weights as the engine keeps them, and of the cache
    what is written. Elsewhere weights are as stored, and the cache has its whole capacity."""

    weights: int
    kv_cache: int
    activations: int
    images: int
    total: int

    @property
    def on_gpu(self) -> int:
        """What a backend keeps in device memory: everything but the base and the images."""
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `base`: resident once the engine's library was imported, and what `first_use` of it takes where it was new
    to this process; `peak`: from the load on, or of the whole process where `stages` is None; `stages`: the peak while
    each ran, in the load and the first call, None where the system does not tell; `weights` by component, as stored;
    `mapped` files are read row by row; `rest` = peak − base − weights − kv_cache: the engine's arenas and its packed
    copies of weights. `gpu`: device memory in use after the first run, by all processes, None without a GPU;
    `gpu_stages`: in the same way the most at the end of each stage, of the load (open) and the first call. `notes`:
    what could not be measured, and why.
    """

    base: int
    peak: int
    stages: Mapping[str, int] | None
    weights: Mapping[str, int]
    mapped: int
    kv_cache: int
    gpu: int | None
    gpu_stages: Mapping[str, int] | None
    predicted: Predicted
    notes: tuple[str, ...]

    @property
    def rest(self) -> int:
        """What neither the base nor the bundle's files nor the cache explain."""
        return self.peak - self.base - sum(self.weights.values()) - self.kv_cache

    @property
    def error_percent(self) -> float:
        """The prediction's, of the peak."""
        return 100.0 * (self.predicted.total - self.peak) / self.peak if self.peak else 0.0


class WatchedTrace(Trace):
    """A trace that also keeps the process's peak resident size while each span ran, in `peaks`, bytes, and the most
    device memory at the spans' ends, in `gpu`, where `backend` tells it.

    Watching takes some 50 µs a span: for calls whose times are not counted.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        super().__init__()
        self._backend = backend
        self.peaks: dict[str, int] = {}
        self.gpu: dict[str, int] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body and watch it."""
        _forget_peak()
        with super().span(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0), peak_rss())
        used = None if self._backend is None else gpu_memory(self._backend)
        if used is not None:
            self.gpu[name] = max(self.gpu.get(name, 0), used)


def can_watch() -> bool:
    """Whether this system tells and forgets a process's peak."""
    try:
        _forget_peak()
        return peak_rss() > 0
    except OSError:
        return False


def gpu_memory(backend: Backend) -> int | None:
    """Bytes of device memory in use, by all processes; None where the backend uses no GPU or cannot tell."""
    tell: Callable[[], int | None] = getattr(backend, "memory_used", lambda: None)
    return tell()


def measured(
    bundle: Bundle,
    target: str,
    call: Metrics,
    shown: Sequence[tuple[Layout, tuple[int, int]]],
    capacity: int,
    peaks: Mapping[str, int] | None,
    base: int,
    gpu: int | None,
    gpu_stages: Mapping[str, int] | None,
) -> MemoryUse:
    """The measurement beside the prediction for a `call` with images of these layouts and (width, height), and a cache
    of `capacity` tokens. `peaks`: those of the spans of the load and the first call; the others as in `MemoryUse`."""
    bytes_of = next(m for m in memory(bundle, capacity) if m.target == target)
    predicted = (_on_cpu if target == "cpu" else _elsewhere)(bundle, target, call, shown, capacity, base)
    notes = [] if peaks is not None else ["peak of each stage: this system does not tell a process's peak anew"]
    if gpu is None:
        notes.append("GPU memory: no GPU is in use" if target == "cpu" else f"GPU memory: not told on target {target}")
    return MemoryUse(
        base=base,
        peak=max([peak_rss(), *(peaks or {}).values()]),
        stages=peaks,
        weights=bytes_of.weights,
        mapped=bytes_of.mapped,
        kv_cache=call.kv_cache_bytes,
        gpu=gpu,
        gpu_stages=gpu_stages,
        predicted=predicted,
        notes=tuple(notes),
    )


def _on_cpu(
    bundle: Bundle,
    target: str,
    call: Metrics,
    shown: Sequence[tuple[Layout, tuple[int, int]]],
    capacity: int,
    base: int,
) -> Predicted:
    layouts, sizes = [layout for layout, _ in shown], [(height, width) for _, (width, height) in shown]
    p = MemoryModel(bundle, target).predict(call.prompt_tokens, layouts, sizes, call.new_tokens, capacity, base)
    return Predicted(p.weights, p.kv_cache, p.vision + p.prefill, p.images, p.peak)


def _elsewhere(
    bundle: Bundle,
    target: str,
    call: Metrics,
    shown: Sequence[tuple[Layout, tuple[int, int]]],
    capacity: int,
    base: int,
) -> Predicted:
    bytes_of = next(m for m in memory(bundle, capacity) if m.target == target)
    layouts, sizes = [layout for layout, _ in shown], [size for _, size in shown]
    variants = {name: bundle.variant(name, target) for name in bundle.manifest.components}
    weights = sum(bytes_of.weights.values())
    kept = bytes_of.kv_cache + crossed_bytes(bundle.manifest.model, variants, layouts, call.prompt_tokens)
    activations = predict_activations(bundle, target, call.prompt_tokens, layouts)
    images = predict_images(bundle, layouts, sizes)
    return Predicted(weights, kept, activations, images, base + weights + kept + activations + images)


def predict_activations(bundle: Bundle, target: str, prompt_tokens: int, layouts: Sequence[Layout]) -> int:
    """Bytes that the largest run of each component works in, for images of these layouts: its outputs as its variant
    states them, times the values that live at once, and what is added behind the decoder's layers, for the whole
    prompt. An attention that keeps all its scores takes more."""
    model = bundle.manifest.model
    whole = model.image is not None and model.image.both_ways == "prompt"
    begun = model.begun(prompt_tokens)
    rows = begun if whole else min(begun, PREFILL_CHUNK)
    variants = {name: bundle.variant(name, target) for name in bundle.manifest.components}
    runs = {
        s.component: [sizes for sizes, _ in stage_runs(model, s, variants, layouts, prompt_tokens)]
        for s in model.stages
    }
    stages = sum(_largest(variants[component], sizes) for component, sizes in runs.items())
    added = sum(t.name.startswith(DEEPSTACK) for t in variants[DECODER].inputs) * prompt_tokens * model.hidden_size
    return 4 * (_LIVE * (rows * model.hidden_size + stages) + added + model.vocab_size)


def predict_images(bundle: Bundle, layouts: Sequence[Layout], sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the decoded images of these layouts and (width, height), and of all their pixel values in float32."""
    image = bundle.manifest.model.image
    if image is None:
        return 0
    values = sum(layout.slices for layout in layouts) * sum(map(math.prod, image.inputs.values()))
    return 3 * sum(width * height for width, height in sizes) + 4 * values


def _largest(variant: Variant, runs: Sequence[Mapping[str, int]]) -> int:
    """Values of a graph's widest output in any of the runs."""
    shapes = [[d if isinstance(d, int) else run.get(d, 1) for d in t.shape] for t in variant.outputs for run in runs]
    return max(map(math.prod, shapes), default=0)


def _forget_peak() -> None:
    _CLEAR.write_text("5")
