"""A prompt that is read as a whole before the decoder begins: what an encoder-decoder (T5, BART) adds to a model."""

from dataclasses import dataclass

from mllm_edge.spec.positions import PositionSpec

__all__ = ["TEXT_ENCODER", "TextEncoderSpec"]

TEXT_ENCODER = "text_encoder"  # the component that reads the prompt


@dataclass(frozen=True)
class TextEncoderSpec:
    """The component `text_encoder` reads all tokens of a prompt, features of images in their places, and the decoder's
    cross-attention looks at what it makes of them; the decoder itself begins with tokens of its own.

    `positions`: of the prompt's tokens, each of which sees every other; those of the decoder are `ModelSpec.positions`.
    `start`: the ids that the decoder begins with, before its answer.
    """

    positions: PositionSpec
    start: tuple[int, ...]
