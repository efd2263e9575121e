"""Towers of timm in plain torch: what transformers' wrapper of timm wraps where timm is not installed."""

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper
from transformers.utils import is_timm_available

from tests import perception_reference
from tests.fastvit_reference import FastVit
from tests.perception_reference import PerceptionEncoder

__all__ = ["create_model", "stand_in_for_timm"]


def stand_in_for_timm() -> None:
    """Let transformers' wrapper make its towers here, unless timm is installed."""
    if not is_timm_available():
        wrapper: Any = modeling_timm_wrapper
        wrapper.timm = SimpleNamespace(create_model=create_model, __version__="none")
        wrapper.requires_backends = lambda *_: None


def create_model(name: str, pretrained: bool, num_classes: int, **options: Any) -> nn.Module:
    """timm's function, for these architectures alone."""
    assert (pretrained, num_classes) == (False, 0)
    if name in perception_reference.ARCHITECTURES:
        return PerceptionEncoder(name, **options)
    assert (name, options.pop("inference_mode")) == ("fastvit_mci3", True)
    return FastVit(**options)
