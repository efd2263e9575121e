"""What a user should know of how a checkpoint was read, though nothing is wrong enough to stop."""

from collections.abc import Callable, Iterator

__all__ = ["Notices"]


class Notices:
    """Sentences in the order in which they were found, each once; `tell` hears each at once."""

    def __init__(self, tell: Callable[[str], None] = lambda text: None):
        self._tell = tell
        self._texts: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Say `text`: what was found, in which file, and what was made of it."""
        if text not in self._texts:
            self._texts[text] = None
            self._tell(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)
