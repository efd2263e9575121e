"""One run: a bundle is opened and asked the same thing until it has settled, then as often as is counted."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from mllm_edge.runtime.options import Options
from mllm_edge.runtime.profiling.statistics import is_settled
from mllm_edge.runtime.prompt.image import ImageSource
from mllm_edge.runtime.prompt.processor import Messages
from mllm_edge.runtime.trace import Metrics, Trace
from mllm_edge.runtime.vlm import VLM

__all__ = ["Asker", "Call", "Run", "shares"]


@dataclass(frozen=True)
class Call:
    """One call, in seconds. `stages` are those that ran; `token_seconds` the intervals between tokens; the others as in
    `Metrics`."""

    total: float
    ttft: float
    stages: Mapping[str, float]
    token_seconds: tuple[float, ...]
    decode_steps: int = 0
    guessed: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, metrics: Metrics) -> "Call":
        """From the metrics that a call reports."""
        ran = {name: seconds for name, seconds in metrics.stages.items() if seconds}
        counts = (metrics.decode_steps, metrics.guessed, metrics.accepted)
        return cls(metrics.total, metrics.ttft, ran, metrics.token_seconds, *counts)


@dataclass(frozen=True)
class Run:
    """A load of the bundle, in seconds, and the calls after it: `cold`, the first one; `warmup` of them, after which
    they had `settled` or not; those that are counted. `load_stages` are backend (the engine is chosen and imported) and
    open (tokenizer, sessions)."""

    load: float
    load_stages: Mapping[str, float]
    cold: Call
    warmup: int
    settled: bool
    calls: tuple[Call, ...]


@dataclass
class Asker:
    """Asks an open model the same thing, greedily, for `new_tokens` tokens whatever the model's own end.

    `speculation`: as in `VLM.stream`; `traces`: those of the calls so far with their titles; `progress(1)` is called
    after each.
    """

    vlm: VLM
    prompt: Messages
    images: Sequence[ImageSource]
    new_tokens: int
    speculation: int = 0
    progress: Callable[[int], None] = lambda calls: None
    traces: list[tuple[str, Trace]] = field(default_factory=list)

    def ask(self, title: str, trace: Trace | None = None) -> Metrics:
        """One call; `trace` must be new."""
        trace = trace or Trace()
        options: Options = {"max_new_tokens": self.new_tokens, "ignore_eos": True, "speculation": self.speculation}
        options["trace"] = trace
        metrics = self.vlm.generate(self.prompt, self.images, **options).metrics
        self.traces.append((title, trace))
        self.progress(1)
        return metrics

    def run(
        self,
        loading: Trace,
        cold: Metrics,
        warmup: int,
        counted: int,
        meter: AbstractContextManager[object] | None = None,
    ) -> Run:
        """What follows the cold call: up to `warmup` calls, until they settle, and `counted` calls, within which
        `meter` measures. `loading` has the spans of the load."""
        totals: list[float] = []
        while len(totals) < warmup and not is_settled(totals):
            totals.append(self.ask(f"warm-up {len(totals) + 1}").total)
        with meter or contextlib.nullcontext():
            calls = tuple(Call.of(self.ask(f"call {n + 1}")) for n in range(counted))
        return Run(
            load=sum(span.seconds for span in loading.spans),
            load_stages={span.name: span.seconds for span in loading.spans},
            cold=Call.of(cold),
            warmup=len(totals),
            settled=is_settled(totals),
            calls=calls,
        )


def shares(calls: int, runs: int) -> list[int]:
    """How many calls each run makes: alike but for one, and none without a call."""
    runs = min(calls, runs)
    return [calls // runs + (n < calls % runs) for n in range(runs)]
