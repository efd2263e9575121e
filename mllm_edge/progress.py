"""How long work reports itself: stages with a title and a total; the command line draws them, a library stays quiet."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives the progress of an export."""

    def stage(self, title: str, total: int = 0) -> None:
        """A new stage begins; `total` in the units of `advance`, 0 when it cannot be known."""
        ...

    def advance(self, amount: int) -> None:
        """Some of the current stage is done."""
        ...

    def notice(self, text: str) -> None:
        """The user should know `text`."""
        ...


class Silent:
    """Reports nothing."""

    def stage(self, title: str, total: int = 0) -> None: ...

    def advance(self, amount: int) -> None: ...

    def notice(self, text: str) -> None: ...
