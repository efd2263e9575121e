"""Every family is found by the model types that it names."""

import importlib
import pkgutil

from mllm_edge.export.family import families
from tests.families.row import rows


def test_every_file_that_defines_a_family_is_found() -> None:
    package = importlib.import_module("mllm_edge.export.families")
    modules = [importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)]
    defined = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    assert {family.name for family in defined} == set(rows())
    types = [model_type for family in defined for model_type in family.model_types]
    assert sorted(types) == sorted(families()), "two families serve one type"
    for family in defined:
        assert family.decoders
        assert family.examples
        assert set(family.own_layouts) <= set(family.model_types)
