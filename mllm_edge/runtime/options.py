"""The options of an answer as a type, for calls that hand them on."""

from collections.abc import Sequence
from typing import TypedDict

from mllm_edge.runtime.trace import Trace

__all__ = ["MAX_NEW_TOKENS", "Options"]

MAX_NEW_TOKENS = 256  # of an answer, where neither the call nor the checkpoint says it


class Options(TypedDict, total=False):
    """The keyword options of `VLM.stream`, which says what they mean; a test holds the two together."""

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    raw: bool
    ignore_eos: bool
    speculation: int
    logprobs: int | None
    reuse: bool | None
    trace: Trace | None
    wait: bool
