"""How much memory a bundle needs, and how much of the context an image takes; nothing is run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.errors import ContextError, ImageError
from mllm_edge.runtime.prompt.image import ImageSource, load_image
from mllm_edge.runtime.prompt.processor import Processor
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.spec import MOST_PIXELS, ModelSpec, cross_bytes, state_bytes

__all__ = ["ImageCost", "Memory", "image_cost", "memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes. `weights` per component stay in memory, as stored in the bundle (a runtime may pack copies of its own);
    `mapped` files are read row by row from disk; `kv_cache` holds `context` tokens, and `cross_kv` what
    cross-attention looks at: of one image, where images are looked at so, or a prompt of `context` tokens."""

    target: str
    context: int
    weights: Mapping[str, int]
    kv_cache: int
    cross_kv: int
    mapped: int

    @property
    def resident(self) -> int:
        """Weights, cache, and what is looked at."""
        return sum(self.weights.values()) + self.kv_cache + self.cross_kv


@dataclass(frozen=True)
class ImageCost:
    """What one image takes. `height` and `width` in px, upright; `tiles` that the vision encoder sees, 1 where the
    `grid` is one of `cells`; `prompt_tokens` are those of a prompt with the image and no text, markers and template
    included; `left` of the context."""

    height: int
    width: int
    tiles: int
    grid: tuple[int, int]
    cells: bool
    image_tokens: int
    prompt_tokens: int
    left: int


def memory(bundle: Bundle, context: int) -> list[Memory]:
    """Memory for `context` tokens, for each target of the bundle; raises ContextError beyond the model's context."""
    model, components = bundle.manifest.model, bundle.manifest.components
    if context > model.context_length:
        raise ContextError(
            f"{context} tokens are more than the model's context of {model.context_length}",
            f"--context {model.context_length} or less",
        )
    found = []
    for target in dict.fromkeys(v.target for v in components["decoder"].variants):
        variants = {name: bundle.variant(name, target) for name in components}
        sizes = {name: bundle.manifest.files[v.file].nbytes for name, v in variants.items()}
        for name, variant in variants.items():
            data = bundle.manifest.files.get(f"{variant.file}.data")
            sizes[name] += data.nbytes if data else 0
        held = state_bytes(model.state, {t.name: t.dtype for t in variants["decoder"].inputs}, context)
        mapped = bundle.manifest.files[model.embedding.file].nbytes
        crossed = cross_bytes((t for v in variants.values() for t in v.outputs), _features(model, context))
        found.append(Memory(target, context, sizes, held, crossed, mapped))
    return found


def _features(model: ModelSpec, context: int) -> int:
    """That cross-attention looks at: of one image, or of a prompt."""
    if model.text_encoder is not None:
        return context
    image = model.image
    crossed = image is not None and image.into == "cross_attention"
    return image.features * (image.tiles or 1) if image is not None and crossed else 0


def image_cost(bundle: Bundle, image: ImageSource | tuple[int, int], budget: TokenBudget = FREE) -> ImageCost:
    """The cost of an image, or of any image of that (height, width), that keeps a `budget`; raises ImageError,
    PromptError, and OptionError for the budget."""
    if isinstance(image, tuple):
        height, width = image
        if not 0 < math.prod(image) <= MOST_PIXELS:
            raise ImageError(f"an image of {height}x{width} px cannot be processed", "give a smaller size")
        picture = Image.new("RGB", (width, height))
    else:
        picture = load_image(image)
    model, generation = bundle.manifest.model, bundle.generation()
    template = ChatTemplate.load(bundle.path, generation) if CHAT_TEMPLATE in bundle.manifest.files else None
    processor = Processor(
        model,
        Tokenizer.load(bundle.path, generation),
        template,
        stage_tokens=StageTokens.load(bundle.path, model.image),
    )
    prompt = processor.process("", [picture], budget=budget)
    assert model.image is not None
    assert prompt.pixel_values is not None
    return ImageCost(
        height=picture.height,
        width=picture.width,
        tiles=prompt.layouts[0].tiles,
        grid=(prompt.layouts[0].rows, prompt.layouts[0].cols),
        cells=model.image.patches is not None or model.image.whole,
        image_tokens=len(prompt.image_positions),
        prompt_tokens=len(prompt.token_ids),
        left=model.context_length - len(prompt.token_ids),
    )
