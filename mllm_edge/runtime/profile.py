"""Repeat one call and summarize its metrics: the numbers are those that every call reports."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.runtime.device import peak_rss, processor_name
from mllm_edge.runtime.image import ImageSource
from mllm_edge.runtime.processor import Messages
from mllm_edge.runtime.trace import Metrics
from mllm_edge.runtime.vlm import VLM

__all__ = ["PERCENTILES", "Distribution", "Profile", "profile", "samples_needed", "synthetic_image"]

PERCENTILES = (10, 90, 95, 99)
_STAGES = ("preprocess", "vision_encoder", "connector", "embed", "prefill", "ttft", "total")
_WIDTH, _HEIGHT, _SEED = 640, 480, 0


@dataclass(frozen=True)
class Distribution:
    """Samples in short, in the samples' own unit. `percentiles` ("p10", …) has those that the samples suffice for."""

    count: int
    median: float
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Distribution":
        """Summarize one sample or more. Percentile p needs one sample beyond it: 10 for p90, 100 for p99."""
        values = np.asarray(samples, np.float64)
        known = {p: float(np.percentile(values, p)) for p in PERCENTILES if len(values) >= samples_needed(p)}
        return cls(
            count=len(values),
            median=float(np.median(values)),
            minimum=float(values.min()),
            maximum=float(values.max()),
            percentiles={f"p{p}": value for p, value in known.items()},
        )


@dataclass(frozen=True)
class Profile:
    """Measurements of one bundle on this machine; times in seconds, sizes in bytes.

    `stages` are those that ran, by their names in `Metrics`; `tpot` is over all intervals between tokens, None when
    every answer had one token. `load_seconds` covers opening the bundle and its sessions, the import of the runtime
    included; `peak_rss` is the whole process's.
    """

    bundle: str
    machine: str
    backend: str
    threads: int | None
    prompt_tokens: int
    image_tokens: int
    tiles: int
    image: str
    new_tokens: int
    warmup: int
    iterations: int
    load_seconds: float
    stages: Mapping[str, Distribution]
    tpot: Distribution | None
    tokens_per_second: float
    kv_cache_bytes: int
    peak_rss: int
    bundle_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        stages = {name: vars(d) for name, d in self.stages.items()}
        return {**data, "stages": stages, "tpot": vars(self.tpot) if self.tpot else None}


def profile(
    path: str | Path,
    prompt: Messages,
    images: Iterable[ImageSource] = (),
    *,
    new_tokens: int = 32,
    warmup: int = 2,
    iterations: int = 10,
    backend: str = "auto",
    threads: int | None = None,
    max_context: int | None = None,
    progress: Callable[[int], None] = lambda calls: None,
    notice: Callable[[str], None] = warnings.warn,
) -> Profile:
    """Ask the bundle in `path` the same thing `warmup` + `iterations` times, greedily, for `new_tokens` tokens each.

    The model's end is ignored, so that all answers have one length (the context can still cut them short). A model
    that takes images and is given none gets `synthetic_image()`. `progress(1)` is called after each call; `notice`
    as in `VLM.load`.

    Raises what `VLM.load` and `VLM.stream` raise.
    """
    begin = time.perf_counter()
    with VLM.load(path, backend=backend, threads=threads, max_context=max_context, notice=notice) as vlm:
        load_seconds = time.perf_counter() - begin
        images, description = _images(vlm, images)
        calls: list[Metrics] = []
        for _ in range(warmup + iterations):
            result = vlm.generate(prompt, images, max_new_tokens=new_tokens, ignore_eos=True)
            calls.append(result.metrics)
            progress(1)
        return _summary(vlm, calls[warmup:], warmup, load_seconds, description)


def synthetic_image() -> Image.Image:
    """A 640 × 480 px image of smooth colours, always the same."""
    coarse = np.random.default_rng(_SEED).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)


def _images(vlm: VLM, images: Iterable[ImageSource]) -> tuple[list[ImageSource], str]:
    given = list(images)
    if given:
        return given, ", ".join(i if isinstance(i, str) else type(i).__name__ for i in given)
    if vlm.spec.image is None:
        return [], "none"
    return [synthetic_image()], f"synthetic, {_WIDTH} x {_HEIGHT} px, seed {_SEED}"


def _summary(vlm: VLM, calls: Sequence[Metrics], warmup: int, load_seconds: float, image: str) -> Profile:
    stages = {name: [getattr(call, name) for call in calls] for name in _STAGES}
    intervals = [seconds for call in calls for seconds in call.token_seconds]
    first = calls[0]
    return Profile(
        bundle=str(vlm.bundle.path),
        machine=processor_name(),
        backend=vlm.backend.name,
        threads=getattr(vlm.backend, "threads", None),
        prompt_tokens=first.prompt_tokens,
        image_tokens=first.image_tokens,
        tiles=first.tiles,
        image=image,
        new_tokens=first.new_tokens,
        warmup=warmup,
        iterations=len(calls),
        load_seconds=load_seconds,
        stages={name: Distribution.of(seconds) for name, seconds in stages.items() if any(seconds)},
        tpot=Distribution.of(intervals) if intervals else None,
        tokens_per_second=float(np.median([call.tokens_per_second for call in calls])),
        kv_cache_bytes=first.kv_cache_bytes,
        peak_rss=peak_rss(),
        bundle_bytes=vlm.bundle.nbytes,
    )


def samples_needed(percentile: int) -> int:
    """The fewest samples of which one lies beyond this percentile."""
    return -(-100 // min(percentile, 100 - percentile))
