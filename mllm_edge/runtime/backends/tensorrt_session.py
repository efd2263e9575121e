"""One engine at work: what is bound becomes a run, and a run like the one before goes straight to the GPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import HIDDEN
from mllm_edge.runtime.backends.cuda import Cuda, Memory
from mllm_edge.runtime.backends.cuda_arrays import CudaArray, taken
from mllm_edge.runtime.backends.tensorrt_layers import Runs
from mllm_edge.runtime.backends.tensorrt_opened import OpenedEngine
from mllm_edge.runtime.backends.tensorrt_plans import Fit, Plan, Planner, is_zero
from mllm_edge.runtime.backends.tensorrt_prefix import Prefix
from mllm_edge.runtime.backends.tensorrt_sizes import Rounding, Sizes, bounds
from mllm_edge.runtime.backends.tensorrt_steps import Context, Workspace
from mllm_edge.spec import Variant, is_state

__all__ = ["EngineSession"]


class EngineSession:
    """Arrays are copied to the device at each run; buffers and arrays in CUDA memory are used where they lie. What
    others write to their own memory between two runs without binding it anew, they must have waited for.

    Contexts, one for each profile, share the memory `workspace`: one runs at a time. `runs` gets the layers' times.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: OpenedEngine,
        variant: Variant,
        limits: Mapping[str, int],
        graphs: bool,
        workspace: Workspace,
        runs: Runs | None,
    ):
        engine.check(variant)
        self.limits = {**limits, "top_logits": int(engine.top_logits[0].shape[-1])} if engine.top_logits else limits
        self._cuda, self._file, self._engine = cuda, variant.file, engine
        self._inputs = {t.name: t for t in variant.inputs}
        profiles, self._decoder = engine.profiles, variant.kv_mode is not None
        self._bounds = [bounds(self._inputs, profile) for profile in profiles]
        # Only decode steps come again and again.
        recorded = [graphs and self._decoder and i == len(profiles) - 1 for i in range(len(profiles))]
        self._contexts = [Context(cuda, engine, i, workspace, recorded[i], runs) for i in range(len(profiles))]
        widens = self._decoder and not any(is_state(name, "recurrent") for name in self._inputs)
        capacity, doubling = limits.get("capacity", 0), engine.contexts.compiles
        self._rounding = Rounding(variant.kv_mode, capacity, doubling, widens)
        self._sizes, self._prefix = Sizes(variant.file, self._inputs, profiles[0]), Prefix(variant)
        outputs = (*variant.outputs, *engine.top_logits)
        self._planner = Planner(cuda, variant, outputs, self._bounds, self._contexts, self._prefix)
        self._values: dict[str, Any] = {}
        self._targets: dict[str, Any] = {}
        self._fixed: dict[str, np.ndarray] = {}  # read-only, and not on the device yet
        self._plan: Plan | None = None
        self._key: tuple[object, ...] = ()
        self._places: tuple[object, ...] = ()
        self._moved = True  # something lies elsewhere than in the last plan
        self._ran = -1

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        if self._prefix.tokens is not None and self._prefix.concerns(inputs, outputs):
            self._prefix.settle(self._values, self._targets)
            for name in self._prefix.pairs:
                self._sizes.tell(name, self._values[name].shape)
        for name, value in inputs.items():
            known = self._values.get(name)
            if not (type(value) is type(known) is np.ndarray and _alike(value, known)):
                value = self._checked(name, value, known)
            self._values[name] = value
            if value.shape != self._sizes.shapes.get(name):
                self._sizes.tell(name, value.shape)
        if outputs:
            self._moved = True
            self._targets = {n: t for n, t in (self._targets | dict(outputs)).items() if t is not None}

    def slide(self, past: int, end: int) -> bool:
        if self._moved or not self._prefix.slide(past, end):
            return False
        if self._prefix.pairs:
            self._sizes.suppose("past", past)
        return True

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.bind(feeds, {})
        plan = self._planned()
        if self._fixed:
            self._upload(plan)
        if plan.slots:
            staging, past = self._planner.staging[plan.fit.index], plan.fit.sizes.get("past")
            staging.begin()
            for name, slot in plan.slots.items():
                _write(name, self._values[name], slot, past)
            staging.send(0, plan.sent)
        if plan.before:
            self._cuda.copy(*plan.before)
        self._contexts[plan.fit.index].run(plan.step)
        self._ran = self._cuda.waits
        return self._results(plan)

    def keep(self) -> None:
        """Write what TensorRT has compiled while it ran beside the engine."""
        self._engine.contexts.keep()

    def _checked(self, name: str, value: Any, known: Any) -> Any:
        """A buffer, or a C-contiguous array of the graph's type."""
        if name not in self._inputs:
            raise BackendError(f"{self._file} has no input {name}")
        if isinstance(known, CudaArray) and not isinstance(known.owner, Memory) and self._ran == self._cuda.waits:
            self._cuda.wait()  # its owner may use it for something else when we let go of it
        value = taken(self._cuda, name, value)
        wanted = np.dtype(self._inputs[name].dtype)
        if value.dtype != wanted:
            raise BackendError(f"{self._file}: input {name} is {value.dtype}, not {wanted}")
        if value is not known:
            self._moved = True
            self._fixed.pop(name, None)
            if isinstance(value, np.ndarray) and not value.flags.writeable:
                self._fixed[name] = value
        return value

    def _planned(self) -> Plan:
        """What to do with what is bound: as in the run before, or some other one, or new."""
        prefix = self._prefix
        if self._moved:
            missing = [name for name in self._inputs if name not in self._values]
            if missing:
                raise BackendError(f"{self._file}: input {missing[0]} was not given")
            prefix.look(self._values, self._targets)
            self._places = self._places_now()
        sizes = self._sizes.read()
        if prefix.tokens not in (None, sizes.get("sequence")):
            raise BackendError(f"{self._file}: {sizes['sequence']} new tokens, the cache has advanced {prefix.tokens}")
        fit = self._fit(sizes)
        past = prefix.past if prefix.follows and not fit.rounded else None
        key = (fit.index, fit.rounded, past, sizes.get("sequence"), sizes.get("rows"), *fit.sizes.values())
        if self._plan is None or self._moved or key != self._key:
            self._plan = None  # it may use what the next one replaces
            self._plan = self._planner.plan((key, self._places), fit, self._values, self._targets)
            self._key, self._moved = key, False
        return self._plan

    def _places_now(self) -> tuple[object, ...]:
        """Where all that is bound lies, as far as a plan depends on it."""
        found: list[object] = [self._prefix.follows]
        for name in self._inputs:
            value = self._values[name]
            device = isinstance(value, CudaArray)
            found.append(value.address if device else "zeros" if is_zero(value) else value.flags.writeable)
        for name, target in self._targets.items():
            if name not in self._prefix.outputs:
                found += [name, target.shape, target.address if isinstance(target, CudaArray) else None]
        return tuple(found)

    def _fit(self, sizes: Mapping[str, int]) -> Fit:
        """The last profile that takes these sizes, rounded or not: the narrower one, made for decoding."""
        last = len(self._bounds) - 1
        if self._decoder:
            most = self._bounds[last].get("past", (0, 0))[1]
            fitted = self._rounding.decode(sizes, min(self._prefix.room, most) if self._prefix.follows else 0)
            if _inside(fitted, self._bounds[last]):
                return Fit(last, True, fitted, sizes)
        fitted = self._rounding.prefill(sizes)
        for index in range(last, -1, -1):
            if _inside(fitted, self._bounds[index]):
                return Fit(index, False, fitted, sizes)
        raise self._sizes.too_large(fitted)

    def _upload(self, plan: Plan) -> None:
        """What is read-only goes to the device once."""
        for name, array in self._fixed.items():
            if name not in plan.slots:
                self._planner.upload(name, array)
        self._fixed = {}

    def _results(self, plan: Plan) -> dict[str, np.ndarray]:
        """Outputs on the host: into bound arrays, or as new ones; what the graph does not have only when bound."""
        past = self._prefix.past
        if plan.behind:
            self._cuda.copy(*plan.behind)
        if plan.rows:
            self._cuda.copy(*[(begin + past * row, source, nbytes) for begin, row, source, nbytes in plan.rows])
        for begin, end in plan.fetches:
            self._planner.landing[plan.fit.index].fetch(begin, end)
        if plan.fetches:  # else the next segment can be enqueued at once
            self._cuda.wait()
        found = {}
        for name, landed in plan.found.items():
            if name in self._targets:
                np.copyto(self._targets[name], landed)
            else:
                found[name] = landed.copy()
        return found


def _alike(value: np.ndarray, known: np.ndarray) -> bool:
    """Whether one array takes the other's place, but for its shape."""
    flags = value.flags
    return value.dtype == known.dtype and flags.c_contiguous and flags.writeable and known.flags.writeable


def _inside(sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int]]) -> bool:
    return all(low <= sizes[symbol] <= high for symbol, (low, high) in limits.items())


def _write(name: str, value: np.ndarray, slot: np.ndarray, past: int | None) -> None:
    """An input into its slot, which may be larger: what is too much hides, or is zero. `past`: rows of the past that a
    bias spans, more than those of `value`; None: all at once."""
    if value.shape == slot.shape:
        np.copyto(slot, value)
    elif not name.startswith("attention_bias"):
        slot.fill(0)
        slot[tuple(map(slice, value.shape))] = value
    else:
        slot.fill(HIDDEN)
        tokens, length = value.shape[-2:]
        old = length if past is None else length - tokens
        slot[..., :tokens, :old] = value[..., :old]
        if past is not None:
            slot[..., :tokens, past : past + tokens] = value[..., old:]
