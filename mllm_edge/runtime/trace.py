"""Spans around every stage, and the metrics of one call made of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

__all__ = ["LOAD_STAGES", "STAGES", "Metrics", "Span", "Trace"]

# In the order they run; none lies in another, and together they are the call, but for the glue between them. The last
# three take turns, once a token; the first token's sampling is a stage of its own.
STAGES = (
    "preprocess",
    "vision_encoder",
    "connector",
    "embed",
    "allocate",
    "prefill",
    "first_token",
    "decode",
    "sample",
    "detokenize",
)
LOAD_STAGES = ("backend", "open")


@dataclass(frozen=True)
class Span:
    """One timed stage; `start` and `seconds` by the monotonic clock, `start` counted from the trace's beginning."""

    name: str
    start: float
    seconds: float


@dataclass
class Trace:
    """Collects spans, those of a call by the names in STAGES."""

    spans: list[Span] = field(default_factory=list)
    origin: float = field(default_factory=time.perf_counter)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, begin, time.perf_counter())

    def add(self, name: str, begin: float, end: float) -> None:
        """Record a span between two readings of `time.perf_counter`."""
        self.spans.append(Span(name, begin - self.origin, end - begin))

    def seconds(self, name: str) -> float:
        """Total time of all spans of that name."""
        return sum(s.seconds for s in self.spans if s.name == name)


@dataclass(frozen=True)
class Metrics:
    """Measurements of one call, times in seconds.

    The stages are STAGES, each one's whole time (`allocate`: the cache), 0 where not run. `ttft` runs from the call to
    the first token (preprocessing included); `tpot` is the mean time per token after the first; `token_seconds` are the
    single intervals. An image of cells (see `ImageSpec`) counts as one of `tiles`.
    """

    prompt_tokens: int
    image_tokens: int
    tiles: int
    new_tokens: int
    preprocess: float
    vision_encoder: float
    connector: float
    embed: float
    allocate: float
    prefill: float
    first_token: float
    decode: float
    sample: float
    detokenize: float
    ttft: float
    total: float
    token_seconds: tuple[float, ...]
    kv_cache_bytes: int

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
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "token_seconds": list(self.token_seconds), "tpot": self.tpot} | {
            "tokens_per_second": self.tokens_per_second
        }
