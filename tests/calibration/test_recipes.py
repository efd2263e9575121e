"""Recipes as data: names, TOML files, rules."""

from pathlib import Path

import pytest

from mllm_edge.calibration.mixed import Candidate, by_loss, by_size, ranked, weight_bytes
from mllm_edge.calibration.recipes import CALIBRATED, calibrated_recipe, check_rules, precision_of
from mllm_edge.errors import RecipeError
from mllm_edge.graph.precision import BLOCKS_8, FLOAT16, INT8_STATIC, Precision


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_names() -> None:
    assert calibrated_recipe("int8") == CALIBRATED["int8"]
    assert calibrated_recipe("fp16").vision == FLOAT16
    with pytest.raises(RecipeError, match=r"unknown recipe 'int5'"):
        calibrated_recipe("int5")


def test_file_changes_what_it_names(tmp_path: Path) -> None:
    recipe = calibrated_recipe(
        written(
            tmp_path,
            """
            base = "int4"
            [vision]
            kind = "blocks"
            [decoder]
            method = "gptq"
            block = 32
            [[rules]]
            component = "decoder"
            layers = "layers.0.*"
            kind = "int8"
            ranges = "minmax"
            [[rules]]
            layers = "*.down_proj"
            kind = "float16"
            """,
        )
    )
    assert recipe.name == "mine"
    assert recipe.vision == Precision("blocks", 4, method="awq+gptq")
    assert recipe.decoder == Precision("blocks", 4, 32, "gptq")
    assert recipe.connector == INT8_STATIC
    assert precision_of(recipe, "decoder", "layers.1.up_proj") == recipe.decoder
    assert precision_of(recipe, "decoder", "layers.0.up_proj").kind == "int8_static"
    assert precision_of(recipe, "decoder", "layers.0.up_proj").ranges == "minmax"
    assert precision_of(recipe, "decoder", "layers.0.down_proj") == FLOAT16
    assert precision_of(recipe, "decoder", "lm_head") == recipe.head


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kind =", "mine.toml: "),
        ("speed = 3", "unknown key 'speed'"),
        ("[decoder]\nbist = 4", r"\[decoder\]: unknown key 'bist'"),
        ("[decoder]\nbits = 5", r"\[decoder\]: bits = 5"),
        ("decoder = 4", r"\[decoder\]: not a table"),
        ('base = "int9"', "unknown recipe 'int9'"),
        ("size = 2", "size = 2"),
        ('kv = "int4"', "kv = 'int4'"),
        ('[[rules]]\nkind = "float16"', r"\[\[rules\]\] 1: no layers"),
        ("rules = 3", "rules = 3"),
        ("size = true", "size = True"),
        ("[decoder]\nbits = 4.0", r"\[decoder\]: bits = 4.0"),
        ("more_bits_above = nan", "more_bits_above = nan"),
        ("more_bits_above = inf", "more_bits_above = inf"),
        ("more_bits_above = true", "more_bits_above = True"),
        ("more_bits_above = -0.1", "more_bits_above = -0.1"),
        ('more_bits_above = "often"', "more_bits_above = 'often'"),
        ('base = "int8"\nmore_bits_above = 0.1', "more_bits_above = 0.1, and the decoder is int8_static of 8 bits"),
        ("more_bits_above = 0.1\n[decoder]\nbits = 8", "more_bits_above = 0.1, and the decoder is blocks of 8 bits"),
        ("most_bits = 0", "most_bits = 0"),
        ("most_bits = nan", "most_bits = nan"),
        ('most_bits = "few"', "most_bits = 'few'"),
        ('base = "int8"\nmost_bits = 6', "most_bits = 6, and the decoder is int8_static of 8 bits"),
        ('most_bits = 6\nmore_bits_above = "never"', "most_bits = 6, and every layer keeps the bits that stand here"),
        ('[decoder]\nkind = "int8"\nbits = 4', "bits = 4 means nothing for kind int8_static"),
        ('base = "fp32"\n[decoder]\nbits = 4', "bits = 4 means nothing for kind float32"),
        ('[decoder]\nkind = "int8"\nblock = 64', "block = 64 means nothing for kind int8_static"),
        ('[decoder]\nranges = "token"', "ranges = 'token' means nothing for kind blocks"),
        ('[decoder]\nmethod = "evened"', "method = 'evened'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        calibrated_recipe(written(tmp_path, text))
    with pytest.raises(RecipeError, match="No such file"):
        calibrated_recipe(str(tmp_path / "gone.toml"))


def test_more_bits_are_for_decoders_of_fewer_than_8(tmp_path: Path) -> None:
    assert calibrated_recipe(written(tmp_path, "")).more_bits_above == CALIBRATED["int4"].more_bits_above
    assert calibrated_recipe(written(tmp_path, 'more_bits_above = "never"')).more_bits_above is None
    assert calibrated_recipe(written(tmp_path, "more_bits_above = 0")).more_bits_above == 0
    assert calibrated_recipe(written(tmp_path, "most_bits = 5.5")).most_bits == 5.5
    assert calibrated_recipe(written(tmp_path, "")).most_bits == CALIBRATED["int4"].most_bits
    assert calibrated_recipe(written(tmp_path, 'more_bits_above = "never"')).most_bits is None
    assert calibrated_recipe(written(tmp_path, '[decoder]\nkind = "int8"\nbits = 8')).more_bits_above is None


def test_rule_for_no_layer_lists_near_matches(tmp_path: Path) -> None:
    recipe = calibrated_recipe(written(tmp_path, '[[rules]]\ncomponent = "decoder"\nlayers = "layers.0.upproj"'))
    with pytest.raises(RecipeError, match=r"decoder: layers.0.upproj matches no layer\n.*decoder: layers.0.up_proj"):
        check_rules(recipe, {"decoder": ["layers.0.up_proj", "lm_head"], "connector": ["proj"]})


def test_the_worst_are_raised_while_there_is_room() -> None:
    recipe = CALIBRATED["mixed"]
    order = ranked(recipe, candidates(0.1, 0.3, 0.2))
    low, high = (weight_bytes((64, 128), p) for p in (recipe.decoder, BLOCKS_8))
    raised = by_size(recipe, 3 * low + 2 * (high - low), order)
    assert [rule.layers for rule in raised.rules] == ["layers.1.x", "layers.2.x"]
    assert precision_of(raised, "decoder", "layers.1.x") == BLOCKS_8
    assert precision_of(raised, "decoder", "layers.0.x") == recipe.decoder
    assert by_size(recipe, 0, order).rules == ()


def candidates(*losses: float) -> list[Candidate]:
    return [Candidate("decoder", ((f"layers.{i}.x", (64, 128)),), loss) for i, loss in enumerate(losses)]


def test_the_worst_are_raised_until_the_rest_costs_little() -> None:
    recipe = CALIBRATED["mixed"]
    order = ranked(recipe, candidates(0.1, 0.3, 0.2))
    raised, left = by_loss(recipe, 0.15, order)
    assert [rule.layers for rule in raised.rules] == ["layers.1.x", "layers.2.x"]
    assert left == pytest.approx(0.1)
    assert by_loss(recipe, 1.0, order)[0].rules == ()
    everything, left = by_loss(recipe, 0.05, order)
    assert (len(everything.rules), left) == (3, 0.0)


def test_layers_with_one_input_are_raised_together() -> None:
    recipe = CALIBRATED["mixed"]
    pair = Candidate("decoder", (("layers.0.gate_proj", (64, 128)), ("layers.0.up_proj", (64, 128))), 0.3)
    order = ranked(recipe, [*candidates(0.2), pair])
    assert order[0].loss == 0.2  # half the bytes
    assert [rule.layers for rule in by_loss(recipe, 0.0, order)[0].rules][1:] == [
        "layers.0.gate_proj",
        "layers.0.up_proj",
    ]


def test_weight_bytes() -> None:
    """Codes and scales begin on a page of 4096 bytes each."""
    assert weight_bytes((256, 256), FLOAT16) == 256 * 256 * 2
    assert weight_bytes((256, 256), INT8_STATIC) == 256 * 256 + 4096
    assert weight_bytes((1024, 256), Precision("blocks", 4)) == 1024 * 2 * (64 + 4)
    assert weight_bytes((10, 256), Precision("blocks", 4)) == 4096 + 4096
