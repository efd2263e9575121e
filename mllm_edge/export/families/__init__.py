"""One module per family; each has `MODEL_TYPES` and `plan(source, weights) -> Plan`."""

import importlib
from types import ModuleType

from mllm_edge.errors import UnsupportedModelError
from mllm_edge.export.source import Source, nearest

__all__ = ["FAMILIES", "family_for"]

# model_type of config.json → module in this package
FAMILIES = {"idefics3": "idefics3", "smolvlm": "idefics3"}


def family_for(source: Source) -> ModuleType:
    """The family module for a checkpoint; raises UnsupportedModelError that names the nearest supported type."""
    module = FAMILIES.get(source.model_type)
    if module is None:
        near = nearest(source.model_type, list(FAMILIES))
        raise UnsupportedModelError(
            f"{source.folder / 'config.json'}: model_type {source.model_type!r} is not supported",
            f"supported: {', '.join(FAMILIES)}" + (f"; the nearest is {near}" if near else ""),
        )
    return importlib.import_module(f"{__name__}.{module}")
