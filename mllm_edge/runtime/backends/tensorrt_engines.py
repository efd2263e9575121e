"""Engines of a bundle: which shapes they take, under which names they lie in `engines/`, when one is good.

An engine's file says which component, target, GPU and TensorRT it is for, and the hash of the graph and its weights; a
JSON file beside it holds its limits and hashes (`engine_facts.py`). What does not match is never opened. A decoder has
one engine, or one for each of its segments.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, WriteError
from mllm_edge.install import install_hint
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.engine_facts import FOLDER, facts_file, known_limits, write_engine
from mllm_edge.runtime.backends.installed import MINIMUM
from mllm_edge.runtime.backends.tensorrt_build import Module, Options, Range, Sizes, build, modules
from mllm_edge.runtime.backends.tensorrt_segments import Segment, divisions, whole
from mllm_edge.runtime.limits import MOST_ROWS, PREFILL_CHUNK
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.spec import SymbolRange, Variant, is_state

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
    "find_engines",
    "make_engine",
    "make_engines",
    "plan_segments",
    "usable",
]

# Caches have a multiple of so many places: every sequence of a batch begins where TensorRT takes an address.
_PLACES = 64
# A longest sequence that no one asked for: longer ones cost memory from the start.
_USUAL_SEQ = 4096
# Tokens in one run of a decode profile: those that check guesses. One alone would make TensorRT keep the weights twice.
_DECODE = MOST_ROWS
# Rows of engines whose facts do not tell.
_UNTOLD_ROWS = 8
# Host memory for a build, measured with TensorRT for RTX: 3 times the weights, and what the builder itself takes.
_WEIGHTS_TIMES, _BUILDER = 3, 500 << 20


@dataclass(frozen=True)
class Limits:
    """The largest shapes an engine takes. `max_seq`: tokens of prompt and answer together; `max_images`: images or
    tiles in one run of the vision encoder; `max_batch`: sequences at once; `max_rows`: tokens of a run whose logits are
    wanted."""

    max_seq: int
    max_images: int = 4
    max_batch: int = 1
    max_rows: int = MOST_ROWS

    def covers(self, other: "Limits") -> bool:
        """Whether everything that `other` allows fits."""
        return all(mine >= its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True))

    def sizes(self, variant: Variant) -> dict[str, int]:
        """Symbol → the largest size that a caller may use. A decoder's caches have a `capacity`, its graph's or not."""
        found = {symbol: sizes[2] for symbol, sizes in self.ranges(variant).items()}
        return found if variant.kv_mode is None else found | {"capacity": self.max_seq}

    def ranges(self, variant: Variant, decode: bool = False) -> dict[str, Sizes]:
        """Symbol → its least, usual and largest size, in a decoder's prefill or decode steps."""
        new, ranges = min(_DECODE if decode else PREFILL_CHUNK, self.max_seq), variant.ranges
        # A long run begins where it ends within the context: memory for scores is that of the longest one's.
        past = self.max_seq if decode else min(self.max_seq, max(_PLACES, self.max_seq - new))
        bounds = asdict(self) | {"max_past": past, "max_new": new, "max_prompt": new if decode else self.max_seq}
        found = {symbol: _sizes(r, bounds, decode) for symbol, r in ranges.items() if not r.sum_of}
        sums = {symbol: [found[part] for part in r.sum_of] for symbol, r in ranges.items() if r.sum_of}
        for symbol, parts in sums.items():
            least, usual, most = (sum(sizes) for sizes in zip(*parts, strict=True))
            found[symbol] = least, usual, most
        return found


@dataclass(frozen=True)
class StoredEngine:
    """An engine in its file, what it runs, the seconds it took to build (0 when it was there), and what TensorRT warned
    of then."""

    path: Path
    limits: Limits
    segment: Segment
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


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


def building_memory(segment: Segment) -> int:
    """Bytes of host memory that building the engine takes, roughly."""
    return _WEIGHTS_TIMES * segment.weight_bytes + _BUILDER


def plan_segments(bundle: Bundle, variant: Variant, count: int | None, free: int) -> tuple[Segment, ...]:
    """What to build engines of: `count` segments of a decoder, one of all else. None: the fewest that `free` bytes of
    memory are enough for (0: unknown), or that take least where they never are.

    Raises BackendError when the decoder cannot be cut into as many.
    """
    if count is not None and variant.kv_mode is not None:
        found = list(islice(divisions(bundle, variant), count))
        if len(found) < count:
            what = f"{variant.file} can be cut into {len(found)} segments at most, not {count}"
            raise BackendError(what, f"--segments {len(found)} or fewer")
        return found[-1]
    best: tuple[Segment, ...] = (whole(bundle, variant),)
    for segments in divisions(bundle, variant):
        if _most(segments) < _most(best):
            best = segments
        if not free or _most(best) <= free:
            break
    return best


def _most(segments: Sequence[Segment]) -> int:
    return max(building_memory(segment) for segment in segments)


def build_workspace(cuda: Cuda) -> int:
    """Bytes that kernels may work in: half of what is free, for weights and caches want the rest."""
    machine = read_machine()
    # Where the processor's memory is the GPU's, CUDA leaves out what the system holds of files and would give back.
    return max(cuda.free_memory(), machine.memory_free if machine.unified else 0) // 2


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
                raise BackendError(what, f"build on the device itself, or {install_hint('rtx')}")
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


def find_engines(bundle: Bundle, variant: Variant, module: Module, device: str) -> list[StoredEngine]:
    """The engine for a GPU ("sm86"), or those of all segments in their order; empty when there are none, or one of them
    is missing, damaged or another's."""
    for count in _counts(bundle, variant, module, device):
        for segments in islice(divisions(bundle, variant), count - 1, count):
            found = [find_engine(bundle, variant, module, device, segment) for segment in segments]
            good = [stored for stored in found if stored is not None]
            if len(good) == count and all(stored.limits == good[0].limits for stored in good):
                return good
    return []


def find_engine(
    bundle: Bundle, variant: Variant, module: Module, device: str, segment: Segment | None = None
) -> StoredEngine | None:
    """The engine of a segment, or of the whole, for a GPU ("sm86"), None when there is none or it is damaged or
    another's."""
    segment = segment or whole(bundle, variant)
    path = _path(bundle, segment, module, device)
    limits = known_limits(path, _identity(bundle, segment, module, device))
    try:
        return None if limits is None else StoredEngine(path, Limits(**{"max_rows": _UNTOLD_ROWS, **limits}), segment)
    except TypeError:  # limits of another version
        return None


def build_inputs(variant: Variant, limits: Limits) -> tuple[list[dict[str, Range]], Options]:
    """Profiles, and what has to be known about caches and logits, to `build` the engine of a variant with."""
    caches = sum(is_state(t.name, "growing") for t in variant.inputs)
    top_logits = variant.kv_mode is not None and any(t.name == "logits" for t in variant.outputs)
    if variant.kv_mode == "in_place":
        options = Options({"capacity": limits.max_seq}, caches, top_logits=top_logits)
    else:
        options = Options(cache_updates=0, top_logits=top_logits)
    return _profiles(variant, limits), options


def make_engines(
    bundle: Bundle,
    segments: Sequence[Segment],
    module: Module,
    device: str,
    limits: Limits,
    workspace: int = 0,
    begin: Callable[[Segment], Callable[[float], None] | None] = lambda segment: None,
    anew: bool = False,
) -> list[StoredEngine]:
    """Build one engine after the other, but (unless `anew`) those that are there with the same limits; engines for the
    same graph and GPU that divide it otherwise are removed in the end.

    `begin(segment)` is told before a build, and returns whom to tell its progress. Raises as `make_engine`, and
    BundleError for damaged weights; engines that are done stay.
    """

    def kept(segment: Segment) -> StoredEngine | None:
        stored = None if anew else find_engine(bundle, segment.variant, module, device, segment)
        return stored if stored is not None and stored.limits == limits else None

    found = [kept(segment) for segment in segments]
    if not all(found):
        _check_files(bundle, segments[0].variant)
    made = [
        stored or make_engine(bundle, segment.variant, module, device, limits, workspace, begin(segment), segment)
        for segment, stored in zip(segments, found, strict=True)
    ]
    _remove_others(bundle, made, module, device)
    return made


def make_engine(
    bundle: Bundle,
    variant: Variant,
    module: Module,
    device: str,
    limits: Limits,
    workspace: int = 0,
    progress: Callable[[float], None] | None = None,
    segment: Segment | None = None,
) -> StoredEngine:
    """Build the engine of a segment, or of the whole, for a GPU and store it in the bundle; an engine that was there is
    replaced at the end.

    Raises BackendError when TensorRT refuses or the bundle cannot be written.
    """
    segment, start = segment or whole(bundle, variant), time.perf_counter()
    path = _path(bundle, segment, module, device)
    with _writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    profiles, sizes = build_inputs(segment.variant, limits)
    timings = None if module.builds_ahead else path.parent / f"timings-{_engine_of(module)}-{device}.cache"
    more = segment.count + 1 if variant.kv_mode is not None else 0
    options = replace(sizes, workspace=workspace, timing_cache=timings, progress=progress)
    options = replace(options, graph=segment.graph, segments=more)
    capabilities = [module.capability(device)] if module.builds_ahead else []
    file = bundle.listed(variant.file)
    with _writing(path.parent):
        engine = build(file.with_stem(f"{file.stem}{segment.suffix}"), profiles, capabilities, module, options)
    with _writing(path.parent):
        write_engine(path, engine.data, _identity(bundle, segment, module, device), asdict(limits))
    return StoredEngine(path, limits, segment, time.perf_counter() - start, engine.warnings)


def _check_files(bundle: Bundle, variant: Variant) -> None:
    """Graph and weights against their checksums: an engine of damaged ones would be taken from then on."""
    for name in bundle.manifest.files:
        if name.startswith(variant.file):
            bundle.check(name)


def _profiles(variant: Variant, limits: Limits) -> list[dict[str, Range]]:
    """Prefill and decode for a decoder, one for all else: the shapes of every input."""
    kinds = (False,) if variant.kv_mode is None else (False, True)
    return [_shapes(variant, limits.ranges(variant, decode)) for decode in kinds]


def _shapes(variant: Variant, ranges: Mapping[str, Sizes]) -> dict[str, Range]:
    unknown = {s for t in variant.inputs for s in t.shape if isinstance(s, str)} - set(ranges)
    if unknown:
        what = f"{variant.file}: no range is known for the dimension {sorted(unknown)[0]!r}"
        raise BackendError(what, "use --backend cpu for this bundle, and please report this")

    def shape(which: int, dims: tuple[int | str, ...]) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else ranges[d][which] for d in dims)

    return {t.name: (shape(0, t.shape), shape(1, t.shape), shape(2, t.shape)) for t in variant.inputs}


def _sizes(symbol: SymbolRange, bounds: Mapping[str, int], decode: bool) -> Sizes:
    """Least, usual and most; a decode step has as few new tokens as there can be."""
    bound = bounds[symbol.limit] * symbol.times if symbol.limit is not None else None
    allowed = [size for size in (symbol.most, bound) if size is not None]
    most = min(allowed)
    least = most if symbol.least is None else min(symbol.least, most)
    own = symbol.limit in ("max_new", "max_prompt")
    usual = least if decode and own else max(least, symbol.usual, int(symbol.share * most))
    return least, min(usual, most), most


def _identity(bundle: Bundle, segment: Segment, module: Module, device: str) -> dict[str, str]:
    """What an engine is of and for."""
    files = bundle.manifest.files
    names = [name for name in (segment.variant.file, f"{segment.variant.file}.data") if name in files]
    graph = hashlib.sha256("".join(files[name].sha256 for name in names).encode()).hexdigest()
    part = {} if segment.graph is None else {"segment": hashlib.sha256(segment.graph).hexdigest()}
    # TensorRT's own engines are for one model of GPU, whatever others have its compute capability.
    gpu = {"gpu": module.gpu} if module.gpu else {}
    return {"graph": graph, "module": module.name, "version": module.version, "device": device} | gpu | part


def _path(bundle: Bundle, segment: Segment, module: Module, device: str) -> Path:
    graph = _identity(bundle, segment, module, device)["graph"][:12]
    name = f"{Path(segment.variant.file).stem}-{graph}-{_engine_of(module)}-{device}{segment.suffix}.engine"
    return bundle.file(f"{FOLDER}/{name}")


def _segment_paths(bundle: Bundle, variant: Variant, module: Module, device: str) -> list[Path]:
    """Engines of segments that lie in the bundle, of any division."""
    path = _path(bundle, whole(bundle, variant), module, device)
    return sorted(path.parent.glob(f"{path.stem}-seg*of*.engine"))


def _counts(bundle: Bundle, variant: Variant, module: Module, device: str) -> list[int]:
    """The numbers of segments of which there may be engines."""
    numbers = [p.stem.rpartition("of")[2] for p in _segment_paths(bundle, variant, module, device)]
    return sorted({1, *(int(number) for number in numbers if number.isdecimal())})


def _remove_others(bundle: Bundle, engines: Sequence[StoredEngine], module: Module, device: str) -> None:
    """Engines with the same facts in another number of segments."""
    variant, kept = engines[0].segment.variant, {stored.path for stored in engines}
    others = {_path(bundle, whole(bundle, variant), module, device), *_segment_paths(bundle, variant, module, device)}
    for path in others - kept:
        with _writing(path.parent):
            for file in (facts_file(path), path, path.with_name(f"{path.name}.cache")):
                file.unlink(missing_ok=True)


def _engine_of(module: Module) -> str:
    """In names of files."""
    gpu = "-".join(re.findall(r"[a-z0-9]+", module.gpu.lower().replace("multiprocessors", "")))
    return "-".join(filter(None, (f"{'rtx' if module.builds_ahead else 'trt'}{module.version}", gpu)))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    fix = "make the bundle's folder writable, free space there, or copy the bundle"
    try:
        yield
    except WriteError as e:
        raise BackendError(f"{folder}: engines cannot be stored here: {e.message}", fix) from e
    except OSError as e:
        raise BackendError(f"{folder}: engines cannot be stored here: {e.strerror}", fix) from e
