"""Ranges of symbols, and the profiles of engines that are made of them."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from mllm_edge.errors import BackendError
from mllm_edge.graph.ranges import CROSS_KV, TEXT_ENCODER, TILES, decoder_ranges, used_ranges
from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs
from mllm_edge.spec import SymbolRange, TensorSpec, Variant

Sizes = tuple[int, int, int]
SYMBOLS = ("batch", "rows", "sequence", "past", "length", "capacity")


def variant(ranges: Mapping[str, SymbolRange], symbols: tuple[str, ...], dialect: str, kv_mode: str | None) -> Variant:
    inputs = tuple(TensorSpec(symbol, "float16", (symbol, 8)) for symbol in symbols)
    return Variant("tensorrt", dialect, "float16", "x.onnx", inputs, (), kv_mode, ranges=ranges)  # type: ignore[arg-type]


def profiles(found: Variant, limits: Limits) -> list[dict[str, Sizes]]:
    """Symbol → least, usual and most, for each profile."""
    built, _ = build_inputs(found, limits)
    return [{name: (a[0], b[0], c[0]) for name, (a, b, c) in ranges.items()} for ranges in built]


@pytest.mark.parametrize("max_seq", [2, 64, 128, 256, 512, 1024, 2048, 4096])
def test_decoders_in_place(max_seq: int) -> None:
    limits = Limits(max_seq, max_batch=3, max_rows=8)
    prefill, decode = profiles(variant(decoder_ranges("in_place"), SYMBOLS, "opset24", "in_place"), limits)
    new = min(1024, max_seq)
    past = min(max_seq, max(64, max_seq - new))
    assert prefill == {
        "batch": (1, 1, 3),
        "rows": (1, 1, 8),
        "sequence": (1, min(256, new), new),
        "past": (1, max(1, past // 2), past),
        "length": (1, max(max_seq // 2, min(256, new)), max_seq),
        "capacity": (max_seq, max_seq, max_seq),
    }
    whole = (1, max_seq // 2, max_seq)
    assert decode == {**prefill, "sequence": (1, 1, min(16, max_seq)), "past": whole}


@pytest.mark.parametrize("max_seq", [2, 64, 128, 512, 1024, 4096])
def test_decoders_that_append(max_seq: int) -> None:
    """One sequence at a time, whose mask is as long as past and new tokens."""
    symbols, limits = SYMBOLS[:-1], Limits(max_seq, max_batch=3)
    prefill, decode = profiles(variant(decoder_ranges("append"), symbols, "opset17", "append"), limits)
    new, usual = min(1024, max_seq), min(256, max_seq)
    past = min(max_seq, max(64, max_seq - new))
    half = max(1, past // 2)
    assert prefill == {
        "batch": (1, 1, 1),
        "rows": (1, 1, 16),
        "sequence": (1, usual, new),
        "past": (1, half, past),
        "length": (2, half + usual, past + new),
    }
    assert past + new == max_seq or max_seq <= 1024, "no memory for scores that the context has no room for"
    steps, whole = min(16, max_seq), (1, max_seq // 2, max_seq)
    spanned = (2, max_seq // 2 + 1, max_seq + steps)
    assert decode == {**prefill, "sequence": (1, 1, steps), "past": whole, "length": spanned}


def test_all_else_has_one_profile() -> None:
    def only(ranges: Mapping[str, SymbolRange], limits: Limits) -> dict[str, Sizes]:
        (found,) = profiles(variant(ranges, tuple(ranges), "opset24", None), limits)
        return found

    assert [only({"tiles": TILES}, Limits(64, n))["tiles"] for n in (1, 4)] == [(1, 1, 1), (1, 2, 4)]
    cells = {"cells": SymbolRange(usual=256, most=700, limit="max_seq")}
    assert [only(cells, Limits(n))["cells"] for n in (64, 512, 4096)] == [(1, 64, 64), (1, 256, 512), (1, 256, 700)]
    limits = Limits(512, max_batch=2)
    assert only(TEXT_ENCODER, limits) == {"batch": (1, 1, 2), "sequence": (1, 256, 512)}
    assert only(CROSS_KV, limits) == {"batch": (1, 1, 2), "features": (1, 256, 512)}


def test_what_a_caller_may_use() -> None:
    limits = Limits(128, max_batch=2)
    found = limits.sizes(variant(decoder_ranges("in_place"), SYMBOLS, "opset24", "in_place"))
    assert {name: found[name] for name in ("batch", "sequence", "capacity", "rows")} == {
        "batch": 2,
        "sequence": 128,
        "capacity": 128,
        "rows": 16,
    }
    appended = limits.sizes(variant(decoder_ranges("append"), SYMBOLS[:-1], "opset17", "append"))
    assert (appended["batch"], appended["capacity"]) == (1, 128)
    assert limits.sizes(variant({"tiles": TILES}, ("tiles",), "opset24", None)) == {"tiles": 4}


def test_a_symbol_without_a_range_is_named() -> None:
    with pytest.raises(BackendError, match="no range is known for the dimension 'windows'"):
        build_inputs(variant({"tiles": TILES}, ("tiles", "windows"), "opset24", None), Limits(64))


def test_only_the_symbols_that_are_used() -> None:
    """And those that they are the sum of."""
    inputs = [TensorSpec("attention_bias", "float16", (1, 1, "sequence", "length"))]
    assert set(used_ranges(inputs, decoder_ranges("append"))) == {"sequence", "length", "past"}
    assert set(used_ranges(inputs, decoder_ranges("in_place"))) == {"sequence", "length"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"least": 3, "usual": 2}, "the range of batch is 3, 2, None"),
        ({"usual": 5, "most": 4}, "the range of batch is 1, 5, 4"),
        ({"least": 0, "usual": 0, "most": 0}, "the range of batch is 0, 0, 0"),
        ({"least": -1}, "the range of batch is -1"),
        ({"limit": None}, "nothing bounds the range of batch"),
        ({"share": 1.5}, "a share of 1.5"),
        ({"sum_of": ("x",)}, "batch adds up 'x', which has no sizes of its own"),
        (None, "no range is known for the dimension 'batch'"),
    ],
)
def test_contradictions_are_named(change: dict[str, object] | None, words: str) -> None:
    from mllm_edge.manifest_checks import _ranges

    known = {symbol: r for symbol, r in decoder_ranges("in_place").items() if symbol != "batch" or change is not None}
    if change is not None:
        known["batch"] = replace(known["batch"], **change)  # type: ignore[arg-type]
    found = [*_ranges(variant(known, SYMBOLS, "opset24", "in_place"))]
    assert len(found) == 1
    assert words in found[0]
    assert not [*_ranges(variant(decoder_ranges("in_place"), SYMBOLS, "opset24", "in_place"))]
