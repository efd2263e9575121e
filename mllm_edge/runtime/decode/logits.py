"""Where a run of the decoder leaves its logits: in an array, or on the device, and the largest of them in arrays."""

import numpy as np

from mllm_edge.runtime.backends.base import Backend, Buffer, Session
from mllm_edge.runtime.backends.top_logits import IDS, SUM, VALUES, TopLogits
from mllm_edge.runtime.limits import MOST_ROWS

__all__ = ["Logits"]


class Logits:
    """The output `logits` of one session, bound where the next run shall leave it.

    `top`: how many of the largest logits of a row the session finds itself (0: none). `array` [B, K, V] float32 is what
    the last run left there, unless `top` of them were wanted.
    """

    def __init__(self, session: Session, backend: Backend, vocab_size: int):
        self._session, self._backend, self._size = session, backend, vocab_size
        self.top = session.limits.get("top_logits", 0)
        self._largest: dict[str, np.ndarray] = {}
        self._clear()

    def _clear(self) -> None:
        self.array = self._rows = np.zeros((0, 0, 0), np.float32)
        self._kept: Buffer | None = None
        self._kept_rows: Buffer | None = None

    def forget(self) -> None:
        """Drop all that is bound."""
        if self._largest:
            self._session.bind({}, dict.fromkeys(self._largest))
        self._largest = {}
        self._clear()

    def place(self, sequences: int, rows: int, top: bool = False) -> None:
        """The next run projects so many `rows` of each of the `sequences`."""
        found = self._largest[SUM].shape[1] if top and self._largest else 0
        if top and found != rows:
            assert sequences == 1, "positions of one sequence"
            self._kept, self.array = self._device_rows(rows), np.zeros((0, 0, 0), np.float32)
            sizes = {VALUES: self.top, IDS: self.top, SUM: 1}
            types = {VALUES: np.float32, IDS: np.int32, SUM: np.float32}
            self._largest = {name: np.zeros((1, rows, size), types[name]) for name, size in sizes.items()}
            self._session.bind({}, {"logits": self._kept, **self._largest})
        elif not top and self.array.shape != (sequences, rows, self._size):
            unbound = dict.fromkeys(self._largest)
            self.array, self._largest = self._host_rows(sequences, rows), {}
            self._kept = self._kept_rows = None
            self._session.bind({}, {"logits": self.array, **unbound})

    def top_of(self, row: int) -> TopLogits:
        """The largest logits of a row of the last run."""
        kept, largest = self._kept, self._largest
        assert kept is not None
        total = float(largest[SUM][0, row, 0])
        whole = kept.part(1, row, row + 1)
        return TopLogits(largest[VALUES][0, row], largest[IDS][0, row], total, lambda: whole.read(0, 1)[0, 0])

    def _host_rows(self, sequences: int, rows: int) -> np.ndarray:
        """An array for logits. Steps that check guesses change their width all the time: they share one."""
        if sequences == 1 < rows <= MOST_ROWS and not self._rows.size:
            self._rows = np.zeros((1, MOST_ROWS, self._size), np.float32)
        if sequences == 1 and rows <= self._rows.shape[1]:
            return self._rows[:, :rows]
        return np.zeros((sequences, rows, self._size), np.float32)

    def _device_rows(self, rows: int) -> Buffer:
        """Likewise on the device."""
        if self._kept_rows is None or self._kept_rows.nbytes < 4 * rows * self._size:
            most = 1 if rows == 1 else max(rows, MOST_ROWS)
            self._kept_rows = self._backend.allocate((1, most, self._size), "float32")
        return self._kept_rows.part(1, 0, rows)
