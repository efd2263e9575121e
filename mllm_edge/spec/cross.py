"""What cross-attention looks at, and what its tensors are called."""

__all__ = ["CROSS_BIAS", "CROSS_KV", "CROSS_ROWS", "ENCODED", "cross_names", "is_cross"]

CROSS_KV = "cross_kv"  # the component that makes keys and values of what is looked at
ENCODED = "encoder_hidden_states"  # which is this
# Inputs of the decoder with a row for each token: which features it sees, and whether it sees any.
CROSS_BIAS, CROSS_ROWS = "cross_attention_bias", "cross_attention_rows"
_PREFIX = "cross."


def cross_names(layer: int) -> tuple[str, str]:
    """Keys and values of one layer, counted among those with cross-attention: `cross.0.key` and `cross.0.value`."""
    return f"{_PREFIX}{layer}.key", f"{_PREFIX}{layer}.value"


def is_cross(tensor: str) -> bool:
    """Whether an input or output of this name is keys or values of cross-attention."""
    return tensor.startswith(_PREFIX)
