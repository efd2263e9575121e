"""The dialects by name."""

from collections.abc import Mapping

from mllm_edge.graph.dialects.contrib import Contrib
from mllm_edge.graph.dialects.opset17 import Opset17
from mllm_edge.graph.dialects.opset24 import Opset24

__all__ = ["DIALECTS"]

DIALECTS: Mapping[str, type[Contrib] | type[Opset24] | type[Opset17]] = {
    "contrib": Contrib,
    "opset24": Opset24,
    "opset17": Opset17,
}
