"""Every family, as its row says: parity in every dialect, export beside its source, large and sharded checkpoints."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.export import pipeline
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import families
from mllm_edge.export.pipeline import export
from tests.families.parity import Exported, check_comparison, check_parity, export_tiny
from tests.families.row import rows

ROWS = rows()


def each(*, of: str, cases: bool = False) -> list[Any]:
    """A parameter for each of the names that a row has in its field `of`, or for each of its cases with each of them.
    Those of one config go to one process; those of the first, where the family's other tests are."""
    found = []
    for family, row in ROWS.items():
        for name in getattr(row, of):
            group = pytest.mark.xdist_group(f"bundle-{family}" if name == row.first else f"{family}-{name}")
            config = (family, name)
            for case in row.cases if cases else ("",):
                # One object for all cases: pytest knows a fixture's parameter by its identity.
                values = (config, case) if cases else (config,)
                found.append(pytest.param(*values, id="-".join(filter(None, (family, name, case))), marks=group))
    return found


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    family, name = request.param
    row = ROWS[family]
    with export_tiny(tmp_path_factory.mktemp(name), row.save, **row.configs[name]) as found:
        yield found


@pytest.mark.parametrize(("exported", "case"), each(of="configs", cases=True), indirect=["exported"], scope="module")
def test_parity(
    exported: Exported, case: str, request: pytest.FixtureRequest, proves: Callable[[str, str, Iterable[str]], None]
) -> None:
    family, _ = request.node.callspec.params["exported"]
    check_parity(exported, case, ROWS[family].cases)
    proves(family, "precisions", ["fp32"])
    proves(family, "components", exported.vlm("cpu").bundle.manifest.components)


def test_every_family_has_a_row() -> None:
    assert set(ROWS) == {family.name for family in families().values()}


@pytest.mark.parametrize("family", ROWS)
def test_every_model_type_is_in_the_table(saved: Callable[..., Path], family: str) -> None:
    layouts = ROWS[family].layouts or (ROWS[family].first,)
    tested = {open_source(str(saved(family, name))).model_type for name in layouts}
    assert tested == {kind for kind, found in families().items() if found.name == family}


@pytest.mark.parametrize("family", ROWS)
def test_sharded_configurations_have_several_files(saved: Callable[..., Path], family: str) -> None:
    names = [name for name, config in ROWS[family].configs.items() if {"shard_size", "shards"} & set(config)]
    assert names
    for name in names:
        assert len(list(saved(family, name).glob("model-*.safetensors"))) > 1


RECIPES = ("fp32", "fp16", "int8", "int4")


# Those that are exported for every target are compared there in each recipe but float32: tests/export/test_targets.py.
@pytest.mark.parametrize(
    ("of", "recipe"),
    [
        pytest.param(*one.values, recipe, id=f"{one.id}-{recipe}", marks=one.marks)
        for one in each(of="compared")
        for recipe in RECIPES[: 1 if one.values[0][1] in ROWS[one.values[0][0]].for_targets else None]
    ],
)
def test_export_compares_with_the_source(
    saved: Callable[..., Path], tmp_path: Path, of: tuple[str, str], recipe: str
) -> None:
    report = export(str(saved(*of)), tmp_path / "out", recipe_name=recipe)
    check_comparison(report, Bundle.load(tmp_path / "out"))
    assert recipe != "fp32" or report.parity["greedy_agreement"] == 1


@pytest.mark.parametrize("of", each(of="probed"))
def test_large_model_is_compared_by_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: tuple[str, str]
) -> None:
    row = ROWS[of[0]]
    text = {**row.configs[of[1]].get("text", {}), "num_hidden_layers": 3}
    text.pop("layer_types", None)
    row.save(tmp_path / "checkpoint", **{**row.configs[of[1]], "text": text})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["scope"] == "decoder: first 2 layers and head"
    # Those with a state of their own.
    crossing = [i for i in text.get("cross_attention_layers", ()) if i < 3]
    assert sum(len(spec.layers) for spec in Bundle.load(tmp_path / "out").manifest.model.state) == 3 - len(crossing)
