"""One tiny checkpoint for each family, as the rows of `families/rows/` save it."""

from collections.abc import Callable
from typing import Any

from mllm_edge.export.family import families
from tests.families.parity import FLOAT32_TARGETS
from tests.families.row import rows

__all__ = ["FAMILY_NAMES", "FLOAT32_TARGETS", "SAVE"]


FAMILY_NAMES = sorted({family.name for family in families().values()})
SAVE: dict[str, Callable[..., Any]] = {family: row.save for family, row in rows().items()}
