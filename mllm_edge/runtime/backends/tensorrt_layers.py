"""How long each layer of an engine takes, by TensorRT's own profiler."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["LayerTimes", "Runs", "layer_kind", "layer_profiler"]

# Of each run of an engine, its layers in order: name and seconds.
Runs = list[list[tuple[str, float]]]
# By the file of a graph: of its engine, or of those of its segments in order.
LayerTimes = dict[str, list[Runs]]

# The first word of a name that TensorRT gave: "__myl_FcMul_myl0_3", "{ForeignNode[...]}", "Reformatting CopyNode ...".
_WORD = re.compile(r"[\W_]*(?:myl_)?([A-Za-z]+)")


def layer_profiler(trt: Any, runs: Runs) -> Any:
    """A profiler for an execution context, which adds to the last one of `runs`; the caller begins each."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            # An engine has a layer once for each of its profiles, and says for which.
            runs[-1].append((layer_name.partition(" [profile ")[0], ms / 1e3))

    return Profiler()


def layer_kind(name: str, kinds: Mapping[str, str]) -> str:
    """What a layer computes, by its name. `kinds`: the type of each node of the graph. A layer that TensorRT made of
    several nodes has the types of those it is named after, else the word that its name begins with."""
    known = [kinds[part] for part in name.split(" + ") if part in kinds]
    if known:
        return " + ".join(known)
    word = _WORD.match(name)
    return word[1] if word else name
