"""The decoder that a configuration's `model_type` names: each file of this package says which ones it serves."""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader, nearest
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["decoder_for", "decoder_types"]


def decoder_for(model_type: str, text: ConfigReader, weights: Weights, place: Place, where: str) -> DecoderSpec:
    """The decoder at `place`, its settings read from `text`; raises ConfigError for a type that no file here serves
    (`where` is the setting's place, in words), and whatever the decoder's own `spec` raises."""
    module = _modules().get(model_type)
    if module is None:
        near = nearest(model_type, list(decoder_types()))
        raise ConfigError(
            f"{where} = {model_type!r}: there is no such decoder here",
            f"supported: {', '.join(decoder_types())}" + (f"; the nearest is {near}" if near else ""),
        )
    spec: DecoderSpec = module.spec(text, weights, place, model_type)
    return spec


def decoder_types() -> tuple[str, ...]:
    """Every `model_type` of a text model that has a decoder here."""
    return tuple(sorted(_modules()))


@cache
def _modules() -> dict[str, ModuleType]:
    package = importlib.import_module(__package__ or "")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names if name != "find"]
    return {kind: module for module in modules for kind in getattr(module, "MODEL_TYPES", ())}
