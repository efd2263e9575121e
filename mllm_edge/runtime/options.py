"""The options of an answer as a type, for calls that hand them on."""

from collections.abc import Sequence
from typing import TypedDict

from mllm_edge.runtime.trace import Trace

__all__ = ["Options"]


class Options(TypedDict, total=False):
    """The keyword options of `VLM.stream`, which says what they mean; a test holds the two together."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    raw: bool
    ignore_eos: bool
    speculation: int
    trace: Trace | None
    wait: bool
