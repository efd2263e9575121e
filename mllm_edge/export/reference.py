"""The transformers side of a comparison: a checkpoint's processor, without torchvision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_edge.export.source import open_source
from mllm_edge.export.tokens import chat_template

__all__ = ["load_processor", "quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers shows no progress bars and no advice; afterwards its settings are as before."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_processor(folder: Path) -> Any:
    """Idefics3Processor over the Pillow image processor.

    SmolVLM's own class does the same to images and text and needs two packages more (for video), so it is not used.
    """
    from transformers import AutoTokenizer
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    source = open_source(str(folder))
    settings = source.json("preprocessor_config.json") or source.json("processor_config.json")["image_processor"]
    settings = {k: v for k, v in settings.items() if not k.endswith("_type") and k != "processor_class"}
    image_processor = Idefics3ImageProcessorPil(**settings)
    stated = source.json("processor_config.json").get("image_seq_len")
    vision = source.config["vision_config"]
    patches = image_processor.max_image_size["longest_edge"] // vision.get("patch_size", 32)
    tokens = stated or (patches // source.config.get("scale_factor", 2)) ** 2
    return Idefics3Processor(
        image_processor,
        AutoTokenizer.from_pretrained(folder),
        image_seq_len=tokens,
        chat_template=chat_template(source, "") or None,
    )
