"""`mllm-edge inspect`: what is in a bundle."""

import re
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import click

from mllm_edge.cli.inspect_plan import plan_as_dict, plan_of, plan_text
from mllm_edge.cli.options import POSITIVE, json_option, video_options, videos_of
from mllm_edge.cli.output import bytes_text, print_json, table, write_answer
from mllm_edge.cli.progress import stages
from mllm_edge.cli.proof import layers_table

if TYPE_CHECKING:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.budget import ImageCost, Memory
    from mllm_edge.runtime.planning.plan import Plan
    from mllm_edge.runtime.prompt.token_budget import TokenBudget
    from mllm_edge.spec import StateSpec, TensorSpec, Variant

__all__ = ["command"]

_FEW, _SOME = 3, 8  # numbers, patterns of layers, in a line


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """ "480x640" as (height, width) in px."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size like 480x640, height first")
    return int(match[1]), int(match[2])


@click.command("inspect", short_help="Show what is in a bundle.")
@click.argument("bundle", type=click.Path())
@click.option("--verify", is_flag=True, help="Compare every file, engines too, with its SHA-256.")
@click.option("--context", type=POSITIVE, metavar="N", help="Tell the memory needed for N tokens.")
@click.option("--image", metavar="FILE", help="Tell the tiles and tokens of an image.")
@click.option("--image-size", metavar="HxW", callback=_size, help="The same for any image of H x W px.")
@click.option("--plan", is_flag=True, help="Tell tokens and peak memory of a call instead, without opening the model.")
@click.option("--images", type=click.IntRange(min=0), metavar="K", help="Of the plan; default: one, 1080x1920 px.")
@video_options
@click.option("--video-size", metavar="HxW", callback=_size, help="In place of a video: its frames' size in px.")
@click.option("--max-image-tokens", type=POSITIVE, metavar="N", help="Show no image in more tokens.")
@click.option("--min-image-tokens", type=POSITIVE, metavar="N", help="Enlarge small images to so many tokens.")
@json_option("Print the manifest, or the plan, as JSON.")
def command(
    bundle: str,
    verify: bool,
    context: int | None,
    image: str | None,
    image_size: tuple[int, int] | None,
    plan: bool,
    images: int | None,
    videos: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    video_size: tuple[int, int] | None,
    max_image_tokens: int | None,
    min_image_tokens: int | None,
    as_json: bool,
) -> None:
    """Show the model, graphs, files and measurements of BUNDLE; nothing is run.

    With --plan, what a short question about K images, or about videos, takes: tokens, room in the context, and the peak
    memory of a process that answers it on the CPU; --context is then of prompt and answer together. Of a video file one
    frame is decoded, of --video-size nothing: --frames says how many it has.
    """
    from mllm_edge.bundle import Bundle
    from mllm_edge.json_form import to_json
    from mllm_edge.runtime.prompt.token_budget import budget_of

    if image and image_size:
        raise click.UsageError("--image and --image-size exclude each other")
    if images is not None and not plan:
        raise click.UsageError("--images is of a --plan")
    if plan and image:
        raise click.UsageError("--plan wants --image-size, not --image")
    shown = _videos(plan, videos, fps, frames, video_size)

    opened = Bundle.load(bundle)
    if verify:
        _verify(opened)
    budget = budget_of(max_image_tokens, min_image_tokens)
    if plan:
        _write_plan(plan_of(opened, context, images, image_size, budget, shown), opened, as_json)
        return
    needs, costs = _needs(opened, context), _costs(opened, image or image_size, budget)
    if as_json:
        facts = {"path": str(opened.path), "nbytes": opened.nbytes, "verified": verify}
        facts |= {"memory": [{**to_json(m), "resident": m.resident} for m in needs]} if needs else {}
        facts |= {"image": to_json(costs)} if costs else {}
        print_json({**facts, "manifest": to_json(opened.manifest)})
    else:
        sections = [_shown(part, opened) for part in (_model, _components, _recipe, _parity, _accuracy, _provenance)]
        sections.append(_files(opened))
        sections += [*map(_memory, needs), _cost(costs) if costs else ""]
        sections.append("every file is as it was exported" if verify else _checked(opened))
        write_answer("\n\n".join(section for section in sections if section) + "\n")


def _videos(
    plan: bool,
    files: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    size: tuple[int, int] | None,
) -> list[Any]:
    """The videos of a plan: files, or one as its frames, height, width and perhaps frames a second."""
    if (files or size) and not plan:
        raise click.UsageError("--video and --video-size are of a --plan")
    if files and size:
        raise click.UsageError("--video and --video-size exclude each other")
    if (fps or frames) and not (files or size):
        raise click.UsageError("--fps and --frames are of videos, and there is no --video")
    if size is None:
        return videos_of(files, fps, frames)
    if frames is None:
        raise click.UsageError("--video-size wants --frames: how many there are")
    return [(frames, *size) if fps is None else (frames, *size, fps)]


def _verify(bundle: "Bundle") -> None:
    from mllm_edge.errors import BundleError
    from mllm_edge.runtime.backends.engine_facts import damaged_engines, stored_engines

    with stages() as progress:
        progress.stage("verifying", bundle.nbytes + sum(path.stat().st_size for path in stored_engines(bundle.path)))
        bundle.verify(progress.advance)
        for path in damaged_engines(bundle.path, progress.advance):
            fix = f"rm {shlex.quote(str(path))}; `mllm-edge build` or the next run makes it anew"
            raise BundleError(f"{path}: the engine differs from what was built", fix)


def _shown(part: "Callable[[Bundle], str]", bundle: "Bundle") -> str:
    """A part of the report. What was measured and where it came from is of no fixed form, and nothing depends on it."""
    try:
        return part(bundle)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        return f"{part.__name__.lstrip('_')}: what the manifest says is not understood ({e})"


def _needs(bundle: "Bundle", context: int | None) -> "list[Memory]":
    from mllm_edge.runtime.budget import memory

    return memory(bundle, context) if context else []


def _costs(bundle: "Bundle", image: "str | tuple[int, int] | None", budget: "TokenBudget") -> "ImageCost | None":
    from mllm_edge.runtime.budget import image_cost

    return image_cost(bundle, image, budget) if image else None


def _write_plan(plan: "Plan", bundle: "Bundle", as_json: bool) -> None:
    if as_json:
        print_json({"path": str(bundle.path), "plan": plan_as_dict(plan)})
    else:
        write_answer(plan_text(plan) + "\n")


def _memory(needs: "Memory") -> str:
    rows = [[name, bytes_text(nbytes)] for name, nbytes in needs.weights.items()]
    rows += [["KV cache", bytes_text(needs.kv_cache)]]
    rows += [["keys and values of an image", bytes_text(needs.cross_kv)]] if needs.cross_kv else []
    rows += [["resident", bytes_text(needs.resident)]]
    rows += [["embeddings, read from disk", bytes_text(needs.mapped)]]
    return table([f"memory for {needs.context} tokens ({needs.target})", ""], rows)


def _cost(cost: "ImageCost") -> str:
    return (
        f"an image of {cost.height} x {cost.width} px: {_tiles(cost)}, {cost.image_tokens} image tokens, "
        f"{cost.prompt_tokens} with markers and template; {cost.left} tokens of the context are left"
    )


def _tiles(cost: "ImageCost") -> str:
    rows, cols = cost.grid
    if cost.tiles == 1:
        return f"{rows} x {cols} cells" if cost.cells else "1 tile"
    whole = " and the whole" if cost.tiles > rows * cols else ""
    return f"{cost.tiles} tiles ({rows} x {cols}{whole})"


def _model(bundle: "Bundle") -> str:
    model = bundle.manifest.model
    facts = {
        "bundle": f"{bundle.path}, {bytes_text(bundle.nbytes)}",
        "model": f"{model.model_type} (family {model.family}), {model.parameters / 1e6:.1f} M parameters",
        "text": f"hidden size {model.hidden_size}, vocabulary {model.vocab_size}, context {model.context_length}",
        "state": ", ".join(map(_state, model.state)),
        "image": _image(bundle),
    }
    return _facts(facts)


def _state(spec: "StateSpec") -> str:
    layers, sizes = len(spec.layers), " x ".join(map(str, spec.shape))
    what = f"{spec.shape[0]} heads x {spec.shape[1]}, keys and values" if spec.kind == "growing" else sizes
    return f"{layers} layer{'s' if layers > 1 else ''} x {what} ({spec.kind})"


def _image(bundle: "Bundle") -> str:
    image = bundle.manifest.model.image
    if image is None:
        return "takes none"
    steps = ", ".join(transform.op for transform in image.transforms)
    tiles = "any number of cells" if image.whole or image.patches is not None else "tiles"
    tokens = f"{image.features} {'token' if image.into == 'tokens' else 'feature'}{'s' if image.features > 1 else ''}"
    return f"{tiles} of {image.height} x {image.width} px, {tokens} each ({steps})"


def _facts(facts: dict[str, str]) -> str:
    return "\n".join(f"{name:<11}{value}" for name, value in facts.items())


def _components(bundle: "Bundle") -> str:
    parts = []
    for name, component in bundle.manifest.components.items():
        parts += [_variant(bundle, name, variant) for variant in component.variants]
    return "\n\n".join(parts)


def _variant(bundle: "Bundle", component: str, variant: "Variant") -> str:
    sizes = {f: e.nbytes for f, e in bundle.manifest.files.items() if f in (variant.file, f"{variant.file}.data")}
    files = " + ".join(f"{name} {bytes_text(nbytes)}" for name, nbytes in sizes.items())
    needs = ", ".join(f"{name} >= {version}" for name, version in variant.minimum.items())
    kind = f"{variant.target}, {variant.dialect}, {variant.precision}"
    cache = f", cache {variant.kv_mode}" if variant.kv_mode else ""
    lines = [f"{component}: {kind}{cache}{f', needs {needs}' if needs else ''}", f"  {files}"]
    lines += [f"  {arrow} {tensor}" for arrow, tensor in _tensors(variant)]
    return "\n".join(lines)


def _tensors(variant: "Variant") -> list[tuple[str, str]]:
    """Inputs and outputs as text; the many tensors of each kind of state as one line each way."""
    from mllm_edge.spec import StateKind, is_state

    lines = []
    for arrow, tensors in (("in ", variant.inputs), ("out", variant.outputs)):
        lines += [(arrow, _tensor(t.name, t)) for t in tensors if not is_state(t.name)]
        for kind in get_args(StateKind):
            held = [t for t in tensors if is_state(t.name, kind)]
            if held:
                lines.append((arrow, _tensor(f"{held[0].name} … {held[-1].name} ({len(held)})", held[0])))
    return lines


def _tensor(name: str, tensor: "TensorSpec") -> str:
    return f"{name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _recipe(bundle: "Bundle") -> str:
    """The recipe's name, and which layers have another precision than it says for their part."""
    recipe, others = bundle.manifest.recipe, dict[str, list[str]]()
    for rule in recipe.get("rules", ()):
        precision = rule["precision"]
        kind = precision["kind"]
        if kind == "blocks":
            kind = f"{precision['bits']}-bit blocks of {precision['largest_block']}"
        others.setdefault(kind, []).append(f"{rule['component']}: {rule['layers']}")
    lines = [f"  {kind}: {_first_and_last(_in_ranges(names))}" for kind, names in others.items()]
    return "\n".join([f"recipe     {recipe.get('name', '')}", *lines])


def _in_ranges(names: list[str]) -> list[str]:
    """Names that differ in one number, which are in a row: `layers.0-29.v_proj`."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = (*re.split(r"\.(\d+)\.", name, maxsplit=1), "", "")[:3]
        found.setdefault((before, after), []).append(int(number) if number else -1)
    return [text for (before, after), numbers in found.items() for text in _runs(before, sorted(numbers), after)]


def _runs(before: str, numbers: list[int], after: str) -> list[str]:
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    runs = [(numbers[i], numbers[j - 1]) for i, j in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return [before if a < 0 else f"{before}.{a if a == b else f'{a}-{b}'}.{after}" for a, b in runs]


def _first_and_last(names: list[str]) -> str:
    if len(names) <= _SOME:
        return ", ".join(names)
    return f"{', '.join(names[: _SOME - 1])} … {names[-1]} ({len(names)})"


def _parity(bundle: "Bundle") -> str:
    """The tables of errors against the source model, one for each target, whatever of it the manifest has."""
    parity = bundle.manifest.parity
    if not parity:
        return "parity     not measured"
    floats = [_target_parity(parity["float32"], " in float32")] if "float32" in parity else []
    return "\n\n".join([*floats, *map(_target_parity, [parity, *parity.get("targets", {}).values()])])


def _target_parity(parity: Mapping[str, Any], form: str = "") -> str:
    limits = parity.get("limits", {})
    rows = [[name, _number(error), _number(limits.get(name))] for name, error in parity.get("errors", {}).items()]
    title = f"parity of {parity.get('target', 'cpu')}{form} ({parity.get('scope', '')})"
    text = table([title, "error", "limit"], rows)
    agreement = parity.get("greedy_agreement")
    if agreement is not None:
        text += f"\ngreedy tokens agree: {agreement:.1%} of {parity.get('greedy_tokens', '')}"
    return text


def _accuracy(bundle: "Bundle") -> str:
    """The loss in words, what the proof measured, and the worst layers; all of it is in --json."""
    from mllm_edge.loss import NOT_MEASURED, words

    accuracy = bundle.manifest.accuracy
    told = ("loss", NOT_MEASURED, "question", "answer_before", "answer_after", "layers", "components")
    shown = {name: _fact(value) for name, value in accuracy.items() if name not in told}
    rows = [
        [f"{name}: SQNR, cosine", f"{found['sqnr']:.1f} dB, {found['cosine']:.5f}"]
        for name, found in accuracy.get("components", {}).items()
    ]
    rows += [[name, text] for name, text in shown.items() if text]
    parts = [words(accuracy), table(["accuracy", ""], rows) if rows else "", layers_table(accuracy.get("layers", {}))]
    return "\n\n".join(filter(None, parts))


def _fact(value: Any) -> str:
    """A measured value; empty for what is no number and for more numbers than a line holds."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) > _FEW or not all(isinstance(v, (int, float)) for v in values):
        return ""
    return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def _provenance(bundle: "Bundle") -> str:
    provenance = bundle.manifest.provenance
    tools = ", ".join(f"{name} {version}" for name, version in provenance.get("tools", {}).items())
    revision = f" at {provenance['revision']}" if provenance.get("revision") else ""
    facts = _facts({"source": f"{provenance.get('source', '')}{revision}", "made with": tools})
    return "\n".join([facts, *(f"note: {text}" for text in provenance.get("notices", []))])


def _files(bundle: "Bundle") -> str:
    rows = [[name, bytes_text(e.nbytes), e.sha256[:12]] for name, e in sorted(bundle.manifest.files.items())]
    return table(["file", "size", "sha256"], rows)


def _checked(bundle: "Bundle") -> str:
    """Which damage a load would notice."""
    if all(entry.xxh3 for entry in bundle.manifest.files.values()):
        return "damage is noticed when a file is read (XXH3); --verify compares every file with its SHA-256"
    return "made without checksums for loading: a changed byte is only noticed by --verify"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"
