"""Repeat one call in several runs and summarize where its time and memory go: the figures are those that every call
reports."""

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.bundle import MANIFEST, Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import TENSORRT
from mllm_edge.runtime.decode.speculation import check_speculation
from mllm_edge.runtime.machine.cpu import peak_rss
from mllm_edge.runtime.machine.power import PowerMeter, PowerReading
from mllm_edge.runtime.machine.threads import Spin, Threads
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.planning.shapes import layouts_of
from mllm_edge.runtime.profiling.environment import Environment, read_environment, versions
from mllm_edge.runtime.profiling.first_use import first_use
from mllm_edge.runtime.profiling.memory import MemoryUse, WatchedTrace, can_watch, gpu_memory, measured
from mllm_edge.runtime.profiling.operators import Operator, profile_operators
from mllm_edge.runtime.profiling.roofline import MachineLimits, StageRoof, Workload, machine_limits, roofline
from mllm_edge.runtime.profiling.runs import Asker, Call, Run, shares
from mllm_edge.runtime.profiling.statistics import Distribution, Jitter, Noise, jitter, noise
from mllm_edge.runtime.prompt.image import ImageSource, load_image
from mllm_edge.runtime.prompt.processor import Messages
from mllm_edge.runtime.prompt.token_budget import TokenBudget, budget_of
from mllm_edge.runtime.trace import LOAD_STAGES, Metrics, Trace, in_order
from mllm_edge.runtime.vlm import VLM

__all__ = ["TITLE", "VERSION", "BundleInfo", "Profile", "Setting", "Speculation", "profile", "synthetic_image"]

VERSION = 2  # of the JSON form, see profile.schema.json
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
    """What was asked, and how. `images` in words; `image_sizes` (width, height) in px; `warmup`: the most calls that
    each run could take to settle; `iterations`: counted calls of all runs together; `speculation` and the bounds on
    image tokens: as in `VLM.stream`."""

    backend: str
    threads: int | None
    max_context: int | None
    images: str
    image_sizes: tuple[tuple[int, int], ...]
    prompt_tokens: int
    image_tokens: int
    tiles: int
    new_tokens: int
    runs: int
    warmup: int
    iterations: int
    speculation: int = 0
    max_image_tokens: int | None = None
    min_image_tokens: int | None = None

    @property
    def budget(self) -> TokenBudget:
        """The bounds on image tokens."""
        return TokenBudget(self.max_image_tokens, self.min_image_tokens)


@dataclass(frozen=True)
class Speculation:
    """Of all counted calls: the decoder's steps after the prompt, tokens that were guessed, and those of them that came
    true and took no step of their own."""

    decode_steps: int
    guessed: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that came true, 0 to 1; None where there was none."""
        return self.accepted / self.guessed if self.guessed else None

    @property
    def tokens_per_step(self) -> float | None:
        """1 without guesses that came true; None for answers of one token."""
        return 1 + self.accepted / self.decode_steps if self.decode_steps else None

    @property
    def width(self) -> float:
        """Tokens that the decoder runs in a step, on average."""
        return 1 + self.guessed / self.decode_steps if self.decode_steps else 1.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "acceptance": self.acceptance, "tokens_per_step": self.tokens_per_step}


@dataclass(frozen=True)
class Profile:
    """Measurements of one bundle on this machine; times in seconds, sizes in bytes.

    Every figure is of the counted calls of all `runs`; the cold calls and those for warming up are in none. `stages`
    are those that ran, in order: each is its whole time in a call, and together they are the call, of which they make
    `coverage`. `tpot` is over all intervals between tokens (with speculation, of which several come together, over the
    calls' means), None when every answer had one token. `memory` was measured
    in the first run. `point`: what is special about it in a sweep. `traces` have the spans of every load and call, with
    their titles. `power` is that of the counted calls; `operators` those of another call; `roofline` what the stages
    reach of the machine's `limits`. All are None where they were not asked for, `limits` and `roofline` also on other
    backends than cpu.
    """

    created: str
    bundle: BundleInfo
    versions: Mapping[str, str]
    machine: Environment
    setting: Setting
    runs: tuple[Run, ...]
    memory: MemoryUse
    traces: tuple[tuple[str, Trace], ...] = ()
    point: Mapping[str, str | int] = field(default_factory=dict)
    power: PowerReading | None = None
    operators: tuple[Operator, ...] | None = None
    limits: MachineLimits | None = None
    roofline: tuple[StageRoof, ...] | None = None

    @property
    def calls(self) -> tuple[Call, ...]:
        """Those that are counted."""
        return tuple(call for run in self.runs for call in run.calls)

    @property
    def stages(self) -> dict[str, Distribution]:
        """Of the counted calls."""
        ran = in_order(name for call in self.calls for name in call.stages)
        return {name: self._distribution(partial(_stage, name)) for name in ran}

    @property
    def ttft(self) -> Distribution:
        """From the call to the first token."""
        return self._distribution(lambda call: [call.ttft])

    @property
    def total(self) -> Distribution:
        """Whole calls."""
        return self._distribution(lambda call: [call.total])

    @property
    def tpot(self) -> Distribution | None:
        """Intervals between tokens; with speculation, their mean in each call."""
        if not self.calls[0].token_seconds:
            return None
        return self._distribution(_tpot if self.setting.speculation else lambda call: call.token_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Decode rate after the first token, the median over calls; 0 for answers of one token."""
        means = self._by_run(_tpot)
        return 1.0 / float(np.median(np.concatenate(means))) if self.tpot else 0.0

    @property
    def coverage(self) -> float:
        """The stages' share of the whole call, the median over calls."""
        return float(np.median([sum(call.stages.values()) / call.total for call in self.calls]))

    @property
    def jitter(self) -> Jitter | None:
        """Between tokens; None for answers of fewer than three, and with speculation, where tokens come together."""
        if self.setting.speculation:
            return None
        return jitter([call.token_seconds for call in self.calls])

    @property
    def speculation(self) -> Speculation:
        """Of the counted calls."""
        counts = ((call.decode_steps, call.guessed, call.accepted) for call in self.calls)
        return Speculation(*map(sum, zip(*counts, strict=True)))

    @property
    def noise(self) -> Noise:
        """How far the runs differ."""
        return noise(self._by_run(lambda call: [call.total]), self._by_run(_tpot) if self.tpot else ())

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, as profile.schema.json says."""
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
            "runs": [asdict(run) for run in self.runs],
            "stages": stages,
            "coverage": self.coverage,
            "ttft": asdict(self.ttft),
            "total": asdict(self.total),
            "tpot": asdict(self.tpot) if self.tpot else None,
            "tokens_per_second": self.tokens_per_second,
            "jitter": asdict(self.jitter) if self.jitter else None,
            "noise": {**asdict(self.noise), "noisy": self.noise.noisy},
            "memory": memory,
            **({"speculation": self.speculation.as_dict()} if self.setting.speculation else {}),
            **({} if self.limits is None else {"limits": self.limits.as_dict()}),
            **({} if self.roofline is None else {"roofline": [stage.as_dict() for stage in self.roofline]}),
            **({} if self.operators is None else {"operators": [asdict(o) for o in self.operators]}),
            **({} if self.power is None else {"power": self.power.as_dict()}),
        }
        plain: dict[str, Any] = _plain(data)
        return plain

    def _distribution(self, samples: Callable[[Call], Sequence[float]]) -> Distribution:
        return Distribution.of(self._by_run(samples))

    def _by_run(self, samples: Callable[[Call], Sequence[float]]) -> list[list[float]]:
        """What `samples` tells of the calls of each run."""
        return [[sample for call in run.calls for sample in samples(call)] for run in self.runs]


def profile(
    path: str | Path,
    prompt: Messages,
    images: Iterable[ImageSource] = (),
    *,
    new_tokens: int = 128,
    runs: int = 3,
    warmup: int = 10,
    iterations: int = 10,
    backend: str = "auto",
    threads: int | None = None,
    spin: Spin = "auto",
    affinity: str | Iterable[int] | None = None,
    max_context: int | None = None,
    fast_jpeg: bool = False,
    max_image_tokens: int | None = None,
    min_image_tokens: int | None = None,
    speculation: int = 0,
    power: bool = False,
    operators: bool = False,
    limits: bool = False,
    progress: Callable[[int], None] = lambda calls: None,
    notice: Callable[[str], None] = warnings.warn,
) -> Profile:
    """Ask the bundle in `path` the same thing again and again, greedily, for `new_tokens` tokens.

    The bundle is loaded `runs` times, for two loads differ by more than the calls after one. After each come a cold
    call (the first one's memory is watched), up to `warmup` calls until they settle, and this run's share of the
    `iterations` that are counted; a run has one at least. The model's end is ignored, so that all answers have one
    length (the context can still cut them short). A model that takes images and is given none gets `synthetic_image()`.
    `threads`, `spin`, `affinity`, `max_context` and the bounds on image tokens as in `VLM.load`, `speculation` as in
    `VLM.stream`. `power`
    measures what the counted calls draw, and `operators` where another call's time goes, on the CPU or
    TensorRT. `limits`: compare the stages with what the CPU can do, which takes some seconds the first time.
    `progress(1)` is called after each call; `notice` as in `VLM.load`.

    Raises what `VLM.load` and `VLM.stream` raise, ImageError for an image that cannot be read, before the load,
    OptionError for a number of the wrong type or out of range, and BackendError when operators are asked
    of a backend that tells none.
    """
    for name, value in (("new_tokens", new_tokens), ("runs", runs), ("iterations", iterations)):
        whole(name, value, 1)
    whole("warmup", warmup, 0)
    budget = budget_of(max_image_tokens, min_image_tokens)
    check_speculation(speculation)
    given = list(images)
    sizes = [load_image(image).size for image in given]
    machine, before, watch = read_environment(), peak_rss(), can_watch()
    new = "onnxruntime" not in sys.modules
    meter = PowerMeter() if power else None
    places = None if affinity is None else Threads.of(None, spin, affinity).affinity
    options: dict[str, Any] = {"backend": backend, "threads": threads, "max_context": max_context, "notice": notice}
    options |= {"spin": spin, "affinity": places, "fast_jpeg": fast_jpeg}
    options |= {"max_image_tokens": budget.most, "min_image_tokens": budget.least}
    found: Profile | None = None
    for number, share in enumerate(shares(iterations, runs), 1):
        watched = watch and found is None
        loading = WatchedTrace() if watched else Trace()
        with VLM.load(path, trace=loading, **options) as vlm:
            if operators and vlm.backend.target not in ("cpu", *TENSORRT):
                what = f"operators are told by the CPU and TensorRT, not by {vlm.backend.name}"
                raise BackendError(what, "--backend cpu")
            if not given and vlm.spec.image is not None:
                given, sizes = [synthetic_image()], [_SIZE]
            if meter is not None and found is None:
                meter.watch_idle()
            asker = Asker(vlm, prompt, given, new_tokens, speculation, progress)
            opened = gpu_memory(vlm.backend)
            first = WatchedTrace(vlm.backend) if watched else Trace()  # a call begins with its trace
            cold = asker.ask("cold", first)
            run = asker.run(loading, cold, warmup, share, meter)
            if found is None:
                found = Profile(
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    bundle=_bundle_info(vlm, vlm.backend.target),
                    versions=versions(vlm.backend.name),
                    machine=machine,
                    setting=replace(
                        _setting(vlm, cold, given, sizes, max_context, (runs, warmup, iterations, speculation)),
                        max_image_tokens=budget.most,
                        min_image_tokens=budget.least,
                    ),
                    runs=(),
                    memory=_memory(vlm, cold, sizes, budget, (loading, first), opened, before, new),
                )
            traces = [(f"run {number}, {title}", trace) for title, trace in [("load", loading), *asker.traces]]
            found = replace(found, runs=(*found.runs, run), traces=(*found.traces, *traces))
    assert found is not None
    if meter is not None:
        tokens = iterations * found.setting.new_tokens
        found = replace(found, power=meter.reading(tokens, iterations * len(given)))
    if limits and found.bundle.target == "cpu":
        found = _with_roofline(found)
    if operators:
        few = min(new_tokens, _OPERATOR_TOKENS)
        target = found.bundle.target
        told = profile_operators(
            path, prompt, given, new_tokens=few, threads=threads, target=target, speculation=speculation
        )
        found = replace(found, operators=told)
    return found


def _setting(
    vlm: VLM,
    call: Metrics,
    images: Sequence[ImageSource],
    sizes: Sequence[tuple[int, int]],
    max_context: int | None,
    counts: tuple[int, int, int, int],
) -> Setting:
    runs, warmup, iterations, speculation = counts
    return Setting(
        backend=vlm.backend.name,
        threads=getattr(vlm.backend, "threads", None),
        max_context=max_context,
        images=_words(images),
        image_sizes=tuple(sizes),
        prompt_tokens=call.prompt_tokens,
        image_tokens=call.image_tokens,
        tiles=call.tiles,
        new_tokens=call.new_tokens,
        runs=runs,
        warmup=warmup,
        iterations=iterations,
        speculation=speculation,
    )


def _memory(
    vlm: VLM,
    cold: Metrics,
    sizes: Sequence[tuple[int, int]],
    budget: TokenBudget,
    traces: Sequence[Trace],
    opened: int | None,
    before: int,
    new: bool,
) -> MemoryUse:
    """What the load and the calls so far took; `opened`: device memory in use behind the load; `new`: this process had
    not imported the engine before."""
    cache = vlm.decoder.cache
    assert cache is not None
    watched = [trace for trace in traces if isinstance(trace, WatchedTrace)]
    peaks = {name: peak for trace in watched for name, peak in trace.peaks.items()}
    told = {name: used for trace in watched for name, used in trace.gpu.items()}
    on_gpu = ({} if opened is None else {"open": opened}) | {name: told[name] for name in in_order(told)}
    known = {name: peaks[name] for name in (*LOAD_STAGES, *in_order(peaks)) if name in peaks}
    target, gpu = vlm.backend.target, gpu_memory(vlm.backend)
    used = first_use() if new and target == "cpu" else 0
    base = known.get("backend", before) + (used or 0)
    layouts = layouts_of(vlm.spec.image, sizes, budget)
    shown = list(zip(layouts, sizes, strict=bool(layouts)))
    found = measured(vlm.bundle, target, cold, shown, cache.capacity, known or None, base, gpu, on_gpu or None)
    note = "the base lacks what the first use of the libraries takes: no other process could measure it"
    return replace(found, notes=(*found.notes, note)) if used is None else found


def _with_roofline(found: Profile) -> Profile:
    """The profile with the CPU's limits, and what its stages reach of them."""
    bundle, s = Bundle.load(found.bundle.path), found.setting
    limits = machine_limits(s.threads)
    seconds = {name: figure.median for name, figure in found.stages.items()}
    steps = found.speculation
    if "decode" in seconds:  # of one step
        seconds["decode"] /= steps.decode_steps / len(found.calls)
    images = tuple(layouts_of(bundle.manifest.model.image, s.image_sizes, s.budget))
    work = Workload(s.prompt_tokens, s.new_tokens, images, steps.width)
    variants = {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}
    return replace(found, limits=limits, roofline=roofline(bundle, variants, seconds, work, limits))


def synthetic_image(width: int = _SIZE[0], height: int = _SIZE[1]) -> Image.Image:
    """An image of smooth colours, always the same at a size in px."""
    width, height = whole("width", width, 1), whole("height", height, 1)
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


def _stage(name: str, call: Call) -> list[float]:
    return [call.stages.get(name, 0.0)]


def _tpot(call: Call) -> list[float]:
    """The mean interval between tokens, where there is one."""
    return [float(np.mean(call.token_seconds))] if call.token_seconds else []


def _plain(value: Any) -> Any:
    """The value with lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
