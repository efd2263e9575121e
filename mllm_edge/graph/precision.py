"""How a linear layer is held and computed: precisions, and the sizes of their blocks."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["BLOCKS", "Method", "Precision", "Range", "RangeMethod", "block_size"]

Kind = Literal["float32", "float16", "int8_dynamic", "int8_static", "fp8", "blocks", "w4a8"]
Method = Literal["rtn", "evened", "smoothquant", "gptq", "awq", "awq+gptq"]
RangeMethod = Literal["minmax", "percentile", "entropy", "mse", "search"]
Range = tuple[float, float]  # of activations: (lowest, highest)
BLOCKS = (128, 64, 32)


@dataclass(frozen=True)
class Precision:
    """How a linear layer is held and computed.

    `kind` float32 | float16 (stored in half, computed in float32 where the CPU has no half kernels) | int8_dynamic
    (8-bit weight per output channel, activations quantized at run time; TensorRT keeps them in half) | int8_static (the
    same weight, activations quantized with a range from calibration) | fp8 (as int8_static, in float8 e4m3, for
    TensorRT on GPUs from compute capability 8.9; the CPU's graphs are int8_static then) | blocks (`bits` per weight
    with one scale per `largest_block` weights at most) | w4a8 (blocks of 4 bits, activations in 8 bits with a range
    from calibration; the CPU's kernels for blocks quantize activations anyway).

    `method` chooses codes and scales: rtn (rounding to nearest), evened (from the weights alone: a decoder's columns
    evened out, each block's scale searched for), or with calibration smoothquant, gptq, awq, awq+gptq
    (scaled by AWQ, rounded by GPTQ). `ranges` chooses what int8_static, fp8 and w4a8 represent of the activations;
    search takes the way that serves the layer's outputs best, and with token each token has a scale of its own, from
    its largest magnitude when it is computed.
    """

    kind: Kind
    bits: int = 32
    largest_block: int = 128
    method: Method = "rtn"
    ranges: RangeMethod | Literal["token"] = "search"

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without calibration."""
        return self.is_static or self.method not in ("rtn", "evened")

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized with a range from calibration."""
        return self.rounds_inputs and self.ranges != "token"

    @property
    def per_token(self) -> bool:
        """Whether activations are quantized with a scale for each token."""
        return self.rounds_inputs and self.ranges == "token"

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are quantized by nodes of the graph, apart from the product."""
        return self.kind in ("int8_static", "fp8", "w4a8")

    @property
    def in_blocks(self) -> bool:
        """Whether weights have a scale for each block of a row."""
        return self.kind in ("blocks", "w4a8")

    @property
    def fewer_than_8(self) -> bool:
        """Whether weights lie in blocks that 8 bits would hold better."""
        return self.in_blocks and self.bits < 8


FLOAT32 = Precision("float32")
FLOAT16 = Precision("float16", 16)
INT8_DYNAMIC = Precision("int8_dynamic", 8)
INT8_STATIC = Precision("int8_static", 8, method="smoothquant")
INT8_TOKEN = Precision("int8_static", 8, method="smoothquant", ranges="token")
FP8 = Precision("fp8", 8, method="smoothquant", ranges="minmax")
BLOCKS_8 = Precision("blocks", 8)
BLOCKS_4 = Precision("blocks", 4)
EVENED_4 = Precision("blocks", 4, method="evened")
CALIBRATED_4 = Precision("blocks", 4, method="awq+gptq")
W4A8 = Precision("w4a8", 4, method="awq+gptq")
# A 4-bit head makes small models repeat themselves; its block is 64 (CPU kernels).
HEAD_8 = Precision("blocks", 8, 64)


def block_size(row: int, largest: int) -> int:
    """The largest of 128, 64, 32 (up to `largest`) that divides a row of `row` weights; 32, padded, when none does."""
    return next((b for b in BLOCKS if b <= largest and row % b == 0), 32)
