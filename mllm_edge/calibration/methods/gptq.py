"""GPTQ: columns are rounded one after another, and what rounding did to the output is mended by those still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, algorithm 1.
"""

import numpy as np

from mllm_edge.calibration.methods.scales import reciprocal as inverse_of

__all__ = ["quantize"]

# Of the mean power, added to the diagonal; more where the matrix still has no factor.
_DAMPS = (0.01, 0.1, 1.0)
_LAZY = 128  # columns between updates of all the columns behind them
_SHRINK = np.linspace(1.0, 0.6, 17, dtype=np.float32)


def quantize(weight: np.ndarray, gram: np.ndarray, bits: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric quantization of a weight [N, K] float32 whose inputs have the Gram matrix `gram` [K, K].

    `block`: columns that share a scale (K is whole blocks), or None: one scale per row. Returns codes [N, K] int8 in
    [−2^(bits−1), 2^(bits−1) − 1] and scales [N, blocks] float32, chosen for the smallest squared error weighed by the
    inputs' power.
    """
    rows, row = weight.shape
    work, codes = weight.astype(np.float32, copy=True), np.zeros((rows, row), np.int8)
    power = np.diag(gram).copy()
    dead = power == 0
    power[dead] = 1.0
    # Columns are processed by falling power: the important ones while there is most left to mend with. Blocks stay
    # where they are, so their scales are chosen beforehand.
    order = np.argsort(-power, kind="stable")
    width = block or row
    scales = np.stack(
        [_best_scale(work[:, b : b + width], power[b : b + width], bits) for b in range(0, row, width)], axis=1
    )
    inverse = _inverse_factor(gram, dead, order)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    work = work[:, order]
    owner = order // width
    for start in range(0, row, _LAZY):
        stop = min(start + _LAZY, row)
        part, errors = work[:, start:stop], np.empty((rows, stop - start), np.float32)
        factor = inverse[start:stop, start:stop]
        for i in range(stop - start):
            scale = scales[:, owner[start + i]]
            reciprocal = inverse_of(scale)
            code = np.clip(np.rint(part[:, i] * reciprocal), low, high)
            codes[:, order[start + i]] = code
            error = (part[:, i] - code * scale) / factor[i, i]
            errors[:, i] = error
            part[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes, scales


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
    if size <= _LAZY:
        return np.triu(np.linalg.inv(matrix))
    half = size // 2
    first, last = _inverse_upper(matrix[:half, :half]), _inverse_upper(matrix[half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ matrix[:half, half:] @ last
    return inverse
