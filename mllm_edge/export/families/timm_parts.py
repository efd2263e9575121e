"""What families share whose tower transformers takes from timm."""

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.source_weights import empty_model
from mllm_edge.export.families.llava_parts import with_text_config
from mllm_edge.export.family import Checkpoint

__all__ = ["require_wrapper", "with_timm"]

_WRAPPER = "timm_wrapper"


def require_wrapper(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the tower is one of timm."""
    kind = checkpoint.config.vision_config.model_type
    if kind != _WRAPPER:
        where = checkpoint.source.folder / "config.json"
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_WRAPPER}")


def with_timm(source: Source) -> Source:
    """The source as it is; raises ConfigError where transformers cannot make its model, for lack of timm."""
    source = with_text_config(source)
    try:
        empty_model(source)
    except ImportError as e:
        raise ConfigError(
            f"{source.folder}: transformers takes this model's tower from timm, which cannot be imported",
            "python -m pip install timm",
        ) from e
    except Exception:  # of settings that make no model: who reads them names the one that is wrong
        return source
    return source
