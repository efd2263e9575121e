"""An engine that TensorRT has opened: what it takes and gives, and whether that is its graph's."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.tensorrt_best import best_outputs
from mllm_edge.runtime.backends.tensorrt_build import Module
from mllm_edge.runtime.backends.tensorrt_contexts import Contexts
from mllm_edge.runtime.backends.tensorrt_log import log_of
from mllm_edge.spec import TensorSpec, Variant, input_of, is_state

__all__ = ["OpenedEngine", "Range"]

# The smallest and the largest shape.
Range = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class OpenedEngine:
    """An engine and what must outlive it."""

    module: Module
    log: Any
    runtime: Any
    engine: Any
    contexts: Contexts

    @classmethod
    def open(cls, module: Module, path: Path, graphs: bool) -> "OpenedEngine | None":
        """None when TensorRT does not take it. `graphs`: as in `Contexts`."""
        log = log_of(module.trt)
        runtime = module.trt.Runtime(log)
        # TensorRT 10.3 reads the buffer without the interpreter's lock: no one else has this one.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            return None
        contexts = Contexts(module.trt, engine, path.with_name(f"{path.name}.cache"), graphs)
        return cls(module, log, runtime, engine, contexts)

    @property
    def inputs(self) -> list[str]:
        mode = self.module.trt.TensorIOMode.INPUT
        return [name for name in self._names() if self.engine.get_tensor_mode(name) == mode]

    @property
    def top_logits(self) -> tuple[TensorSpec, ...]:
        """The outputs that its graph does not have."""
        return best_outputs(self.engine, self._names())

    @property
    def profiles(self) -> list[dict[str, Range]]:
        """What each profile takes, by input."""
        return [self._ranges(i) for i in range(self.engine.num_optimization_profiles)]

    def check(self, variant: Variant) -> None:
        """Raise BackendError unless inputs and outputs are the variant's, and caches are updated in place."""
        known = {t.name for t in (*variant.inputs, *variant.outputs, *self.top_logits)}
        if set(self._names()) != known:
            raise BackendError(f"the engine of {variant.file} has other inputs or outputs than its graph")
        for name in self._names():
            if self.engine.get_tensor_location(name) != self.module.trt.TensorLocation.DEVICE:
                raise BackendError(f"the engine of {variant.file} wants {name} in host memory", "please report this")
        if variant.kv_mode == "in_place" and hasattr(self.engine, "get_aliased_input_tensor"):
            for name in (t.name for t in variant.outputs if is_state(t.name, "growing")):
                past = input_of(name)
                if self.engine.get_aliased_input_tensor(name) != past:
                    raise BackendError(f"the engine of {variant.file} does not update {past} in place")

    def said(self) -> str:
        """The last error that TensorRT told."""
        return (self.log.errors[-1:] or ["it does not say why"])[0]

    def _ranges(self, profile: int) -> dict[str, Range]:
        found = {}
        for name in self.inputs:
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, profile)
            found[name] = (tuple(smallest), tuple(largest))
        return found

    def _names(self) -> list[str]:
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
