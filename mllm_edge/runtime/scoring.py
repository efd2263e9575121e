"""How likely some answers are behind a prompt: it is run once, then each answer's tokens in one step."""

from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.answer import begin
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import prefill
from mllm_edge.runtime.decode.scores import AnswerScore, answer_scores
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.recall import Recall
from mllm_edge.runtime.stopping import Stopping
from mllm_edge.runtime.trace import Trace

__all__ = ["Sought", "scored"]


@dataclass(frozen=True)
class Sought:
    """Answers whose likelihood is asked for, each with its token ids [n], and the prompt they stand behind. `reuse`:
    see `VLM.stream`; `stopping`: when the call ends, whatever it has done by then."""

    prompt: Prompt
    answers: tuple[tuple[str, np.ndarray], ...]
    reuse: bool
    trace: Trace
    stopping: Stopping

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(len(tokens) for _, tokens in self.answers)


def scored(sought: Sought, recall: Recall, decoder: Decoder, embed: Embedder) -> list[AnswerScore]:
    """The score of each answer, in order."""
    found = (recall.reused if sought.reuse else recall.encode)(sought.prompt, sought.trace)
    rest, reused = begin(found, decoder, sought.longest, sought.trace)
    whole = len(found if isinstance(found, Encoded) else found.encoded)
    (first,) = prefill(decoder, rest, whole, sought.trace)
    assert isinstance(first, np.ndarray)
    with sought.trace.span("decode"):
        scores = answer_scores(decoder, embed, first, sought.answers)
    if reused is not None:
        reused.ran()
    return scores
