"""Plans of runs: where each input and output lies on the device, and what is copied before and behind."""

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda, Memory, Staging
from mllm_edge.runtime.backends.cuda_arrays import ALIGNMENT, CudaArray
from mllm_edge.runtime.backends.tensorrt_prefix import Prefix
from mllm_edge.runtime.backends.tensorrt_sizes import shape_of
from mllm_edge.runtime.backends.tensorrt_steps import Context, Step
from mllm_edge.spec import TensorSpec, Variant

__all__ = ["Fit", "Plan", "Planner", "is_zero"]

# Plans that are remembered: one for each width of a step, and more where buffers take turns.
_MOST_PLANS = 64
# In place of a profile's number: all, and zeros, which nothing writes to.
_SHARED, _ZEROS = -1, -2
# Symbols that a step's rounding may change.
_VARYING = frozenset({"length", "past", "rows", "sequence"})
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """Which profile runs, with which sizes. `exact`: those of what is bound; `rounded`: as a decode step."""

    index: int
    rounded: bool
    sizes: Mapping[str, int]
    exact: Mapping[str, int]


@dataclass
class Plan:
    """How what is bound is run.

    `slots`: where host arrays are written before `sent` bytes go to the device; `before` and `behind`: copies there,
    as target, source and bytes; `rows`: of an append cache's new rows, as the cache's beginning, the bytes of a row,
    source and bytes; `fetches`: ranges that come to the host, where outputs are `found`.
    """

    fit: Fit
    step: Step
    slots: dict[str, np.ndarray] = field(default_factory=dict)
    sent: int = 0
    before: list[tuple[int, int, int]] = field(default_factory=list)
    behind: list[tuple[int, int, int]] = field(default_factory=list)
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    fetches: list[tuple[int, int]] = field(default_factory=list)
    found: dict[str, np.ndarray] = field(default_factory=dict)


class Planner:
    """Makes plans, and has the memory of what is not bound where it lies. `bounds`: of each profile's symbols."""

    def __init__(
        self,
        cuda: Cuda,
        variant: Variant,
        outputs: Sequence[TensorSpec],
        bounds: Sequence[Mapping[str, tuple[int, int]]],
        contexts: Sequence[Context],
        prefix: Prefix,
    ):
        self._cuda, self._variant, self._outputs = cuda, variant, outputs
        self._bounds, self._contexts, self._prefix = bounds, contexts, prefix
        self._tensors = {t.name: t for t in (*variant.inputs, *outputs)}
        # Each profile has its own, so that graphs of decode steps outlast the memory of longer and longer prompts.
        self.staging = [Staging(cuda) for _ in contexts]
        self.landing = [Staging(cuda) for _ in contexts]
        self._rooms: dict[tuple[int, str], Memory] = {}
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def plan(self, key: Hashable, fit: Fit, values: Mapping[str, Any], targets: Mapping[str, Any]) -> Plan:
        """The plan for what is bound, which `key` tells from all others."""
        plan = self._plans.pop(key, None) or self._made(fit, values, targets)
        self._plans[key] = plan
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def upload(self, name: str, array: np.ndarray) -> None:
        """Bring an input that is read-only to its memory; zeros are there."""
        if not is_zero(array):
            self._cuda.upload(self._rooms[_SHARED, name].address, array)

    def _made(self, fit: Fit, values: Mapping[str, Any], targets: Mapping[str, Any]) -> Plan:
        context, shapes = self._contexts[fit.index], {t.name: shape_of(t, fit.sizes) for t in self._variant.inputs}
        plan = Plan(fit, Step(shapes, {}, {}))
        addresses = self._lay_inputs(plan, values)
        expected, host = dict[str, Shape](), dict[str, Shape]()
        for tensor in self._outputs:
            name, target = tensor.name, targets.get(tensor.name)
            full, exact = shape_of(tensor, fit.sizes), shape_of(tensor, fit.exact)
            if -1 in full:  # TensorRT alone knows
                full = exact = context.output_shape(name, shapes)
            expected[name] = full
            if name in self._prefix.outputs:
                addresses[name] = self._new_rows(plan, tensor, full, exact)
            elif target is not None and tuple(target.shape) != exact:
                raise BackendError(f"{self._variant.file}: {name} is {list(exact)}, bound to {list(target.shape)}")
            elif isinstance(target, CudaArray):
                addresses[name] = self._kept(plan, tensor, full, target)
            elif target is None and tensor not in self._variant.outputs:
                addresses[name] = self._room(plan, tensor, full).address
            else:
                host[name] = exact
        addresses |= self._lay_outputs(plan, host, {name: expected[name] for name in host})
        plan.step = context.step(shapes, addresses, expected)
        return plan

    def _lay_inputs(self, plan: Plan, values: Mapping[str, Any]) -> dict[str, int]:
        """Addresses of the inputs; those that come from the host and may change lie side by side."""
        addresses: dict[str, int] = {}
        host: dict[str, Shape] = {}
        for tensor in self._variant.inputs:
            name, shape, value = tensor.name, plan.step.shapes[tensor.name], values[tensor.name]
            if self._prefix.follows and name in self._prefix.pairs:
                known = plan.fit.rounded or plan.fit.exact["past"]  # an empty one is a row of zeros elsewhere
                addresses[name] = self._prefix.place(name)[0] if known else self._room(plan, tensor, shape).address
            elif isinstance(value, CudaArray):
                addresses[name] = value.address
                if not value.aligned or value.room < _nbytes(tensor, shape):
                    addresses[name] = self._room(plan, tensor, shape).address
                    plan.before += [(addresses[name], value.address, value.nbytes)] if value.nbytes else []
            elif is_zero(value):
                addresses[name] = self._room(plan, tensor, shape, _ZEROS).address
            elif value.flags.writeable or _VARYING.intersection(tensor.shape):
                host[name] = shape
            else:
                addresses[name] = self._room(plan, tensor, shape, _SHARED).address
        offsets, plan.sent = self._layout(host)
        if host:
            most = self._grown(plan.fit, host)
            # A decode step has memory for the widest one from the start: what is recorded stays.
            if self.staging[plan.fit.index].reserve(most if plan.fit.rounded else plan.sent, most):
                self._forget(plan.fit.index)
        for name, offset in offsets.items():
            addresses[name] = self.staging[plan.fit.index].address + offset
            plan.slots[name] = self.staging[plan.fit.index].view(offset, host[name], self._tensors[name].dtype)
        return addresses

    def _lay_outputs(self, plan: Plan, exact: Mapping[str, Shape], full: Mapping[str, Shape]) -> dict[str, int]:
        """Likewise the outputs that go to the host; what was rounded up stays on the device."""
        offsets, total = self._layout(full)
        landing = self.landing[plan.fit.index]
        if offsets and landing.reserve(total, self._grown(plan.fit, full)):
            self._forget(plan.fit.index)
        for name, offset in offsets.items():
            plan.found[name] = landing.view(offset, exact[name], self._tensors[name].dtype)
            begin, end = offset, offset + plan.found[name].nbytes
            if plan.fetches and plan.fetches[-1][1] == begin:
                begin = plan.fetches.pop()[0]
            plan.fetches.append((begin, end))
        return {name: landing.address + offset for name, offset in offsets.items()}

    def _kept(self, plan: Plan, tensor: TensorSpec, full: Shape, target: CudaArray) -> int:
        """An output that stays on the device, copied there where it cannot be written in its place: steps of several
        widths share a graph."""
        wide = plan.fit.rounded and plan.fit.sizes.get("sequence", 1) > 1 and _VARYING.intersection(tensor.shape)
        if target.aligned and target.shape == full and not wide:
            return target.address
        room = self._room(plan, tensor, full)
        plan.behind.append((target.address, room.address, target.nbytes))
        return room.address

    def _new_rows(self, plan: Plan, tensor: TensorSpec, full: Shape, exact: Shape) -> int:
        """New rows of an append cache. A decode step leaves them where the last one did, and they are copied."""
        begin, row = self._prefix.place(self._prefix.outputs[tensor.name])
        place = begin + self._prefix.past * row
        if not plan.fit.rounded and place % ALIGNMENT == 0:
            return place
        room = self._room(plan, tensor, full)
        plan.rows.append((begin, row, room.address, _nbytes(tensor, exact)))
        return room.address

    def _room(self, plan: Plan, tensor: TensorSpec, shape: Shape, shared: int | None = None) -> Memory:
        """Device memory of a tensor by itself, of the plan's profile or `shared` by all. It never shrinks, and is zero
        from the start."""
        index, nbytes = plan.fit.index if shared is None else shared, _nbytes(tensor, shape)
        memory = self._rooms.get((index, tensor.name))
        if memory is None or memory.nbytes < nbytes:
            if memory is not None:
                nbytes = nbytes if index < 0 else self._grown(plan.fit, {tensor.name: shape})
                self._forget(index)
            memory = self._rooms[index, tensor.name] = Memory(self._cuda, nbytes)
            self._cuda.clear(memory.address, nbytes)
        return memory

    def _grown(self, fit: Fit, shapes: Mapping[str, Shape]) -> int:
        """Bytes for tensors that have outgrown their memory: for all that a decode step of as many sequences may want;
        twice as much for a prompt, if there are such."""
        highs = {symbol: high for symbol, (_, high) in self._bounds[fit.index].items()}
        sizes = highs | {"batch": fit.sizes.get("batch", 1)}
        largest = {name: shape_of(self._tensors[name], sizes) for name in shapes}
        most = self._layout({name: shapes[name] if -1 in shape else shape for name, shape in largest.items()})[1]
        wanted = self._layout(shapes)[1]
        return max(wanted, most if fit.rounded else min(2 * wanted, most))

    def _layout(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
        """Where each of some tensors begins, one behind the other, and where the last one ends."""
        offsets, end = dict[str, int](), 0
        for name, shape in shapes.items():
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + _nbytes(self._tensors[name], shape)
        return offsets, end

    def _forget(self, index: int) -> None:
        """Memory was given back that plans and graphs of a profile, or of all, used."""
        for i, context in enumerate(self._contexts):
            if index < 0 or index == i:
                context.forget()
        self._plans.clear()


def is_zero(value: np.ndarray) -> bool:
    """Whether it is zeros, and stays so."""
    return not value.flags.writeable and not value.any()


def _nbytes(tensor: TensorSpec, shape: Shape) -> int:
    return math.prod(shape) * np.dtype(tensor.dtype).itemsize
