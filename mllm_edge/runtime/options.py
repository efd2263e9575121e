"""The options of an answer as a type, for calls that hand them on."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from mllm_edge.runtime.stopping import Cancel
from mllm_edge.runtime.trace import Trace

__all__ = ["MAX_NEW_TOKENS", "CallOptions", "Options"]

MAX_NEW_TOKENS = 256  # of an answer, where neither the call nor the checkpoint says it


class CallOptions(TypedDict, total=False):
    """What `VLM.stream` makes a call of, and says the meaning of; a test holds this and `Asking.call` together."""

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
    stop_token_ids: int | Sequence[int] | None
    schema: Mapping[str, Any] | str | Any
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    max_thinking_tokens: int | None
    thinking_end: str | None
    raw: bool
    ignore_eos: bool
    speculation: int
    logprobs: int | None
    reuse: bool | None
    cancel: Cancel | None
    timeout: float | None
    max_image_tokens: int | None
    min_image_tokens: int | None
    trace: Trace | None


class Options(CallOptions, total=False):
    """All keyword options of `VLM.stream`."""

    wait: bool
