"""What a text encoder gets of a prompt."""

from collections.abc import Mapping

import numpy as np

from mllm_edge.runtime.decode.masks import RelativeBias, encoder_bias
from mllm_edge.spec import TextEncoderSpec

__all__ = ["text_inputs"]


def text_inputs(spec: TextEncoderSpec, embeds: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embeddings [S, H] of all tokens, image features in their places → `inputs_embeds` [1, S, H] and `attention_bias`
    [1, 1 or heads, S, S], float32; `arrays`: the bundle's, by file."""
    positions, relative = spec.positions, None
    if positions.kind == "learned":
        embeds = embeds + arrays[positions.table][: len(embeds)]
    elif positions.kind == "relative_bias":
        relative = RelativeBias(arrays[positions.table], positions.max_distance)
    return {"inputs_embeds": embeds[None], "attention_bias": encoder_bias(len(embeds), relative)}
