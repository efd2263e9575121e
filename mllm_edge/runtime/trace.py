"""Spans around every stage, and the metrics of one call made of them."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["LOAD_STAGES", "STAGES", "Metrics", "Span", "Trace", "in_order"]

# In the order they run, the components that a model has before its decoder behind the first of them; none lies in
# another, and together they are the call, but for the glue between them. The last three take turns, decode once a step
# and the others once a token; the first token's sampling is a stage of its own.
STAGES = (
    "preprocess",
    "embed",
    "allocate",
    "prefill",
    "first_token",
    "decode",
    "sample",
    "detokenize",
)
LOAD_STAGES = ("backend", "open")


def in_order(names: Iterable[str]) -> list[str]:
    """Names of stages, each once, in the order they run; components as they come."""
    found = dict.fromkeys(name for name in names if name not in LOAD_STAGES)
    components = [name for name in found if name not in STAGES]
    return [name for name in (STAGES[0], *components, *STAGES[1:]) if name in found]


class Span(NamedTuple):
    """One timed stage; `start` and `seconds` by the monotonic clock, `start` counted from the trace's beginning."""

    name: str
    start: float
    seconds: float


class _Running:
    """A span that has begun. A class, for a generator takes twice as long, and several run per token."""

    __slots__ = ("_begin", "_name", "_trace")

    def __init__(self, trace: "Trace", name: str):
        self._trace, self._name = trace, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._trace.add(self._name, self._begin, time.perf_counter())


def _go_on() -> None:
    """What ends no call."""


@dataclass
class Trace:
    """Collects spans, those of a call by the names in STAGES, and `counts` of what happened within them. `check` is
    called before each run of a component, and raises where the call is to end."""

    spans: list[Span] = field(default_factory=list)
    origin: float = field(default_factory=time.perf_counter)
    counts: Counter[str] = field(default_factory=Counter)
    check: Callable[[], None] = field(default=_go_on, repr=False, compare=False)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time the body of a `with` statement."""
        return _Running(self, name)

    def add(self, name: str, begin: float, end: float) -> None:
        """Record a span between two readings of `time.perf_counter`."""
        self.spans.append(Span(name, begin - self.origin, end - begin))

    def count(self, name: str, amount: int = 1) -> None:
        """Add to one of the counts."""
        self.counts[name] += amount

    def runs(self, name: str) -> int:
        """How many spans of that name there are."""
        return sum(s.name == name for s in self.spans)

    def seconds(self, name: str) -> float:
        """Total time of all spans of that name."""
        return sum(s.seconds for s in self.spans if s.name == name)

    def stages(self) -> dict[str, float]:
        """Total time of each stage of a call, in the order they run; 0 for those of STAGES that did not."""
        seconds = dict.fromkeys(in_order([*STAGES, *(s.name for s in self.spans)]), 0.0)
        for span in self.spans:
            if span.name in seconds:
                seconds[span.name] += span.seconds
        return seconds


@dataclass(frozen=True)
class Metrics:
    """Measurements of one call, times in seconds.

    `stages`: each one's whole time, see STAGES (`allocate`: the cache), with the components that ran. `ttft` runs from
    the call to the first token (preprocessing included); `tpot` is the mean time per token after the first;
    `token_seconds` are the single intervals. An image of cells (see `ImageSpec`) counts as one of `tiles`. `waited`,
    within `ttft`, is for the calls of other threads; `consumer`, for which no other figure counts, what took the pieces
    of the answer.

    `decode_steps`: runs of the decoder after the prompt; with speculation, of `guessed` tokens `accepted` ones took no
    step of their own. Tokens of one step come together: of their intervals only the mean means something. `reused`: the
    prompt's first tokens that an earlier call had run.
    """

    prompt_tokens: int
    image_tokens: int
    tiles: int
    new_tokens: int
    stages: Mapping[str, float]
    ttft: float
    total: float
    token_seconds: tuple[float, ...]
    kv_cache_bytes: int
    decode_steps: int = 0
    guessed: int = 0
    accepted: int = 0
    waited: float = 0.0
    consumer: float = 0.0
    reused: int = 0

    @property
    def tpot(self) -> float:
        """Mean seconds per output token after the first; 0 when there was only one."""
        return float(np.mean(self.token_seconds)) if self.token_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode rate after the first token; 0 when there was only one."""
        return 1.0 / self.tpot if self.tpot else 0.0

    def as_dict(self) -> dict[str, object]:
        """All fields and derived figures, ready for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "stages"}
        return {**data, **self.stages, "token_seconds": list(self.token_seconds), "tpot": self.tpot} | {
            "tokens_per_second": self.tokens_per_second
        }
