"""`VLM` and `Conversation` for asyncio: the same calls, each in a thread of its own, which ends with its task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_edge.runtime.answer import Chunk, Result
from mllm_edge.runtime.conversation import Conversation
from mllm_edge.runtime.decode.scores import AnswerScore
from mllm_edge.runtime.prompt.processor import Messages
from mllm_edge.runtime.prompt.sources import EncodedImage, Source
from mllm_edge.runtime.stopping import Cancel
from mllm_edge.runtime.vlm import VLM

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mllm_edge.runtime.options import Options

__all__ = ["AsyncConversation", "AsyncVLM"]

T = TypeVar("T")


class AsyncVLM:
    """A `VLM` whose calls are awaited; several tasks may call, first come, first served.

    A task that is cancelled ends its call before the next run of a component, piece of a long prompt, or token. The
    next piece of an answer is made when it is asked for: one that nobody takes holds its place until its `timeout`.
    """

    def __init__(self, vlm: VLM):
        self.vlm = vlm

    @classmethod
    async def load(cls, path: str | Path, **options: Any) -> AsyncVLM:
        """Open the bundle in directory `path`; options and errors are those of `VLM.load`."""
        return cls(await asyncio.to_thread(partial(VLM.load, path, **options)))

    async def __aenter__(self) -> AsyncVLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `VLM.close`."""
        await asyncio.to_thread(self.vlm.close)

    async def generate(
        self, prompt: Messages, images: Source | Iterable[Source] = (), **options: Unpack[Options]
    ) -> Result:
        """As `VLM.generate`."""
        cancel = options["cancel"] = options.get("cancel") or Cancel()
        return await _ended(cancel, partial(self.vlm.generate, prompt, images, **options))

    def stream(
        self, prompt: Messages, images: Source | Iterable[Source] = (), **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        """As `VLM.stream`."""
        cancel = options["cancel"] = options.get("cancel") or Cancel()
        return _pieces(cancel, partial(self.vlm.stream, prompt, images, **options))

    async def score_answers(
        self,
        prompt: Messages,
        images: Source | Iterable[Source] = (),
        *,
        answers: Sequence[str],
        cancel: Cancel | None = None,
        **options: Any,
    ) -> list[AnswerScore]:
        """As `VLM.score_answers`."""
        cancel = cancel or Cancel()
        call = partial(self.vlm.score_answers, prompt, images, answers=answers, cancel=cancel, **options)
        return await _ended(cancel, call)

    async def encode_image(self, image: Source, *, cancel: Cancel | None = None, **options: Any) -> EncodedImage:
        """As `VLM.encode_image`."""
        cancel = cancel or Cancel()
        return await _ended(cancel, partial(self.vlm.encode_image, image, cancel=cancel, **options))

    def chat(self, system: str | None = None) -> AsyncConversation:
        """As `VLM.chat`."""
        return AsyncConversation(self.vlm.chat(system))


class AsyncConversation:
    """A `conversation`, for all that takes no time, whose questions are awaited."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation

    def ask(self, text: str, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """As `Conversation.ask`."""
        cancel = options["cancel"] = options.get("cancel") or Cancel()
        return _pieces(cancel, partial(self.conversation.ask, text, **options))

    async def score_answers(
        self, text: str, *, answers: Sequence[str], cancel: Cancel | None = None, **options: Any
    ) -> list[AnswerScore]:
        """As `Conversation.score_answers`."""
        cancel = cancel or Cancel()
        call = partial(self.conversation.score_answers, text, answers=answers, cancel=cancel, **options)
        return await _ended(cancel, call)


async def _ended(cancel: Cancel, call: Callable[[], T], executor: ThreadPoolExecutor | None = None) -> T:
    """What a call in a thread returns; when this task is cancelled, so is the call, whose end is waited for."""
    future = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel.cancel()
        with suppress(Exception):
            await future
        raise


async def _pieces(cancel: Cancel, begin: Callable[[], Iterator[Chunk]]) -> AsyncGenerator[Chunk, None]:
    """The pieces of an answer, all made by one thread."""
    thread = ThreadPoolExecutor(1, "mllm-edge-answer")
    try:
        answer = await _ended(cancel, begin, thread)
        try:
            while (chunk := await _ended(cancel, partial(next, answer, None), thread)) is not None:
                yield chunk
        finally:
            await asyncio.get_running_loop().run_in_executor(thread, getattr(answer, "close", lambda: None))
    finally:
        thread.shutdown(wait=False)
