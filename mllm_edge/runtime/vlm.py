"""`VLM`: a bundle opened for questions."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.errors import CancelledError, ClosedError, PromptError, TimedOutError
from mllm_edge.runtime.answer import Call, Chunk, Result, answer, unanswered
from mllm_edge.runtime.arguments import given_trace, graph_input, image_sizes_of, named
from mllm_edge.runtime.asking import Asking
from mllm_edge.runtime.backends.base import Backend, Keeping, Session
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.components import open_component
from mllm_edge.runtime.conversation import Conversation, WhenFull
from mllm_edge.runtime.decode import along
from mllm_edge.runtime.decode.decoder import Decoder, DecoderSnapshot
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.guided import Guides
from mllm_edge.runtime.decode.scores import AnswerScore
from mllm_edge.runtime.encode import Components, encoded
from mllm_edge.runtime.encoded_image import load_encoded, save_encoded
from mllm_edge.runtime.guiding import Guiding
from mllm_edge.runtime.health import Health, Record, State
from mllm_edge.runtime.limits import TILES_PER_RUN
from mllm_edge.runtime.log import logger
from mllm_edge.runtime.machine.cpu import resident
from mllm_edge.runtime.machine.threads import Spin, Threads
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.options import CallOptions, Options
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.prompt.image import load_image
from mllm_edge.runtime.prompt.processor import Messages, Processor, Prompt
from mllm_edge.runtime.prompt.sources import EncodedImage, Source, VideoFile, as_sources, kind_of
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, budget_of
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.runtime.recall import PREFIX_CACHE, Recall
from mllm_edge.runtime.scoring import scored
from mllm_edge.runtime.stopping import Cancel, Stopping
from mllm_edge.runtime.trace import Trace
from mllm_edge.runtime.turns import Turn, Turns, native
from mllm_edge.spec import ENCODED

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mllm_edge.runtime.planning.plan import Plan, Planner

__all__ = ["VLM", "Chunk", "Result"]

_WARM_UP = "What is in the picture?"


class VLM:
    """A vision-language model on this machine. Open with `VLM.load`; use as a context manager or call `close`.

    Several threads may call: they wait their turn, first come, first served. An answer has its turn from its first
    piece to its last, or until it is abandoned (a `break`, a dropped iterator, an error). A thread that begins another
    call with an answer half taken gives that one up: taking more of it is a GivenUpError. So let one thread take all
    pieces of an answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        max_context: int | None = None,
        threads: int | Threads | None = None,
        notice: Callable[[str], None] = warnings.warn,
        fast_jpeg: bool = False,
        image_cache: int = 0,
        prefix_cache: int = PREFIX_CACHE,
        image_tokens: TokenBudget = FREE,
    ):
        self.bundle, self.backend = bundle, backend
        self.spec = bundle.manifest.model
        generation = bundle.generation()
        self.tokenizer = Tokenizer.load(bundle.path, generation)
        template = ChatTemplate.load(bundle.path, generation) if CHAT_TEMPLATE in bundle.manifest.files else None
        stage_tokens = StageTokens.load(bundle.path, self.spec.image)
        self.identity = f"{bundle.identity}-{backend.target}"  # of what encoded images and saved states are of
        self.processor = Processor(self.spec, self.tokenizer, template, fast_jpeg, stage_tokens, self.identity)
        self.stop_ids = frozenset(generation.eos_token_ids)
        self._before = resident()
        names = bundle.manifest.components
        opened = {name: open_component(bundle, name, backend, threads, notice) for name in names}
        self._types = {name: {t.name: t.dtype for t in component.variant.inputs} for name, component in opened.items()}
        self._sessions = {name: component.session for name, component in opened.items()}
        self._kept = False
        engine_context = self._sessions["decoder"].limits.get("capacity", self.spec.context_length)
        longest = min(engine_context, self.spec.context_length)
        wanted = longest if max_context is None else whole("max_context", max_context, 1)
        self.context_length = min(wanted, longest)
        limits = [session.limits.get("tiles", TILES_PER_RUN) for session in self._sessions.values()]
        inputs = {name: tuple(types) for name, types in self._types.items()}
        self._components = Components(
            self.spec, inputs, partial(_run, self._types, self._sessions), min(TILES_PER_RUN, *limits)
        )
        self._arrays = {name: bundle.array(name) for name in self.spec.arrays}
        table = bundle.array(self.spec.positions.table) if self.spec.positions.table else None
        decoder = opened["decoder"]
        self._decoder: Decoder | None = Decoder(decoder.session, decoder.variant, self.spec, decoder.backend, table)
        steps = self.context_length, engine_context, self._decoder.rows, self._decoder.rewindable
        guiding = Guiding(self.tokenizer, Guides(self.tokenizer, self.spec.vocab_size), self.spec.vocab_size)
        self._asking = Asking(self.spec, self.processor, generation.defaults, *steps, guiding, image_tokens)
        self.embed = Embedder(bundle.embeddings(), self.spec.embedding, bundle.touched(self.spec.embedding.file))
        parts = self._components, self._arrays, self.embed, self._decoder
        self._remembered: Recall | None = Recall(*parts, image_cache, prefix_cache)
        free = weakref.WeakMethod(self._free)  # without a circle: a VLM that is dropped goes at once
        self._record = Record()
        self._turns = Turns(lambda: _call(free()))
        native.watch()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        spin: Spin = "auto",
        affinity: str | Iterable[int] | None = None,
        max_context: int | None = None,
        fast_jpeg: bool = False,
        verify: bool = False,
        image_cache: int = 0,
        prefix_cache: int = PREFIX_CACHE,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
        notice: Callable[[str], None] = warnings.warn,
        trace: Trace | None = None,
    ) -> VLM:
        """Open the bundle in directory `path`.

        `backend`: auto, cpu, cuda, tensorrt or tensorrt-10.3; auto takes the GPU where the bundle and this machine are
        made for it. `threads`: inside one operator, default physical cores. `spin`: whether the threads stay awake
        between two steps (auto: for a moment, so that they are asleep behind an answer's last one; on: for long; off:
        never). `affinity`: the numbers of the CPUs that they run on, such as "4-7" or [4, 5, 6, 7]; the thread
        that calls works too, and stays where it is. These three are for work on the CPU. `max_context`: a lower
        bound on memory than the model's own context length. `fast_jpeg`: decode JPEG files at a smaller scale where the
        model's picture is at most half as large: 2 to 4 times as fast for one of 12 megapixels, but pixels then differ
        from those of the whole by some grey levels (2 or 3 at most for photographs, 5 for noise).
        `verify`: compare every file with its SHA-256 first; without, what is read is compared with faster checksums.
        `image_cache`: bytes for the features of the images that were seen last, by their content, so that one that
        comes again is not looked at again. `prefix_cache`: bytes for what calls with `reuse` and conversations go back
        to, beside the last one's. `max_image_tokens`, `min_image_tokens`: of each image, as in `stream`, for calls that
        do not say it.

        `notice` is told when engines have to be built first, and when a component runs on the CPU because
        the GPU's engine refuses it. `trace` gets the spans backend (the engine is chosen and imported) and
        open. Raises BundleError, BackendError, OptionError.
        """
        if max_context is not None:
            max_context = whole("max_context", max_context, 1)
        caches = whole("image_cache", image_cache, 0), whole("prefix_cache", prefix_cache, 0)
        image_tokens = budget_of(max_image_tokens, min_image_tokens)
        chosen_threads = Threads.of(threads, spin, affinity)
        bundle = Bundle.load(path)
        if verify:
            bundle.verify()
        max_seq = None if max_context is None else min(max_context, bundle.manifest.model.context_length)
        trace = given_trace(trace)
        with native.section():
            with trace.span("backend"):
                chosen = open_backend(backend, chosen_threads, bundle=bundle, max_seq=max_seq, notice=notice)
            with trace.span("open"):
                vlm = cls(bundle, chosen, max_context, chosen_threads, notice, fast_jpeg, *caches, image_tokens)
        logger.info("%r opened in %.2f s", vlm, trace.seconds("backend") + trace.seconds("open"))
        return vlm

    def __repr__(self) -> str:
        what, runs = f"{str(self.bundle.path)!r}, {self.spec.model_type}", self.backend.name
        threads = getattr(self.backend, "threads", None)
        runs += "" if threads is None else f" ({threads} threads)"
        return f"VLM({what}, {runs}, context {self.context_length}{', closed' if self._decoder is None else ''})"

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoder(self) -> Decoder:
        """The decoder, for work step by step; not while another thread calls. Raises ClosedError."""
        if self._decoder is None:
            raise ClosedError("the model was closed", "open it again with VLM.load")
        return self._decoder

    @property
    def _recall(self) -> Recall:
        """What is remembered between calls; raises ClosedError."""
        if self._remembered is None:
            raise ClosedError("the model was closed", "open it again with VLM.load")
        return self._remembered

    def close(self) -> None:
        """Release sessions and caches. Calls that wait, or come later, raise ClosedError; one that runs does so at its
        next token, and is waited for. A second `close` does nothing."""
        self._turns.close()

    def warm_up(self, image_size: tuple[int, int] | None = None) -> Result:
        """Answer once, so that the first question takes no longer than later ones: pages of the weights are read,
        engines are ready. `image_size`: (height, width) in px of the pictures to come; without it a model that takes
        images sees one of 512 × 512. Raises as `stream` does."""
        height, width = image_size or (512, 512)
        images = [] if self.spec.image is None else [np.zeros((height, width, 3), np.uint8)]
        return self.generate(_WARM_UP, images, max_new_tokens=2, ignore_eos=True)

    def health(self) -> Health:
        """How the model fares; never waits."""
        queued, record = self._turns.queued, self._record
        state: State = "closed" if self._turns.closed else "busy" if queued else "ready"
        counts = record.done, record.failed, record.stopped
        return Health(state, max(queued - 1, 0), record.running, *counts, record.last_error, resident())

    def _free(self) -> None:
        self._sessions.clear()
        self._remembered = None
        self.embed.close()
        self._decoder = None

    def generate(self, prompt: Messages, images: Source | Iterable[Source] = (), **options: Unpack[Options]) -> Result:
        """The whole answer at once; options as in `stream`."""
        result = None
        for chunk in self.stream(prompt, images, **options):
            result = chunk.result
        assert result is not None
        return result

    def stream(
        self,
        prompt: Messages,
        images: Source | Iterable[Source] = (),
        *,
        wait: bool = True,
        **options: Unpack[CallOptions],
    ) -> Iterator[Chunk]:
        """Answer piece by piece. Arguments are checked and the prompt is processed before the first piece is asked for;
        then the call waits its turn.

        `prompt`: a question, or messages in chat format. `images`: paths, bytes, PIL images or arrays [H, W, 3] RGB,
        and videos, each a `Video` of such frames, or a file by `Video.open`.
        Options that are None are as the checkpoint's own generation settings say, else 256 tokens, and no effect; its
        rules on which tokens may come (suppressed ones, bad words, n-grams that may not repeat) always apply.
        `temperature` 0 is greedy. `stop`: strings that end the answer and are not part of it; `stop_token_ids`: tokens,
        beside the model's own. `schema` (a dict, JSON, or a class with pydantic's `model_json_schema`), `regex`,
        `choices` (some strings) or `grammar` (Lark's syntax): what the whole answer must be, with `[guidance]`
        installed; what it does not allow gets no probability. An answer that is cut is the beginning of such a one.
        `max_thinking_tokens`: the most between the model's thinking tokens, whose second one is then written for it
        (`thinking_end`: its name, where it is none that is known); what guides an answer begins behind. `raw`: the
        prompt is rendered already, with one image placeholder per image. `ignore_eos`: go on after the model's end, for
        measurements of one length. `speculation`: the most tokens (0 to 15) that are guessed from the prompt and the
        answer so far, and checked by the decoder in one step: the tokens are the same, but for ties that rounding
        decides, which may differ with the width of a step. `logprobs`: pieces and result tell how likely the model held
        each token, with so many alternatives (0 to 100). `reuse`: what earlier calls with `reuse` left of a prompt that
        begins like this one is not run again; None: where an image is an encoded one. Sums are then rounded in another
        order, and where activations are quantized by the run (int8) an answer may be another. `max_image_tokens`: no
        image has more; it is shown in fewer pixels or tiles, by the model's own settings. `min_image_tokens`: the
        model's own lower bound, where it enlarges small images, is another one. Both leave videos as they are.
        `cancel`: another thread ends the call with it, before the next run of a component, piece of a long prompt, or
        token. `timeout`: seconds from the call on, after which the answer ends likewise, with what there is of it;
        waiting for other calls counts, and so does the time that the caller keeps a piece. `trace` gets the call's
        spans; it must be new. `wait` False: raise BusyError where another call has its turn.

        Raises PromptError, ImageError, ContextError (too many tokens), OptionError,
        BackendError (speculation is more than the decoder's engine was built for, or llguidance is missing),
        BundleError (a tokenizer that cannot be guided), ClosedError; while the pieces come also GivenUpError (this
        thread has begun another call), CancelledError, and OptionError where a guide turns out to lead nowhere.
        """
        self._turns.check(wait)
        with self._turns.working():
            call = self._asking.call(prompt, images, self.stop_ids, **options)
        return self._in_turn(call, wait)

    def score_answers(
        self,
        prompt: Messages,
        images: Source | Iterable[Source] = (),
        *,
        answers: Sequence[str],
        ended: bool = False,
        raw: bool = False,
        reuse: bool | None = None,
        cancel: Cancel | None = None,
        timeout: float | None = None,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
        trace: Trace | None = None,
        wait: bool = True,
    ) -> list[AnswerScore]:
        """How likely each of some answers is: the prompt is run once, then each answer's tokens in one step. An answer
        is written as the model would begin it: with a blank before it where the prompt ends in a text without one.

        `ended`: the end of the answer counts, too. The others are as in `stream`. Raises as `stream` does, OptionError
        for no answers, or an empty one, and TimedOutError.
        """
        self._turns.check(wait)
        with self._turns.working():
            end = sorted(self.stop_ids)[:1] if ended else ()
            stopping, budget = Stopping(cancel, timeout), budget_of(max_image_tokens, min_image_tokens)
            sought = self._asking.sought(prompt, images, answers, end, raw, reuse, stopping, budget, trace)
        with self._turns.turn(stopping), self._record.call(), self._whole_or_forgotten():
            return scored(sought, self._recall, self.decoder, self.embed)

    def count_tokens(
        self,
        prompt: Messages,
        image_sizes: Sequence[tuple[float, ...]] = (),
        *,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
    ) -> int:
        """Prompt tokens, image tokens included, for images of these (height, width) and videos of (frames, height,
        width), with a fourth number, frames a second, where the model reads times; nothing is run."""
        budget = self._asking.budget_for(max_image_tokens, min_image_tokens)
        with self._turns.working():
            return self.processor.count_tokens(prompt, image_sizes_of(image_sizes), budget=budget)

    def plan(
        self,
        prompt: Messages,
        images: Source | Iterable[Source] = (),
        *,
        image_sizes: Sequence[tuple[float, ...]] | None = None,
        max_new_tokens: int | None = None,
        raw: bool = False,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
    ) -> Plan:
        """What a call will take: tokens, what each image becomes, room in the context, bytes of the cache and of the
        whole process at its peak; nothing is run. Of `images` only the sizes matter: `image_sizes` in their place are
        as in `count_tokens`. Of a video file one frame is decoded: the file tells how many are taken, and when. The
        others are as in `stream`.

        The memory is that of a process that opens the bundle on the CPU and makes this one call. Raises as `stream`
        does, but for a prompt that is too long: then `Plan.room` is below zero.
        """
        from mllm_edge.runtime.planning.plan import size_of

        budget = self._asking.budget_for(max_image_tokens, min_image_tokens)
        new = self._asking.new_tokens(max_new_tokens)
        with self._turns.working():
            if image_sizes is None:
                sources = as_sources(images) if raw else self.processor.sources(prompt, images)
                self.processor.require([kind_of(source) for source in sources])
                video = None if self.spec.image is None else self.spec.image.video
                sizes = [size_of(source, video.sampling if video else None) for source in sources]
                budgets = [s.shown.budget if isinstance(s, EncodedImage) else budget for s in sources]
                files = [i for i, source in enumerate(sources) if isinstance(source, VideoFile)]
            else:
                sizes, files = image_sizes_of(image_sizes), []
                budgets = [budget] * len(sizes)
            return self._planner.plan(prompt, sizes, budgets, new, self.context_length, raw, files)

    @cached_property
    def _planner(self) -> Planner:
        from mllm_edge.runtime.planning.memory import FIRST_USE, MemoryModel  # answers do without
        from mllm_edge.runtime.planning.plan import Planner

        model = MemoryModel(self.bundle, self.backend.target)
        return Planner(model, self.processor, self._before + FIRST_USE)

    def component(self, name: str, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run one component by itself (all but the decoder), its inputs cast to the graph's types.

        On TensorRT an input may lie in CUDA memory already: an array with `__cuda_array_interface__`, or with DLPack's
        `__dlpack__`, is read where it lies, and must have the graph's type. Raises OptionError for a name that there is
        not, or an array that cannot be made of a value.
        """
        with self._turns.turn():
            return _run(self._types, self._sessions, name, feeds)

    def image_features(self, prompt: Prompt, trace: Trace | None = None) -> np.ndarray:
        """The stages before the decoder: the images of a prompt that has some → the rows [tokens, hidden] float32 that
        take the places of its image tokens; or the rows [N, F] that cross-attention looks at.

        Raises PromptError for a prompt without images."""
        if self.spec.image is not None and self.spec.image.into == "cross_attention":
            outputs = self.stage_outputs(prompt, trace).values()
            return next(found[ENCODED].reshape(-1, found[ENCODED].shape[-1]) for found in outputs if ENCODED in found)
        with self._turns.turn():
            self._require_images(prompt)
            return self._recall.encode(prompt, trace or Trace()).prompt[prompt.image_positions]

    def stage_outputs(self, prompt: Prompt, trace: Trace | None = None) -> dict[str, dict[str, np.ndarray]]:
        """What each stage before the decoder makes of a prompt's images, by component and name of the output; runs one
        behind the other along the first axis.

        Raises PromptError for a prompt without images."""
        self._require_images(prompt)
        return self.encode_and_outputs(prompt, trace)[1]

    def encode_image(
        self,
        image: Source,
        trace: Trace | None = None,
        *,
        cancel: Cancel | None = None,
        timeout: float | None = None,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
    ) -> EncodedImage:
        """Look at an image (or a video) once, for any number of prompts: the value stands for it wherever an image may.
        `save_image` writes it to a file, `load_image` reads that.

        Raises as `stream` does for images, and TimedOutError."""
        trace, stopping = given_trace(trace), Stopping(cancel, timeout)
        budget = self._asking.budget_for(max_image_tokens, min_image_tokens)
        trace.check = stopping.check
        if isinstance(image, EncodedImage):
            return image
        with self._turns.working(), trace.span("preprocess"):
            keeps = self.spec.image is not None and self.spec.image.seen_together
            source = load_image(image) if keeps and kind_of(image) == "image" else None  # type: ignore[arg-type]
            shown = self.processor.show(image if source is None else source, budget)
        with self._turns.turn(stopping), self._record.call():
            return EncodedImage(source, self._recall.look(shown, trace), self.identity)

    def save_image(self, image: EncodedImage, path: str | os.PathLike[str]) -> None:
        """Write an encoded image to a file, whole or not at all; raises WriteError."""
        save_encoded(image, path)

    def load_image(self, path: str | os.PathLike[str] | IO[bytes]) -> EncodedImage:
        """An encoded image that `save_image` wrote; raises ImageError for a file of another bundle."""
        if self.spec.image is None:
            raise PromptError("this model takes no images", "pass text only")
        return load_encoded(path, self.spec.image, self.identity)

    def chat(self, system: str | None = None, *, when_full: WhenFull = "error") -> Conversation:
        """A conversation, each turn of which runs only what is new. `when_full`: error, or drop_oldest, which forgets
        the oldest turns where the context leaves no room for an answer; see `Conversation`. Raises PromptError for a
        bundle without a chat template."""
        return Conversation(self, system, when_full)

    def room(self, prompt: Messages, images: Source | Iterable[Source] = ()) -> int:
        """Tokens of the context that a prompt leaves for its answer, below zero where it is too long itself; nothing is
        run. Raises as `stream` does for prompts and images."""
        with self._turns.working():
            return self._asking.left(prompt, images)

    def held(self, messages: Messages) -> tuple[np.ndarray, DecoderSnapshot] | None:
        """What is held of a conversation that begins with these messages: the keys of its tokens, and a snapshot of the
        decoder; None where that is nothing."""
        keys = self.processor.process(messages, add_generation_prompt=False).keys
        with self._turns.turn():
            return self._recall.prefixes.best(keys)

    def hold(self, keys: np.ndarray, snapshot: DecoderSnapshot) -> None:
        """Keep what `held` returned for calls with `reuse`."""
        with self._turns.turn():
            self._recall.prefixes.add(keys, snapshot)

    def encode(self, prompt: Prompt, trace: Trace | None = None) -> Encoded:
        """All that a prompt is to the decoder: its images are looked at, once for any number of questions."""
        with self._turns.turn():
            return self._recall.encode(prompt, trace or Trace())

    def encode_and_outputs(
        self, prompt: Prompt, trace: Trace | None = None
    ) -> tuple[Encoded, dict[str, dict[str, np.ndarray]]]:
        """`encode` and `stage_outputs` of one look at the images; no outputs without any."""
        parts: dict[str, dict[str, list[np.ndarray]]] = {}

        def keep(run: dict[str, dict[str, np.ndarray]]) -> None:
            for component, outputs in run.items():
                for name, array in outputs.items():
                    parts.setdefault(component, {}).setdefault(name, []).append(array)

        with self._turns.turn():
            prompted = encoded(self._components, prompt, self.embed, self._arrays, trace or Trace(), keep)
        return prompted, {c: {n: np.concatenate(arrays) for n, arrays in found.items()} for c, found in parts.items()}

    def score(self, prompt: Encoded, answer: np.ndarray) -> np.ndarray:
        """Logits [n, V] float32 that the model gives each of the n tokens of `answer` [n], each behind the prompt and
        the tokens before it, in one run.

        Raises ContextError when a prompt with its answer is longer than the decoder holds.
        """
        with self._turns.turn():
            return along.score(self.decoder, self.embed, prompt, answer)

    def steps(self, prompt: Encoded, tokens: np.ndarray) -> np.ndarray:
        """As `score`, but one token a step, as an answer is made."""
        with self._turns.turn():
            return along.steps(self.decoder, self.embed, prompt, tokens)

    def greedy(
        self, prompts: Sequence[Encoded], most: int, stop_ids: Collection[int] | None = None
    ) -> list[np.ndarray]:
        """The model's own answers to several prompts: ids [n] with the end, if that comes within `most` tokens (None:
        the model's stop ids). Side by side where the decoder takes them so."""
        ends = self.stop_ids if stop_ids is None else stop_ids
        with self._turns.turn():
            return along.greedy(self.decoder, self.embed, prompts, most, ends)

    def _require_images(self, prompt: Prompt) -> None:
        if not prompt.shown:
            raise PromptError("the prompt has no images", "make one with images: vlm.processor.process(text, images)")

    def _in_turn(self, call: Call, wait: bool) -> Iterator[Chunk]:
        """An answer's pieces, each made within the call's turn; the turn ends before the last one is handed out."""
        turn, pieces = Turn(), self._pieces(call)
        try:
            try:
                with call.pace.waiting():
                    self._turns.take(turn, wait, call.stopping)
            except TimedOutError:
                yield unanswered(call)
                return
            with self._record.call():
                yield from self._taken(call, turn, pieces)
        finally:
            self._turns.release(turn)
            with native.section():
                pieces.close()

    def _taken(self, call: Call, turn: Turn, pieces: Iterator[Chunk | None]) -> Iterator[Chunk]:
        finished = False
        while not finished:
            try:
                self._turns.enter(turn)
                piece = next(pieces)
            finally:
                self._turns.leave(turn)
            if piece is None:
                continue
            finished = piece.result is not None
            if finished:
                self._keep()
                self._turns.release(turn)
                _log(piece.result)
            call.pace.hand_out()
            yield piece
            call.pace.take_back()

    def _keep(self) -> None:
        """What the first answer made engines compile stays, however this process ends."""
        if not self._kept:
            with native.section():
                for session in self._sessions.values():
                    if isinstance(session, Keeping):
                        session.keep()
            self._kept = True

    @contextmanager
    def _whole_or_forgotten(self) -> Iterator[None]:
        """Whatever comes in the midst of a step may leave things half done."""
        try:
            yield
        except (CancelledError, TimedOutError):  # between two runs
            raise
        except BaseException:
            if self._decoder is not None:
                self._decoder.forget()
            raise

    def _pieces(self, call: Call) -> Generator[Chunk | None, None, None]:
        try:
            prompt = (self._recall.reused if call.reuse else self._recall.encode)(call.prompt, call.trace)
            yield from answer(call, prompt, self.decoder, self.embed, self.tokenizer, self.context_length)
        except TimedOutError:
            yield unanswered(call)
        except (GeneratorExit, CancelledError):  # it was abandoned between two pieces or runs
            raise
        except BaseException:  # whatever came in the midst of a step may have left things half done
            if self._decoder is not None:
                self._decoder.forget()
            raise


def _run(
    types: Mapping[str, Mapping[str, str]], sessions: Mapping[str, Session], component: str, feeds: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """One component by itself, its inputs cast to the graph's `types`. No method: what holds it must not hold a VLM."""
    known = named(types, component, "component")
    inputs = {key: graph_input(key, value, named(known, key, f"input of {component}")) for key, value in feeds.items()}
    return sessions[component].run(inputs)


def _log(result: Result | None) -> None:
    if result is not None and logger.isEnabledFor(logging.DEBUG):
        m = result.metrics
        about = f"{m.prompt_tokens} prompt tokens, {m.new_tokens} new, ended by {result.finish_reason}"
        logger.debug("%s: TTFT %.1f ms, %.1f tok/s", about, 1000 * m.ttft, m.tokens_per_second)


def _call(function: Callable[[], None] | None) -> None:
    if function is not None:
        function()
