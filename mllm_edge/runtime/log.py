"""The logger of this package: loads at level INFO, answers at DEBUG. It is silent unless the application listens."""

import logging

__all__ = ["logger"]

logger = logging.getLogger("mllm_edge")
logger.addHandler(logging.NullHandler())
