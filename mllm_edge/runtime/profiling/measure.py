"""Repeat one call and summarize where its time and memory go: the figures are those that every call reports."""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.bundle import MANIFEST, Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backend import TENSORRT
from mllm_edge.runtime.device import peak_rss
from mllm_edge.runtime.image import ImageSource, load_image
from mllm_edge.runtime.operators import Operator, profile_operators
from mllm_edge.runtime.power import PowerMeter, PowerReading
from mllm_edge.runtime.processor import Messages
from mllm_edge.runtime.profiling.environment import Environment, read_environment, versions
from mllm_edge.runtime.profiling.memory import MemoryUse, WatchedTrace, can_watch, gpu_memory, measured
from mllm_edge.runtime.profiling.statistics import Distribution, Jitter, Noise, jitter, noise
from mllm_edge.runtime.roofline import MachineLimits, StageRoof, Workload, machine_limits, roofline
from mllm_edge.runtime.trace import LOAD_STAGES, STAGES, Metrics, Trace
from mllm_edge.runtime.vlm import VLM

__all__ = ["TITLE", "VERSION", "BundleInfo", "Call", "Profile", "Setting", "profile", "synthetic_image"]

VERSION = 1  # of the JSON form, see profile.schema.json
TITLE = "mllm_edge.title"  # what an image is, in the `info` of a picture made here
_SIZE, _SEED = (640, 480), 0
_OPERATOR_TOKENS = 32  # enough for a mean; the profiler holds a million events


@dataclass(frozen=True)
class BundleInfo:
    """`nbytes` of all files; `recipe` and `target` of the decoder's graph; `digest`: SHA-256 of the manifest."""

    path: str
    nbytes: int
    recipe: str
    target: str
    digest: str


@dataclass(frozen=True)
class Setting:
    """What was asked, and how. `images` in words; `image_sizes` (width, height) in px."""

    backend: str
    threads: int | None
    max_context: int | None
    images: str
    image_sizes: tuple[tuple[int, int], ...]
    prompt_tokens: int
    image_tokens: int
    tiles: int
    new_tokens: int
    warmup: int
    iterations: int


@dataclass(frozen=True)
class Call:
    """One call, in seconds. `stages` are those that ran; `token_seconds` the intervals between tokens."""

    total: float
    ttft: float
    stages: Mapping[str, float]
    token_seconds: tuple[float, ...]

    @classmethod
    def of(cls, metrics: Metrics) -> "Call":
        """From the metrics that a call reports."""
        stages = {name: getattr(metrics, name) for name in STAGES}
        ran = {name: seconds for name, seconds in stages.items() if seconds}
        return cls(metrics.total, metrics.ttft, ran, metrics.token_seconds)


@dataclass(frozen=True)
class Profile:
    """Measurements of one bundle on this machine; times in seconds, sizes in bytes.

    `cold` is the first call after the load, which is in no distribution, as warm-up calls aren't; `load_stages` are
    backend (the engine is chosen and imported) and open (tokenizer, sessions). `stages` are those that ran, in order:
    each is its whole time in a call, and together they are the call, of which they make `coverage`. `tpot` is over all
    intervals between tokens, None when every answer had one token. `point`: what is special about it in a sweep.
    `traces` have the spans of the load and of every call, with their titles. `power` is that of the counted calls;
    `operators` those of another call; `roofline` what the stages reach of the machine's `limits`. All are None where
    they were not asked for, `limits` and `roofline` also on other backends than cpu.
    """

    created: str
    bundle: BundleInfo
    versions: Mapping[str, str]
    machine: Environment
    setting: Setting
    load: float
    load_stages: Mapping[str, float]
    cold: Call
    calls: tuple[Call, ...]
    memory: MemoryUse
    traces: tuple[tuple[str, Trace], ...] = ()
    point: Mapping[str, str | int] = field(default_factory=dict)
    power: PowerReading | None = None
    operators: tuple[Operator, ...] | None = None
    limits: MachineLimits | None = None
    roofline: tuple[StageRoof, ...] | None = None

    @property
    def stages(self) -> dict[str, Distribution]:
        """Of the counted calls."""
        ran = [name for name in STAGES if any(name in call.stages for call in self.calls)]
        return {name: Distribution.of([call.stages.get(name, 0.0) for call in self.calls]) for name in ran}

    @property
    def ttft(self) -> Distribution:
        """From the call to the first token."""
        return Distribution.of([call.ttft for call in self.calls])

    @property
    def total(self) -> Distribution:
        """Whole calls."""
        return Distribution.of([call.total for call in self.calls])

    @property
    def tpot(self) -> Distribution | None:
        """Intervals between tokens."""
        intervals = [seconds for call in self.calls for seconds in call.token_seconds]
        return Distribution.of(intervals) if intervals else None

    @property
    def tokens_per_second(self) -> float:
        """Decode rate after the first token, the median over calls; 0 for answers of one token."""
        means = self._tpots()
        return 1.0 / float(np.median(means)) if means else 0.0

    @property
    def coverage(self) -> float:
        """The stages' share of the whole call, the median over calls."""
        return float(np.median([sum(call.stages.values()) / call.total for call in self.calls]))

    @property
    def jitter(self) -> Jitter | None:
        """Between tokens; None for answers of fewer than three."""
        return jitter([call.token_seconds for call in self.calls])

    @property
    def noise(self) -> Noise:
        """How far the counted calls differ."""
        return noise([call.total for call in self.calls], self._tpots())

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, as profile.schema.json says."""
        cold = {"load": self.load, "load_stages": dict(self.load_stages), "call": asdict(self.cold)}
        stages = {name: asdict(d) for name, d in self.stages.items()}
        memory = {**asdict(self.memory), "rest": self.memory.rest, "error_percent": self.memory.error_percent}
        data = {
            "version": VERSION,
            "created": self.created,
            **({"point": dict(self.point)} if self.point else {}),
            "bundle": asdict(self.bundle),
            "versions": dict(self.versions),
            "machine": asdict(self.machine),
            "setting": asdict(self.setting),
            "cold": cold,
            "stages": stages,
            "coverage": self.coverage,
            "ttft": asdict(self.ttft),
            "total": asdict(self.total),
            "tpot": asdict(self.tpot) if self.tpot else None,
            "tokens_per_second": self.tokens_per_second,
            "jitter": asdict(self.jitter) if self.jitter else None,
            "noise": {**asdict(self.noise), "noisy": self.noise.noisy},
            "memory": memory,
            "calls": [asdict(call) for call in self.calls],
            **({} if self.limits is None else {"limits": self.limits.as_dict()}),
            **({} if self.roofline is None else {"roofline": [stage.as_dict() for stage in self.roofline]}),
            **({} if self.operators is None else {"operators": [asdict(o) for o in self.operators]}),
            **({} if self.power is None else {"power": self.power.as_dict()}),
        }
        plain: dict[str, Any] = _plain(data)
        return plain

    def _tpots(self) -> list[float]:
        return [float(np.mean(call.token_seconds)) for call in self.calls if call.token_seconds]


def profile(
    path: str | Path,
    prompt: Messages,
    images: Iterable[ImageSource] = (),
    *,
    new_tokens: int = 128,
    warmup: int = 2,
    iterations: int = 10,
    backend: str = "auto",
    threads: int | None = None,
    max_context: int | None = None,
    power: bool = False,
    operators: bool = False,
    limits: bool = False,
    progress: Callable[[int], None] = lambda calls: None,
    notice: Callable[[str], None] = warnings.warn,
) -> Profile:
    """Ask the bundle in `path` the same thing 1 + `warmup` + `iterations` times, greedily, for `new_tokens` tokens.

    The first call is the cold one, whose memory is watched; the last `iterations` are counted. The model's end is
    ignored, so that all answers have one length (the context can still cut them short). A model that takes images and
    is given none gets `synthetic_image()`. `power` measures what the counted calls draw, and `operators` where another
    call's time goes, on the processor or TensorRT. `limits`: compare the stages with what the processor can do, which
    takes some seconds the first time. `progress(1)` is called after each call; `notice` as in `VLM.load`.

    Raises what `VLM.load` and `VLM.stream` raise, ImageError for an image that cannot be read, before the load, and
    BackendError when operators are asked of a backend that does not tell them.
    """
    given = list(images)
    sizes = [load_image(image).size for image in given]
    machine, before, watch = read_environment(), peak_rss(), can_watch()
    loading = WatchedTrace() if watch else Trace()
    options: dict[str, Any] = {"backend": backend, "threads": threads, "max_context": max_context, "notice": notice}
    with VLM.load(path, trace=loading, **options) as vlm:
        if not given and vlm.spec.image is not None:
            given, sizes = [synthetic_image()], [_SIZE]
        if operators and vlm.backend.target not in ("cpu", *TENSORRT):
            what = f"operators are told by the processor and TensorRT, not by {vlm.backend.name}"
            raise BackendError(what, "--backend cpu")
        titles = ["cold", *(f"warm-up {n + 1}" for n in range(warmup)), *(f"call {n + 1}" for n in range(iterations))]
        traces: list[Trace] = []
        calls: list[Metrics] = []
        opened = gpu_memory(vlm.backend)
        meter = PowerMeter()
        with contextlib.ExitStack() as counted:
            for n, title in enumerate(titles):
                if power and n == 1 + warmup:
                    counted.enter_context(meter)
                traces.append(WatchedTrace(vlm.backend) if watch and title == "cold" else Trace())
                result = vlm.generate(prompt, given, max_new_tokens=new_tokens, ignore_eos=True, trace=traces[-1])
                calls.append(result.metrics)
                progress(1)
        tokens = sum(call.new_tokens for call in calls[1 + warmup :])
        reading = meter.reading(tokens, len(given) * iterations) if power else None
        peaks = {n: peak for t in (loading, traces[0]) if isinstance(t, WatchedTrace) for n, peak in t.peaks.items()}
        peaks = {name: peaks[name] for name in (*LOAD_STAGES, *STAGES) if name in peaks}
        on_gpu = {} if opened is None else {"open": opened}
        if isinstance(traces[0], WatchedTrace):
            on_gpu |= {name: traces[0].gpu[name] for name in STAGES if name in traces[0].gpu}
        cache = vlm.decoder.cache
        assert cache is not None
        target, cold = vlm.backend.target, calls[0]
        memory = measured(
            vlm.bundle,
            target,
            cold.prompt_tokens,
            cache.nbytes,
            cache.capacity,
            peaks or None,
            before,
            gpu_memory(vlm.backend),
            on_gpu or None,
        )
        found = Profile(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            bundle=_bundle_info(vlm, target),
            versions=versions(vlm.backend.name),
            machine=machine,
            setting=Setting(
                backend=vlm.backend.name,
                threads=getattr(vlm.backend, "threads", None),
                max_context=max_context,
                images=_words(given),
                image_sizes=tuple(sizes),
                prompt_tokens=cold.prompt_tokens,
                image_tokens=cold.image_tokens,
                tiles=cold.tiles,
                new_tokens=cold.new_tokens,
                warmup=warmup,
                iterations=iterations,
            ),
            load=sum(span.seconds for span in loading.spans),
            load_stages={span.name: span.seconds for span in loading.spans},
            cold=Call.of(cold),
            calls=tuple(Call.of(call) for call in calls[1 + warmup :]),
            memory=memory,
            traces=tuple(zip(["load", *titles], [loading, *traces], strict=True)),
            power=reading,
        )
    if limits and target == "cpu":
        found = _with_roofline(found)
    if operators:
        few = min(new_tokens, _OPERATOR_TOKENS)
        told = profile_operators(path, prompt, given, new_tokens=few, threads=threads, target=target)
        found = replace(found, operators=told)
    return found


def _with_roofline(found: Profile) -> Profile:
    """The profile with the processor's limits, and what its stages reach of them."""
    bundle, s = Bundle.load(found.bundle.path), found.setting
    limits = machine_limits(s.threads)
    seconds = {name: figure.median for name, figure in found.stages.items()}
    if "decode" in seconds:  # of one token
        seconds["decode"] /= s.new_tokens - 1
    work = Workload(s.prompt_tokens, s.image_tokens, s.new_tokens, s.tiles, len(s.image_sizes))
    variants = {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}
    return replace(found, limits=limits, roofline=roofline(bundle, variants, seconds, work, limits))


def synthetic_image(width: int = _SIZE[0], height: int = _SIZE[1]) -> Image.Image:
    """An image of smooth colours, always the same at a size in px."""
    coarse = np.random.default_rng(_SEED).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.info[TITLE] = f"synthetic, {width} x {height} px, seed {_SEED}"
    return image


def _words(images: Sequence[ImageSource]) -> str:
    """What the images are."""
    return ", ".join(_title(image) for image in images) or "none"


def _title(image: ImageSource) -> str:
    if isinstance(image, Image.Image) and TITLE in image.info:
        return str(image.info[TITLE])
    return str(image) if isinstance(image, (str, Path)) else type(image).__name__


def _bundle_info(vlm: VLM, target: str) -> BundleInfo:
    manifest = vlm.bundle.manifest
    digest = hashlib.sha256((vlm.bundle.path / MANIFEST).read_bytes()).hexdigest()
    recipe = str(manifest.recipe.get("name", ""))
    return BundleInfo(str(vlm.bundle.path), vlm.bundle.nbytes, recipe, target, digest)


def _plain(value: Any) -> Any:
    """The value with lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
