"""What a call's answer must be, checked against the call, and made into a constraint on its tokens."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mllm_edge.errors import ContextError, OptionError
from mllm_edge.runtime.decode.constraint import Constraint
from mllm_edge.runtime.decode.guide import Guide
from mllm_edge.runtime.decode.guided import Guides
from mllm_edge.runtime.decode.thinking import Thinking, ThinkingTokens, thinking_tokens
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.tokenizer import Tokenizer

__all__ = ["Guiding", "ThinkingLimit"]


@dataclass(frozen=True)
class ThinkingLimit:
    """The tokens around a model's thinking, and the `most` between them; None: any number."""

    tokens: ThinkingTokens
    most: int | None


@dataclass(frozen=True)
class Guiding:
    """Makes the constraints of one model's answers. `vocab_size`: tokens that its logits have."""

    tokenizer: Tokenizer
    guides: Guides
    vocab_size: int

    def thinking(self, most: Any, end: Any) -> ThinkingLimit | None:
        """What the options max_thinking_tokens and thinking_end ask for; None where the model has no such tokens.
        Raises OptionError where it should have them."""
        if most is not None:
            most = whole("max_thinking_tokens", most, 0)
        tokens = thinking_tokens(self.tokenizer, end)
        if tokens is None or max(tokens.end, tokens.start or 0) >= self.vocab_size:
            if most is None:
                return None
            raise OptionError(
                "max_thinking_tokens: this model's tokenizer has no token that ends a thinking part, such as </think>",
                "leave max_thinking_tokens out, or name such a token of its own: thinking_end=…",
            )
        return ThinkingLimit(tokens, most)

    def check(self, guide: Guide, raw: bool, ignore_eos: bool) -> None:
        """Raise OptionError for a call that a guide does not go with."""
        if raw:
            raise OptionError(
                f"{guide.kind} and raw exclude each other: a raw prompt's answer goes on with its text, so that it has "
                "no beginning",
                "give a question or messages without raw=True",
            )
        if ignore_eos:
            raise OptionError(
                f"{guide.kind} and ignore_eos exclude each other: the guide says where an answer ends",
                "leave ignore_eos out",
            )

    def constraint(
        self,
        guide: Guide | None,
        thinking: ThinkingLimit | None,
        prompt: Prompt,
        stop_ids: Collection[int],
        most: int,
        max_new_tokens: int,
    ) -> Constraint | None:
        """What binds an answer of `most` tokens, the smaller of `max_new_tokens` and what the context holds; None:
        nothing. Raises as `Guides.start`, and OptionError or ContextError for choices that are longer than it."""
        guided = None
        if guide is not None:
            guided = self.guides.start(guide, stop_ids)
            if guide.kind == "choices":
                self._require_room(guide, most, max_new_tokens)
        if thinking is None:
            return guided
        inside = thinking.tokens.opened(prompt.token_ids, self.tokenizer)
        if thinking.most is None and (guided is None or not inside):
            return guided
        return Thinking(thinking.tokens, thinking.most, inside, guided, self.vocab_size, stop_ids)

    def _require_room(self, guide: Guide, most: int, max_new_tokens: int) -> None:
        counts = {text: len(self.tokenizer.encode(text, False)) for text in json.loads(guide.text)}
        text, count = max(counts.items(), key=lambda one: one[1])
        if count <= most:
            return
        what = f"choices: {text!r:.60} has {count} tokens, "
        if most == max_new_tokens:
            raise OptionError(f"{what}max_new_tokens is {most}", f"give max_new_tokens of {count} or more")
        raise ContextError(f"{what}{most} fit behind the prompt", "shorten it, or the prompt")
