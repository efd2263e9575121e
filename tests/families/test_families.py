"""Every family has its parity table, and says itself which model types it handles."""

import importlib

import pytest

from mllm_edge.export.families import FAMILIES

MODULES = sorted(set(FAMILIES.values()))


@pytest.mark.parametrize("module", MODULES)
def test_every_family_has_a_parity_module(module: str) -> None:
    tests = importlib.import_module(f"tests.families.test_{module}")
    assert tests.CONFIGS
    assert callable(tests.test_parity)


@pytest.mark.parametrize("module", MODULES)
def test_a_family_offers_what_export_and_comparison_need(module: str) -> None:
    family = importlib.import_module(f"mllm_edge.export.families.{module}")
    assert set(family.MODEL_TYPES) == {model_type for model_type, name in FAMILIES.items() if name == module}
    for function in ("plan", "load_processor", "image_features"):
        assert callable(getattr(family, function))
