"""What callers ask of a model, checked and made into calls; nothing is run but the work before the first stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError, ContextError, OptionError, PromptError
from mllm_edge.runtime.answer import Call
from mllm_edge.runtime.arguments import first, given_trace, stop_strings, token_ids
from mllm_edge.runtime.decode.constraint import ConstrainedGuesser
from mllm_edge.runtime.decode.guide import guide_of
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.scores import Scoring
from mllm_edge.runtime.decode.speculation import Guesser, PromptLookup, check_speculation
from mllm_edge.runtime.decode.token_rules import TokenRules
from mllm_edge.runtime.guiding import Guiding
from mllm_edge.runtime.limits import MOST_ALTERNATIVES
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.options import MAX_NEW_TOKENS
from mllm_edge.runtime.prompt.processor import Messages, Processor, Prompt
from mllm_edge.runtime.prompt.sources import Source
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, budget_of
from mllm_edge.runtime.scoring import Sought
from mllm_edge.runtime.stopping import Cancel, Stopping
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import GenerationDefaults, ModelSpec

__all__ = ["Asking"]

Images = Source | Iterable[Source]


@dataclass(frozen=True)
class Asking:
    """Makes calls for one model. `defaults`: the checkpoint's own settings. A prompt and its answer have at most
    `context_length` tokens, and the decoder's engine holds `engine_context`; `rows`: tokens that a step checks at most,
    where the decoder's state is `rewindable`. `guiding`: makes the constraints; `budget`: tokens of an image, where a
    call says nothing else."""

    model: ModelSpec
    processor: Processor
    defaults: GenerationDefaults
    context_length: int
    engine_context: int
    rows: int
    rewindable: bool
    guiding: Guiding
    budget: TokenBudget

    def call(
        self,
        prompt: Messages,
        images: Images,
        stop_ids: Collection[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        schema: Mapping[str, Any] | str | Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        max_thinking_tokens: int | None = None,
        thinking_end: str | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
        speculation: int = 0,
        logprobs: int | None = None,
        reuse: bool | None = None,
        cancel: Cancel | None = None,
        timeout: float | None = None,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
        trace: Trace | None = None,
    ) -> Call:
        """The call that `VLM.stream` makes of its options, which says what they mean and what is raised."""
        stopping = Stopping(cancel, timeout)
        self._check_speculation(speculation)
        own = self.defaults
        max_new_tokens = self.new_tokens(max_new_tokens)
        budget, trace = budget_of(max_image_tokens, min_image_tokens), _stopped(trace, stopping)
        params = SamplingParams(
            temperature,
            first(top_k, own.top_k, 0),
            first(top_p, own.top_p, 1.0),
            first(min_p, own.min_p, 0.0),
            first(repetition_penalty, own.repetition_penalty),
            frequency_penalty,
            presence_penalty,
            seed,
        )
        stops = stop_strings(first(stop, () if ignore_eos else own.stop_strings))
        ends = {*(() if ignore_eos else stop_ids), *token_ids("stop_token_ids", stop_token_ids, self.model.vocab_size)}
        guide = guide_of(schema, regex, choices, grammar)
        thinking = self.guiding.thinking(max_thinking_tokens, thinking_end)
        if guide is not None:
            self.guiding.check(guide, raw, ignore_eos)
        with trace.span("preprocess"):
            processed = self._process(prompt, images, raw, budget)
            ids, places = processed.token_ids, processed.image_positions
            most = min(max_new_tokens, self._room(processed))
            constraint = self.guiding.constraint(guide, thinking, processed, ends, most, max_new_tokens)
            guesser: Guesser | None = PromptLookup(ids, speculation, places) if speculation else None
            if constraint is not None and self.rewindable:
                guesser = ConstrainedGuesser(constraint, guesser)
            if self.model.text_encoder is not None:  # rules and penalties count what the decoder holds
                ids = np.array(self.model.text_encoder.start)
        rules = TokenRules(own, ids, ends) if TokenRules.wanted(own) else None
        chooser = Sampler(params, ids, rules, constraint)
        sampler = chooser if logprobs is None else Scoring(chooser, whole("logprobs", logprobs, 0, MOST_ALTERNATIVES))
        lead = not raw and (constraint is None or constraint.lead)
        reused, guided = _reused(processed, reuse), guide is not None
        return Call(processed, sampler, ends, stops, most, trace, guesser, lead, reused, guided, stopping)

    def sought(
        self,
        prompt: Messages,
        images: Images,
        answers: Sequence[str],
        end: Sequence[int],
        raw: bool,
        reuse: bool | None,
        stopping: Stopping,
        budget: TokenBudget,
        trace: Trace | None,
    ) -> Sought:
        """What `VLM.score_answers` makes of its options, which says what they mean and what is raised; the tokens `end`
        end each answer."""
        trace = _stopped(trace, stopping)
        with trace.span("preprocess"):
            processed = self._process(prompt, images, raw, budget)
            tokens = [np.array((*self.processor.answer_tokens(processed, text, raw), *end)) for text in answers]
        if not tokens:
            raise OptionError("there are no answers to score", "give one or more: answers=[…]")
        paired = tuple(zip(answers, tokens, strict=True))
        sought = Sought(processed, paired, _reused(processed, reuse), trace, stopping)
        if sought.longest > self._room(processed):
            raise ContextError(f"an answer of {sought.longest} tokens does not fit behind the prompt", "shorten it")
        return sought

    def left(self, prompt: Messages, images: Images = ()) -> int:
        """Tokens that still fit behind a prompt; below zero where it is too long itself."""
        tokens = len(self._process(prompt, images, False, FREE).token_ids)
        return self.context_length - (self.model.begun(tokens) if tokens <= self.context_length else tokens)

    def new_tokens(self, most: Any) -> int:
        """The option max_new_tokens, or the checkpoint's own; raises OptionError."""
        return whole("max_new_tokens", first(most, self.defaults.max_new_tokens, MAX_NEW_TOKENS), 1)

    def budget_for(self, most: int | None, least: int | None) -> TokenBudget:
        """The options max_image_tokens and min_image_tokens, or the model's own; raises OptionError."""
        return budget_of(most, least).over(self.budget)

    def _process(self, prompt: Messages, images: Images, raw: bool, budget: TokenBudget) -> Prompt:
        bounds = budget.over(self.budget)
        if not raw:
            return _checked(self.processor.process(prompt, images, budget=bounds), budget)
        if not isinstance(prompt, str):
            raise PromptError("raw=True takes one rendered string", "give messages without raw=True")
        return _checked(self.processor.process_text(prompt, images, bounds), budget)

    def _check_speculation(self, count: int) -> None:
        check_speculation(count, self.rewindable)
        if count >= self.rows:
            raise BackendError(
                f"speculation={count} takes steps of {count + 1} tokens; "
                f"the decoder's engine checks {self.rows} at most",
                f"build it anew with `mllm-edge build`, or use speculation up to {self.rows - 1}",
            )

    def _room(self, prompt: Prompt) -> int:
        """Tokens that still fit behind the prompt; raises ContextError when there is not even one."""
        tokens, image = len(prompt.token_ids), len(prompt.image_positions)
        begun = self.model.begun(tokens)
        wanted = max(tokens, begun + 1)
        if wanted <= self.context_length:
            return self.context_length - begun
        smaller = self.context_length < self.model.context_length
        fix = "raise --max-context" if smaller else "use fewer or smaller images, or a shorter prompt"
        if self.context_length == self.engine_context < self.model.context_length:
            fix = f"mllm-edge build --max-seq N, with {wanted} or more"
        if any(layout.kind == "video" for layout in prompt.layouts):
            fix = (
                f"show fewer frames of the video: Video.open(path, frames=N), or fps=R (--frames N, --fps R); or {fix}"
            )
        raise ContextError(
            f"the prompt has {tokens} tokens ({image} of them for images) and an answer needs at least one; "
            f"the context holds {self.context_length}: {wanted - self.context_length} too many",
            fix,
        )


def _stopped(trace: Trace | None, stopping: Stopping) -> Trace:
    """The caller's trace, or a new one, that ends the call in time."""
    trace = given_trace(trace)
    trace.check = stopping.check
    return trace


def _checked(prompt: Prompt, budget: TokenBudget) -> Prompt:
    """The prompt, whose encoded images keep what is asked for; raises OptionError."""
    for one in prompt.shown:
        tokens = one.layout.tokens
        if one.known is not None and one.layout.kind == "image" and tokens > (budget.most or tokens):
            raise OptionError(
                f"an encoded image has {tokens} tokens, and max_image_tokens is {budget.most}",
                f"encode it with max_image_tokens={budget.most}",
            )
    return prompt


def _reused(prompt: Prompt, reuse: bool | None) -> bool:
    """What is asked for, or where nothing is: whether an image of the prompt was encoded before."""
    return any(one.known is not None for one in prompt.shown) if reuse is None else bool(reuse)
