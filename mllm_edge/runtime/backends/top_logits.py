"""The largest logits of a row, found where the logits lie, so that a vocabulary need not be copied from there."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["IDS", "OUTPUTS", "SUM", "VALUES", "TopLogits"]

# What a session with `limits["top_logits"]` has beside the outputs of a decoder's graph, all [B, K, …]: the largest
# logits, float32, largest first; their ids, int32; and the sum of all logits, float32.
VALUES, IDS, SUM = "logits.values", "logits.ids", "logits.sum"
OUTPUTS = (VALUES, IDS, SUM)


@dataclass(frozen=True)
class TopLogits:
    """Of one row of logits, the largest `values` [N] float32, largest first, and their `ids` [N] int32. `total` is the
    sum of the row, which is NaN when a logit is; `whole` copies the row [V] float32."""

    values: np.ndarray
    ids: np.ndarray
    total: float
    whole: Callable[[], np.ndarray]

    def row(self, count: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray | None, np.ndarray]:
        """Ids, the lowest first, and logits of the `count` largest and of all that equal the smallest of these;
        `allowed` [V] bool: among which tokens, None: all.

        Where there may be more such than the N at hand, all logits with None for their ids: TensorRT does not say which
        of equal ones it takes. Likewise for a NaN, which may have any place in its order.
        """
        places = np.arange(len(self.values)) if allowed is None else np.flatnonzero(allowed[self.ids])
        count = min(count, len(places)) if allowed is None else count
        if np.isnan(self.total) or count > len(places) or not self.values[-1] < self.values[places[count - 1]]:
            return None, self.whole()
        kept = places[self.values[places] >= self.values[places[count - 1]]]
        kept = kept[np.argsort(self.ids[kept])]
        return self.ids[kept], self.values[kept]
