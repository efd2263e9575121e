"""Runs of the decoder for measuring: along tokens that are given, and along its own likeliest ones."""

from collections.abc import Collection, Sequence

import numpy as np

from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.prompt.embedder import Embedder

__all__ = ["greedy", "score", "steps"]


def score(decoder: Decoder, embed: Embedder, prompt: Encoded, answer: np.ndarray) -> np.ndarray:
    """Logits [n, V] float32 that each of the n tokens of `answer` [n] is given behind the prompt and those before it;
    all in one run. Raises ContextError when a prompt with its answer is longer than the decoder holds."""
    whole = prompt.followed_by(embed(answer[:-1]))
    decoder.start(whole)
    return decoder.forward(whole, project=range(len(prompt) - 1, len(whole))).copy()


def steps(decoder: Decoder, embed: Embedder, prompt: Encoded, tokens: np.ndarray) -> np.ndarray:
    """As `score`, but the prompt in one run and then one token a step, as an answer is made."""
    decoder.start(prompt, len(tokens))
    rows = [decoder.forward(prompt).copy()]
    rows += [decoder.forward(embed(tokens[i : i + 1])).copy() for i in range(len(tokens) - 1)]
    return np.stack(rows)


def greedy(
    decoder: Decoder, embed: Embedder, prompts: Sequence[Encoded], most: int, stop_ids: Collection[int]
) -> list[np.ndarray]:
    """The likeliest next tokens behind each prompt, up to `most` or the first of `stop_ids`, that one included; side by
    side where the decoder takes them so."""
    if len(prompts) == 1:
        decoder.start(prompts[0], most)
    else:
        decoder.reset(max(map(len, prompts)) + most, len(prompts))
        if not _side_by_side(decoder, prompts):
            return [greedy(decoder, embed, [prompt], most, stop_ids)[0] for prompt in prompts]
    logits = decoder.forward_batch(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = answers
    for left in reversed(range(most)):
        chosen = logits.argmax(axis=1)
        for answer, token in zip(answers, chosen.tolist(), strict=True):
            if not answer or answer[-1] not in stop_ids:
                answer.append(token)
        unfinished = [answer for answer in unfinished if answer[-1] not in stop_ids]
        if not left or not unfinished:
            break
        # Those that have ended go on unheard: a batch keeps its size.
        logits = decoder.forward_batch(list(embed(chosen)[:, None]))
    return [np.array(answer, np.int64) for answer in answers]


def _side_by_side(decoder: Decoder, prompts: Sequence[Encoded]) -> bool:
    return all(prompt.is_plain for prompt in prompts) and decoder.takes_batch([len(prompt) for prompt in prompts])
