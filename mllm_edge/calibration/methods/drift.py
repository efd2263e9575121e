"""Drift: earlier layers are rounded already, so a layer gets other inputs than the float model's; its weight is changed
first to give from those what the float layer gives from its own.

Arai, Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", 2025, section 4.
"""

import numpy as np

__all__ = ["compensated"]

_DAMP = 0.01  # of the mean power, added to the diagonal, as GPTQ does


def compensated(weight: np.ndarray, gram: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The weight V [N, K] float32 with the smallest |x̃ Vᵀ − x Wᵀ|² for a weight W [N, K] float32.

    `gram` [K, K]: the mean of x̃ᵀx̃ of the inputs that the layer gets; `drift` [K, K]: that of (x − x̃)ᵀx̃ with x the
    float model's. V = W + W · drift · (gram + damping)⁻¹.
    """
    damped = gram.copy()
    damped[np.diag_indices(len(gram))] += _DAMP * np.diag(gram).mean()
    if not damped.any():
        return weight
    return weight + np.linalg.solve(damped, (weight @ drift).T).T
