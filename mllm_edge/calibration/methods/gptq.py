"""GPTQ: columns are rounded one after another, and what rounding did to the output is mended by those still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, algorithm 1.
"""

import numpy as np

from mllm_edge.calibration.methods.forward import decide_rows
from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.scales import reciprocal as inverse_of

__all__ = ["quantize"]

# Of the mean power, added to the diagonal; more where the matrix still has no factor.
_DAMPS = (0.01, 0.1, 1.0)
_WHOLE = 128  # the size up to which a triangular matrix is inverted as any other
# Elements of a row in a piece of the work: see `descent`.
_ROW = 256
_SHRINK = np.linspace(1.0, 0.6, 17, dtype=np.float32)


def quantize(weight: np.ndarray, gram: np.ndarray, bits: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric quantization of a weight [N, K] float32 whose inputs have the Gram matrix `gram` [K, K].

    `block`: columns that share a scale (K is whole blocks), or None: one scale per row. Returns codes [N, K] int8 in
    [−2^(bits−1), 2^(bits−1) − 1] and scales [N, blocks] float32, chosen for the smallest squared error weighed by the
    inputs' power.
    """
    rows, row = weight.shape
    power = np.diag(gram).copy()
    dead = power == 0
    power[dead] = 1.0
    # Columns are processed by falling power: the important ones while there is most left to mend with. Blocks stay
    # where they are, so their scales are chosen beforehand.
    order = np.argsort(-power, kind="stable")
    width = block or row
    inverse = _inverse_factor(gram, dead, order)
    codes, scales = np.empty((rows, row), np.int8), np.empty((rows, row // width), np.float32)

    def work(start: int, stop: int) -> None:
        part = weight[start:stop].astype(np.float32, copy=False)
        for b in range(row // width):
            columns = slice(b * width, (b + 1) * width)
            scales[start:stop, b] = _best_scale(part[:, columns], power[columns], bits)
        codes[start:stop, order] = _rounded(part.T[order], scales[start:stop].T, order // width, inverse, bits).T

    for_each_chunk(rows, _ROW, work)
    return codes, scales


def _rounded(columns: np.ndarray, scales: np.ndarray, owner: np.ndarray, inverse: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N] of columns [K, N] in the order they are rounded in; the scales [blocks, N] of each are its `owner`'s
    [K]."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    reciprocals, codes = inverse_of(scales), np.empty(columns.shape, np.int8)

    def decide(i: int, column: np.ndarray) -> np.ndarray:
        """The error that is left to the columns behind, in units of the factor's diagonal."""
        code = column * reciprocals[owner[i]]
        np.minimum(np.maximum(np.rint(code, out=code), low, out=code), high, out=code)
        codes[i] = code
        code *= scales[owner[i]]
        np.subtract(column, code, out=code)
        code /= inverse[i, i]
        return code

    decide_rows(columns, inverse.T, decide)
    return codes


def _best_scale(part: np.ndarray, power: np.ndarray, bits: int) -> np.ndarray:
    """Scale [N] of a block [N, k]: the largest magnitude, shrunk by the factor with the smallest weighed error."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    peak = np.abs(part).max(axis=1)
    scales, best = peak / high, np.full(len(part), np.inf, np.float32)
    for shrink in _SHRINK if bits < 8 else _SHRINK[:1]:
        scale = peak * (shrink / high)
        reciprocal = inverse_of(scale)
        codes = np.clip(np.rint(part * reciprocal[:, None]), low, high)
        error = np.square(codes * scale[:, None] - part) @ power
        better = error < best
        best[better], scales[better] = error[better], scale[better]
    return scales.astype(np.float32)


def _inverse_factor(gram: np.ndarray, dead: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The upper triangular U with UᵀU = the inverse of the damped Gram matrix, columns in `order`, [K, K] float32."""
    # With the matrix = R Rᵀ, R upper triangular (Cholesky from the other end), U is the inverse of R.
    backwards = order[::-1]
    matrix = gram[np.ix_(backwards, backwards)].astype(np.float64)
    diagonal = np.diag_indices(len(matrix))
    matrix[diagonal] = power = np.where(dead[backwards], 1.0, matrix[diagonal])
    for damp in _DAMPS:
        matrix[diagonal] = power + damp * power.mean()
        try:
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            continue
        del matrix  # as large as the other two that are needed now
        return _inverse_upper(factor[::-1, ::-1]).astype(np.float32)
    raise ValueError("the inputs' Gram matrix is not positive")


def _inverse_upper(matrix: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, by halves: a sixth of the work of a general inverse."""
    size = len(matrix)
    if size <= _WHOLE:
        return np.triu(np.linalg.inv(matrix))
    half = size // 2
    first, last = _inverse_upper(matrix[:half, :half]), _inverse_upper(matrix[half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ matrix[:half, half:] @ last
    return inverse
