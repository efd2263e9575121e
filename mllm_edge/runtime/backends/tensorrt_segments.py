"""A decoder in segments: each has an engine of its own, which takes less memory to build than one for all layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.tensorrt_session import EngineSession
from mllm_edge.runtime.backends.top_logits import OUTPUTS
from mllm_edge.runtime.onnx_file.split import Piece, partitions
from mllm_edge.spec import TensorSpec, Variant

__all__ = ["Segment", "SegmentedSession", "divisions", "whole"]


@dataclass(frozen=True)
class Segment:
    """What one engine runs: segment `number` of `count`, from 1 on, or all of a component, 1 of 1.

    `variant`: with this segment's inputs and outputs; `graph`: its serialized graph, None for the variant's file.
    """

    variant: Variant
    weight_bytes: int
    number: int = 1
    count: int = 1
    graph: bytes | None = None

    @property
    def suffix(self) -> str:
        """What the names of its files end with."""
        return "" if self.count == 1 else f"-seg{self.number}of{self.count}"

    def named(self, name: str) -> str:
        """Which part of `name` this is, for people."""
        return name if self.count == 1 else f"segment {self.number} of {self.count} of {name}"


def whole(bundle: Bundle, variant: Variant) -> Segment:
    """A component in one engine."""
    files = (bundle.manifest.files.get(name) for name in (variant.file, f"{variant.file}.data"))
    return Segment(variant, sum(file.nbytes for file in files if file is not None))


def divisions(bundle: Bundle, variant: Variant) -> Iterator[tuple[Segment, ...]]:
    """A component in one segment; a decoder in two, three and so on, too, as far as it can be cut."""
    yield (whole(bundle, variant),)
    if variant.kv_mode is not None:
        for pieces in islice(partitions(bundle.listed(variant.file)), 1, None):
            yield tuple(_segment(variant, piece, i, len(pieces)) for i, piece in enumerate(pieces, 1))


def _segment(variant: Variant, piece: Piece, number: int, count: int) -> Segment:
    inputs = [t for t in variant.inputs if t.name in piece.inputs]
    outputs = [t for t in variant.outputs if t.name in piece.outputs]
    part = replace(variant, inputs=_with(inputs, piece.enters), outputs=_with(outputs, piece.leaves))
    return Segment(part, piece.weight_bytes, number, count, piece.model)


def _with(tensors: Sequence[TensorSpec], passing: TensorSpec | None) -> tuple[TensorSpec, ...]:
    return (*tensors, passing) if passing else tuple(tensors)


class SegmentedSession:
    """The sessions of all segments as one. What passes from one to the next stays in memory of the device."""

    def __init__(
        self,
        sessions: Sequence[EngineSession],
        segments: Sequence[Segment],
        allocate: Callable[[tuple[int, ...], str], Any],
    ):
        # The largest logits are found where the logits are: by the last one.
        self.limits = {**sessions[0].limits, **sessions[-1].limits}
        self._sessions = sessions
        self._file = segments[0].variant.file
        self._inputs = [{t.name for t in segment.variant.inputs} for segment in segments]
        self._outputs = [{t.name for t in segment.variant.outputs} for segment in segments]
        self._outputs[-1] |= set(OUTPUTS)
        self._shape: tuple[int, ...] = ()
        # Made for the longest run, so that addresses stay.
        self._passing = {}
        for before, behind in pairwise(segments):
            (tensor,) = set(before.variant.outputs) & set(behind.variant.inputs)
            size = [self.limits[d] if isinstance(d, str) else d for d in tensor.shape]
            self._passing[tensor.name] = allocate(tuple(size), tensor.dtype)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        unknown = [name for name in inputs if not any(name in names for names in self._inputs)]
        if unknown:
            raise BackendError(f"{self._file} has no input {unknown[0]}")
        if "inputs_embeds" in inputs and inputs["inputs_embeds"].shape != self._shape:
            self._shape = inputs["inputs_embeds"].shape
            passing = {name: replace(buffer, shape=self._shape) for name, buffer in self._passing.items()}
            self._bind(passing, passing)
        self._bind(inputs, outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.bind(feeds, {})
        found: dict[str, np.ndarray] = {}
        for session in self._sessions:
            found |= session.run({})
        return found

    def slide(self, past: int, end: int) -> bool:
        return all(session.slide(past, end) for session in self._sessions)

    def keep(self) -> None:
        """As of a single session."""
        for session in self._sessions:
            session.keep()

    def _bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Everything to the sessions that have it."""
        for session, ins, outs in zip(self._sessions, self._inputs, self._outputs, strict=True):
            session.bind(
                {name: value for name, value in inputs.items() if name in ins},
                {name: value for name, value in outputs.items() if name in outs},
            )
