"""`mllm-edge inspect --plan`: what a call will take, without opening the model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mllm_edge.cli.output import bytes_text, table

if TYPE_CHECKING:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.planning.plan import Plan, PlannedImage
    from mllm_edge.runtime.prompt.sources import VideoFile
    from mllm_edge.runtime.prompt.token_budget import TokenBudget

__all__ = ["plan_as_dict", "plan_of", "plan_text"]

_SIZE = (1080, 1920)  # of a picture, where nothing is said
_PROMPT = "Describe the image."


def plan_of(
    bundle: "Bundle",
    context: int | None,
    images: int | None,
    size: tuple[int, int] | None,
    budget: "TokenBudget",
    videos: "Sequence[VideoFile | tuple[float, ...]]" = (),
) -> "Plan":
    """Of a short question about so many images (one, where the model takes any and there are no videos) of that
    (height, width), and `videos`, files or sizes as of `Processor.count_tokens`; `context`: tokens of prompt and answer
    together. Raises ContextError for more than the model has, PromptError for a model without videos, ImageError."""
    from mllm_edge.errors import ContextError
    from mllm_edge.runtime.options import MAX_NEW_TOKENS
    from mllm_edge.runtime.planning.plan import open_planner, size_of
    from mllm_edge.runtime.prompt.sources import VideoFile

    model, answer = bundle.manifest.model, bundle.generation().defaults.max_new_tokens or MAX_NEW_TOKENS
    longest = model.context_length
    if context is not None and context > longest:
        raise ContextError(
            f"{context} tokens are more than the model's context of {longest}", f"--context {longest} or less"
        )
    count = (1 if model.image is not None and not videos else 0) if images is None else images
    target = "cpu" if any(v.target == "cpu" for v in bundle.manifest.components["decoder"].variants) else ""
    planner = open_planner(bundle, target or bundle.manifest.components["decoder"].variants[0].target)
    planner.require(["video" for _ in videos])
    own = model.image.video.sampling if model.image is not None and model.image.video is not None else None
    shown = [size_of(video, own) if isinstance(video, VideoFile) else video for video in videos]
    sizes, files = [*[size or _SIZE] * count, *shown], range(count, count + len(shown))
    bounds, new = [budget] * len(sizes), context or answer
    return planner.plan(_PROMPT, sizes, bounds, new, context or longest, files=files)


def plan_as_dict(plan: "Plan") -> dict[str, Any]:
    """As JSON."""
    from mllm_edge.json_form import to_json

    found: dict[str, Any] = to_json(plan)
    return {**found, "fits": plan.fits, "memory": {**found["memory"], "peak": plan.memory.peak}}


def plan_text(plan: "Plan") -> str:
    """As people read it."""
    m = plan.memory
    tokens = [
        ["prompt tokens", str(plan.prompt_tokens)],
        ["of these for images", str(plan.image_tokens)],
        ["context", str(plan.context_length)],
        ["left behind the prompt", str(plan.room)],
        ["of an answer", str(plan.max_new_tokens)],
    ]
    rows = [
        ["process and libraries", bytes_text(m.base)],
        ["weights", bytes_text(m.weights)],
        ["pictures", bytes_text(m.images)],
        ["before the decoder", bytes_text(m.vision)],
        ["decoder", bytes_text(m.prefill)],
        ["KV cache, what is written", bytes_text(m.kv_cache)],
        ["peak", bytes_text(m.peak)],
    ]
    opened = f"opening the bundle takes {bytes_text(m.base + m.weights + m.opening)} for a moment"
    parts = [table(["plan", "tokens"], tokens), "\n".join(dict.fromkeys(map(_image, plan.images)))]
    return "\n\n".join(part for part in (*parts, table(["memory on the CPU", ""], rows) + f"\n{opened}") if part)


def _image(image: "PlannedImage") -> str:
    rows, cols = image.grid
    height, width = image.pixels
    if len(image.size) == 3:
        frames, high, wide = image.size
        what = f"{image.tiles} times {rows} x {cols} {'cells' if image.cells else 'tiles'}, {height} x {width} px"
        return f"a video of {frames} frames of {high} x {wide} px: {image.tokens} tokens, {what}"
    what = f"{rows} x {cols} cells" if image.cells and image.tiles == 1 else f"{image.tiles} tiles ({rows} x {cols})"
    changed = ", ".join(f"{name} {value}" for name, value in image.settings.items())
    size = " x ".join(str(side) for side in image.size)
    told = f"an image of {size} px: {image.tokens} tokens, {what}, {height} x {width} px"
    return told + (f"; {changed}" if changed else "")
