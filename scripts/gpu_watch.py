"""What runs ask of CUDA and TensorRT, counted from outside: for gpu_check.py."""

import contextlib
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mllm_edge.runtime.backends.tensorrt_log import Said, log_of

__all__ = ["Seen", "watching"]

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Seen:
    """`calls` and `failed` ones of CUDA's functions, the `seconds` in them; facts of `engines`; tensors whose `unknown`
    shapes TensorRT gave as -1 at a run; what TensorRT `said`."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    engines: list[dict[str, Any]] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    said: list[Said] = field(default_factory=list)

    @property
    def waited(self) -> float:
        """Seconds that the host waited for the GPU."""
        return sum(self.seconds[name] for name in _WAITS)

    def facts(self) -> dict[str, Any]:
        """What to tell."""
        recorded = self.calls["cudaGraphInstantiate"] + self.calls["cudaGraphExecUpdate"]
        graphs = {
            "recorded": recorded - self.failed["cudaGraphInstantiate"] - self.failed["cudaGraphExecUpdate"],
            "replayed": self.calls["cudaGraphLaunch"] - self.failed["cudaGraphLaunch"],
            "failed": sum(self.failed[n] for n in ("cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch")),
        }
        return {
            "graphs": graphs,
            "calls": dict(self.calls),
            "failed_calls": dict(self.failed),
            "engines": self.engines,
            "unknown_shapes": sorted(self.unknown),
            "warnings": [text for said in self.said for text in said.warnings],
            "errors": [text for said in self.said for text in said.errors],
        }


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Count until the body ends. Names that a version does not have are left out."""
    seen, undo = Seen(), list[tuple[Any, str, Any]]()

    def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        old = getattr(owner, name, None)
        if old is not None:
            undo.append((owner, name, old))
            setattr(owner, name, make(old))

    for module in ("cuda.bindings.runtime", *_MODULES):
        with contextlib.suppress(Exception):  # what is not there cannot be watched
            importlib.import_module(module)
    with contextlib.ExitStack() as stack:
        runtime = sys.modules.get("cuda.bindings.runtime")
        for name in [n for n in dir(runtime) if n.startswith("cuda") and _is_function(getattr(runtime, n))]:
            wrap(runtime, name, lambda old, name=name: _counted(seen, name, old))  # type: ignore[misc]
        for trt in {id(m): m for m in map(sys.modules.get, _MODULES) if hasattr(m, "Runtime")}.values():
            seen.said.append(stack.enter_context(log_of(trt).listening()))
            wrap(trt.Runtime, "deserialize_cuda_engine", lambda old: _told(seen, old))
            context = getattr(trt, "IExecutionContext", None)
            wrap(context, "get_tensor_shape", lambda old: _asked(seen, old))
        try:
            yield seen
        finally:
            for owner, name, old in reversed(undo):
                setattr(owner, name, old)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _counted(seen: Seen, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments)
        seen.seconds[name] += time.perf_counter() - begin
        seen.calls[name] += 1
        if int(result[0]):
            seen.failed[name] += 1
        return result

    return call


def _told(seen: Seen, function: Callable[..., Any]) -> Callable[..., Any]:
    def deserialize(self: Any, data: Any) -> Any:
        engine = function(self, data)
        if engine is not None:
            seen.engines.append(_engine(engine))
        return engine

    return deserialize


def _asked(seen: Seen, function: Callable[..., Any]) -> Callable[..., Any]:
    def get_tensor_shape(self: Any, name: str) -> Any:
        shape = function(self, name)
        if any(int(size) < 0 for size in shape):
            seen.unknown.add(name)
        return shape

    return get_tensor_shape


def _engine(engine: Any) -> dict[str, Any]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name).name == "OUTPUT"]
    known = hasattr(engine, "get_aliased_input_tensor")
    return {
        "tensors": len(names),
        "profiles": engine.num_optimization_profiles,
        "working_memory": int(engine.device_memory_size_v2),
        "aliases": sum(bool(engine.get_aliased_input_tensor(name)) for name in outputs) if known else None,
    }
