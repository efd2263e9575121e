"""One module per family.

Each has `MODEL_TYPES`, `SUMMARY` (facts for people), `plan(source, weights) -> Plan`, and for the comparison with the
source model `load_processor(source)`, the reference's own processor without torchvision, and
`image_features(model, inputs)`, the reference's tensors that answer to the components' outputs `vision_hidden` and
`image_features`. Where transformers does not load a checkpoint itself, `load_model(source, decoder_layers)` gives the
reference in float32, with only its first `decoder_layers` (None: all). `OWN_READING` names those of `MODEL_TYPES` for
which transformers has no class, so that their reference reads the checkpoint's files as the export does.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mllm_edge.errors import ConfigError, MllmEdgeError, UnsupportedModelError
from mllm_edge.export.checkpoint.config import nearest
from mllm_edge.export.checkpoint.source import Source

__all__ = ["FAMILIES", "family_for", "reading", "summaries"]

# model_type of config.json → module in this package
FAMILIES = {
    "idefics3": "idefics3",
    "internvl": "internvl",
    "internvl_chat": "internvl",
    "llava": "llava",
    "qwen2_vl": "qwen2_vl",
    "smolvlm": "idefics3",
}


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


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Around what reads a checkpoint's settings: a value of a type or size that nothing can be made of, which no check
    foresaw, becomes a ConfigError that quotes what failed."""
    try:
        yield
    except MllmEdgeError:
        raise
    except OSError as e:
        raise ConfigError(f"{e.filename or source.folder}: {e.strerror or e}", "check the file, and links to it") from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(
            f"{source.folder}: a setting has a value that cannot be used ({type(e).__name__}: {reason:.200})",
            "compare the JSON files with those of the model's own repository; --debug shows where it was read",
        ) from e


def summaries() -> list[dict[str, Any]]:
    """What each family module says of itself: `family`, `model_types`, and its `SUMMARY` of `decoders` allowed and hub
    ids of `examples`. Imports no torch."""
    found = []
    for name in sorted(set(FAMILIES.values())):
        module = importlib.import_module(f"{__name__}.{name}")
        found.append({"family": name, "model_types": list(module.MODEL_TYPES), **module.SUMMARY})
    return found
