"""What a model thinks of a given answer: the logits along it, in one run."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mllm_edge.runtime.prompt.processor import Prompt
    from mllm_edge.runtime.vlm import VLM

__all__ = ["continued", "score"]


def score(vlm: "VLM", prompt: "Prompt", answer: np.ndarray, embeds: np.ndarray | None = None) -> np.ndarray:
    """Logits [n, vocabulary] float32 that the model gives each of the n tokens of `answer` [n], each behind the prompt
    and the tokens before it.

    `embeds` [S, H]: the prompt's, where they are known already. Not while another thread calls. Raises ContextError
    when a prompt with its answer is longer than the decoder holds.
    """
    embeds = vlm.prompt_embeds(prompt) if embeds is None else embeds
    whole = np.concatenate([embeds, vlm.embed(answer[:-1])])
    vlm.decoder.reset(len(whole))
    rows = range(len(embeds) - 1, len(whole))
    return vlm.decoder.forward(whole, continued(prompt.positions, len(answer) - 1), rows=rows).copy()


def continued(positions: np.ndarray | None, tokens: int) -> np.ndarray | None:
    """A prompt's positions [S] or [3, S] and those of `tokens` behind it."""
    if positions is None:
        return None
    behind = int(positions.max()) + 1 + np.arange(tokens)
    return np.concatenate([positions, np.broadcast_to(behind, (*positions.shape[:-1], tokens))], axis=-1)
