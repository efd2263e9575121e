"""What references that fill pictures up to one size, and hide what they added, have of the patches that are a
picture's."""

from collections.abc import Iterator
from typing import Any

__all__ = ["of_pictures", "patches_of", "shown_pixels"]


def shown_pixels(mask: Any, patch: int) -> Any:
    """Which pixels of each patch [pictures, rows, columns, patch²] a mask of pixels [pictures, height, width] shows."""
    return mask.unfold(1, patch, patch).unfold(2, patch, patch).bool().flatten(3)


def patches_of(pixels: Any, patch: int) -> Any:
    """pixels [pictures, C, height, width] → their patches [pictures, patches, C · patch²], row by row."""
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
    return patches.flatten(3).flatten(1, 2)


def of_pictures(rows: Any, whole: Any) -> Iterator[Any]:
    """Of patches [pictures, longest, D] those of each picture, [patches, D], where `whole` [pictures, rows, columns]
    says which are."""
    for picture, kept in zip(rows, whole.flatten(1), strict=True):
        yield picture[kept]
