"""What a decoder remembers of the tokens that it has seen, and what its tensors are called."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = [
    "StateKind",
    "StateSpec",
    "input_of",
    "is_state",
    "rewindable",
    "state_bytes",
    "state_input",
    "state_names",
    "state_output",
]

StateKind = Literal["growing", "recurrent"]

_INPUTS: Mapping[StateKind, str] = {"growing": "past_key_values.", "recurrent": "past_conv."}
_OUTPUTS: Mapping[StateKind, str] = {"growing": "present.", "recurrent": "present_conv."}
_PARTS: Mapping[StateKind, tuple[str, ...]] = {"growing": ("key", "value"), "recurrent": ("",)}


@dataclass(frozen=True)
class StateSpec:
    """State of one kind and size.

    `growing`: keys and values, with a place for each token; `shape` is (heads, head_dim). `recurrent`: read whole and
    written anew in each run, zeros before the first, such as the last inputs of a short convolution; `shape` is
    (width, channels). `layers`: the numbers of the layers that have it, counted among those with state of this kind.
    """

    kind: StateKind
    layers: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What comes behind the prefixes of the tensors' names; see `state_input`."""
        return tuple(name for layer in self.layers for name in state_names(self.kind, layer))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The graph's inputs."""
        return tuple(state_input(self.kind, name) for name in self.names)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The graph's outputs, one for each input."""
        return tuple(state_output(self.kind, name) for name in self.names)

    def values(self, tokens: int) -> int:
        """How many numbers a sequence of `tokens` tokens takes."""
        one = len(self.names) * int(np.prod(self.shape, dtype=np.int64))
        return one * tokens if self.kind == "growing" else one


def state_names(kind: StateKind, layer: int) -> tuple[str, ...]:
    """The tensors of one layer, without their prefixes: `0.key` and `0.value`, or `0`."""
    return tuple(f"{layer}.{part}" if part else f"{layer}" for part in _PARTS[kind])


def state_input(kind: StateKind, name: str) -> str:
    """The input that holds what was before a run: `past_key_values.0.key`, `past_conv.0`."""
    return _INPUTS[kind] + name


def state_output(kind: StateKind, name: str) -> str:
    """The output that holds what is behind it: `present.0.key`, `present_conv.0`."""
    return _OUTPUTS[kind] + name


def input_of(output: str) -> str:
    """The input that a state's output is the successor of."""
    kind = next(kind for kind, prefix in _OUTPUTS.items() if output.startswith(prefix))
    return state_input(kind, output.removeprefix(_OUTPUTS[kind]))


def is_state(tensor: str, kind: StateKind | None = None) -> bool:
    """Whether an input or output of this name is state (of this kind)."""
    kinds = tuple(_INPUTS) if kind is None else (kind,)
    return tensor.startswith(tuple(prefix[k] for k in kinds for prefix in (_INPUTS, _OUTPUTS)))


def rewindable(state: Iterable[StateSpec]) -> bool:
    """Whether tokens can be forgotten again: a place can be written over, what was summed up cannot be undone."""
    return all(spec.kind == "growing" for spec in state)


def state_bytes(state: Iterable[StateSpec], dtypes: Mapping[str, str], tokens: int) -> int:
    """What a sequence of `tokens` tokens takes in a graph whose inputs are of `dtypes`."""
    return sum(spec.values(tokens) * np.dtype(dtypes[spec.inputs[0]]).itemsize for spec in state if spec.names)
