"""What is known from elsewhere of systems that people ask for, whether they are exported or not."""

import json
from importlib.resources import files
from typing import Any

__all__ = ["known_systems"]


def known_systems() -> list[dict[str, Any]]:
    """By `systems.json`: `model_type` of config.json ("" where there are no weights to have one) and `name`; the
    smallest public `checkpoint` with its parameters in billions, counted from its configuration: of what sees images
    (`vision`) and of the `decoder`, without the table of embeddings, which stays on disk; or `why` it is not exported.
    """
    found: list[dict[str, Any]] = json.loads(files("mllm_edge.export").joinpath("systems.json").read_text("utf-8"))
    return found
