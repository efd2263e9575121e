"""How far the outputs of two sides are from each other."""

import numpy as np

__all__ = ["agreement", "divergence", "logits_errors", "relative_error"]

_LEAST = 1e-12  # in the place of a norm or range of zero
_NEVER = -2e4  # below are logits of tokens that are never chosen: graphs have -30,000, transformers the least number


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """‖expected − found‖/‖expected‖, of arrays of as many elements."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (expected, found))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), _LEAST))


def logits_errors(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[steps]: max|expected − found| of each row of logits [steps, V], over the range of all that are expected. Tokens
    that neither side ever chooses are left out."""
    chosen = expected > _NEVER
    distance = np.where(chosen | (found > _NEVER), np.abs(expected - found), 0).max(axis=1)
    return np.asarray(distance / max(float(np.ptp(expected[chosen])), _LEAST))


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(a ‖ b) [steps] of the distributions of logits [steps, V], in nats."""
    p, q = _log_softmax(a), _log_softmax(b)
    return (np.exp(p) * (p - q)).sum(axis=1)


def agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[steps] bool: whether the likeliest token of logits [steps, V] is the same."""
    return np.asarray(a.argmax(axis=1) == b.argmax(axis=1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
