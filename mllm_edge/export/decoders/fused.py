"""Stored weights in the order of their rows that the builder asks for: parts of fused projections, pairs of a rope."""

from collections.abc import Mapping

import numpy as np

from mllm_edge.export.checkpoint.safetensors import Weights

__all__ = ["cut_experts", "cut_groups", "cut_rows", "part_pairs"]


def cut_rows(weights: Weights, source: str, parts: Mapping[str, int], row: int | None) -> None:
    """Consecutive rows of `source` [Σ rows, row]: `parts` maps each new name to its number of rows, in order. `row`
    None: `source` is a bias, without columns."""
    columns = () if row is None else (row,)
    weights.use(source, (sum(parts.values()), *columns))  # for the error if the shape is another
    start = 0
    for name, rows in parts.items():
        end = start + rows

        def cut(fused: np.ndarray, start: int = start, end: int = end) -> np.ndarray:
            return fused[start:end]

        weights.derive(name, source, (rows, *columns), cut)
        start = end


def cut_groups(weights: Weights, source: str, parts: Mapping[str, int], groups: int, dim: int, row: int | None) -> None:
    """Heads of `source`, which holds, for each of `groups` in turn, some heads of every part, `dim` rows a head.

    `parts` maps each new name to its heads within a group, in order. `row` None: `source` is a bias, without columns.
    """
    columns = () if row is None else (row,)
    stride, start = sum(parts.values()), 0
    weights.use(source, (groups * stride * dim, *columns))  # for the error if the shape is another
    for name, heads in parts.items():
        end = start + heads

        def cut(fused: np.ndarray, start: int = start, end: int = end) -> np.ndarray:
            return fused.reshape(groups, stride, dim, *columns)[:, start:end].reshape(-1, *columns)

        weights.derive(name, source, (groups * heads * dim, *columns), cut)
        start = end


def part_pairs(
    weights: Weights, source: str, name: str, heads: int, dim: int, row: int, bias: bool, turned: int | None = None
) -> None:
    """The projection `source` to `heads` whose rope turns neighbours, as `name`, in which it turns an element and that
    half of the `turned` ones (None: all) behind it. Keys and queries change alike, and their products not at all."""
    turned = dim if turned is None else turned
    for kind, columns in (("weight", (row,)), ("bias", ())):
        if kind == "weight" or bias:

            def parted(stored: np.ndarray, columns: tuple[int, ...] = columns) -> np.ndarray:
                each = stored.reshape(heads, dim, *columns)
                pairs = each[:, :turned].reshape(heads, turned // 2, 2, *columns).swapaxes(1, 2)
                parts = pairs.reshape(heads, turned, *columns), each[:, turned:]
                return np.concatenate(parts, axis=1).reshape(-1, *columns)

            weights.use(f"{source}.{kind}", (heads * dim, *columns))  # for the error if the shape is another
            weights.derive(f"{name}.{kind}", f"{source}.{kind}", (heads * dim, *columns), parted)


def cut_experts(
    weights: Weights, source: str, parts: Mapping[str, int], experts: int, row: int, turned: bool | None = None
) -> None:
    """The weights of `experts` in `source`, [experts, Σ rows, row] or, where it is `turned`, [experts, row, Σ rows]
    (None: where that alone is its shape): `parts` maps each new name, in which `{e}` is the expert, to its number of
    rows, in order."""
    total, start = sum(parts.values()), 0
    if turned is None:
        turned = weights.shape(source) == (experts, row, total) and row != total
    weights.use(source, (experts, row, total) if turned else (experts, total, row))  # for the error of another shape
    for name, rows in parts.items():
        end = start + rows
        for expert in range(experts):

            def cut(fused: np.ndarray, expert: int = expert, start: int = start, end: int = end) -> np.ndarray:
                return fused[expert][:, start:end].T if turned else fused[expert][start:end]

            weights.derive(name.replace("{e}", str(expert)), source, (rows, row), cut)
        start = end
