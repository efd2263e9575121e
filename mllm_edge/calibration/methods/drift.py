"""Drift: earlier layers are rounded already, so a layer gets other inputs than the float model's; its weight is changed
first to give from those what the float layer gives from its own.

Arai, Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", 2025, section 4.
"""

import numpy as np

__all__ = ["DAMPS", "compensated"]

# Of the mean power, added to the diagonal: a few thousand rows do not determine as many unknowns, and what is fitted to
# them alone feeds on itself from layer to layer. The caller takes what serves rows that were held apart.
DAMPS = (0.03, 0.3, 3.0)


def compensated(weight: np.ndarray, gram: np.ndarray, drift: np.ndarray, damp: float = DAMPS[0]) -> np.ndarray:
    """The weight V [N, K] float32 with the smallest |x̃ Vᵀ − x Wᵀ|² + damping for a weight W [N, K] float32.

    `gram` [K, K]: the mean of x̃ᵀx̃ of the inputs that the layer gets; `drift` [K, K]: that of (x − x̃)ᵀx̃ with x the
    float model's. V = W + W · drift · (gram + damping)⁻¹.
    """
    damped = gram.copy()
    damped[np.diag_indices(len(gram))] += damp * np.diag(gram).mean()
    if not damped.any():
        return weight
    if len(weight) <= len(gram):
        return weight + np.linalg.solve(damped, (weight @ drift).T).T
    return weight + weight @ np.linalg.solve(damped, drift.T).T
