"""One tiny checkpoint for each family; a family that is not here fails the tests that go through all.

`FLOAT32_TARGETS` are those that the recipe fp32 has a form for: attention of ONNX Runtime's CUDA provider has none.
"""

from collections.abc import Callable
from typing import Any

from mllm_edge.export.family import families
from mllm_edge.export.targets import TARGETS
from tests.tiny import save_tiny_idefics3, save_tiny_llava, save_tiny_qwen2_vl
from tests.tiny_internvl import save_tiny_internvl

__all__ = ["FAMILY_NAMES", "FLOAT32_TARGETS", "SAVE"]

FLOAT32_TARGETS = tuple(target for target in TARGETS if target != "cuda")

FAMILY_NAMES = sorted({family.name for family in families().values()})
SAVE: dict[str, Callable[..., Any]] = {
    "idefics3": save_tiny_idefics3,
    "internvl": save_tiny_internvl,
    "llava": save_tiny_llava,
    "qwen2_vl": save_tiny_qwen2_vl,
}
