"""Where a decoder stands in a checkpoint."""

from dataclasses import dataclass

from mllm_edge.export.checkpoint.safetensors import Weights

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Its tensors stand under `prefix` (without a final dot), its projection onto the vocabulary under `head`. `tied`:
    where no such projection is stored, the embeddings are it; a stored one counts, as in transformers."""

    prefix: str = "model"
    head: str = "lm_head"
    tied: bool = False

    @property
    def embedding(self) -> str:
        """The tensor with the token embeddings."""
        return f"{self.prefix}.embed_tokens.weight"

    def lm_head(self, weights: Weights, embedding: str | None = None) -> str:
        """The module that projects onto the vocabulary; `embedding`: the token embeddings, if they are called so."""
        stored = f"{self.head}.weight" in weights or not self.tied
        return self.head if stored else (embedding or self.embedding).removesuffix(".weight")

    def layer(self, names: dict[str, str]) -> dict[str, str]:
        """Role → name within a layer, as role → name in the checkpoint, `{i}` being the layer's number."""
        return {role: f"{self.prefix}.layers.{{i}}.{name}" for role, name in names.items()}
