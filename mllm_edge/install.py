"""How to install a part of this package that is missing: from where this copy came, for it is on no package index."""

import json

__all__ = ["install_hint"]

_NAME = "mllm-edge"


def install_hint(*extras: str) -> str:
    """The command that adds `extras` to this installation: of the checkout or wheel that pip remembers (PEP 610)."""
    wanted = f"[{','.join(extras)}]" if extras else ""
    place = _origin()
    if place:
        return f'pip install "{place}{wanted}"'
    return (
        f'pip install ".{wanted}" in the checkout of {_NAME}, or pip install "WHEEL{wanted}" with the path of its wheel'
    )


def _origin() -> str | None:
    """The directory or wheel that was installed; None where that is not known, or not a file of this machine."""
    # Imported where something is missing alone: with what they import they take longer than a third of this package.
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlparse

    try:
        text = distribution(_NAME).read_text("direct_url.json")
        url = urlparse(json.loads(text)["url"]) if text else None
    except (PackageNotFoundError, ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    return unquote(url.path) if url is not None and url.scheme == "file" else None
