"""`mllm-edge run`: an answer, streamed."""

import sys
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.guiding import guide_of, guide_options
from mllm_edge.cli.options import (
    choices_option,
    context_cut,
    json_option,
    runtime_options,
    sampling_options,
    speculation_option,
    video_options,
    videos_of,
    without_effect,
)
from mllm_edge.cli.output import milliseconds, note, print_json, write_answer, write_shares

if TYPE_CHECKING:
    from mllm_edge.runtime.machine.threads import Spin
    from mllm_edge.runtime.vlm import VLM, Result

__all__ = ["command"]


@click.command("run", short_help="Ask a bundle a question about images and videos.")
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("--image", "images", multiple=True, metavar="FILE", help="An image, '-' for standard input; repeatable.")
@video_options
@click.option("--system", metavar="TEXT", help="A system message before the question.")
@choices_option
@sampling_options
@guide_options
@speculation_option
@click.option("--raw", is_flag=True, help="PROMPT is rendered already, with one image placeholder per image.")
@runtime_options
@click.option("--verify", is_flag=True, help="Compare every file of the bundle with its SHA-256 first.")
@click.option("--quiet", is_flag=True, help="No latencies on standard error.")
@json_option("Print answer, token ids and metrics as JSON.")
def command(
    bundle: str,
    prompt: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    system: str | None,
    scored: tuple[str, ...],
    raw: bool,
    threads: int | None,
    spin: "Spin",
    affinity: str | None,
    max_context: int | None,
    max_image_tokens: int | None,
    min_image_tokens: int | None,
    fast_jpeg: bool,
    backend: str,
    verify: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask the model in BUNDLE about PROMPT, the images and the videos; '-' reads PROMPT from standard input.

    The answer is streamed to standard output, latencies of every stage follow on standard error. With --choices nothing
    is made up: each of them stands behind its share of what all of them have, the likeliest first.
    """
    if raw and system is not None:
        raise click.UsageError("--system and --raw exclude each other: a raw prompt holds its system message itself")
    guide = guide_of(options, scored)
    if (fps or frames) and not videos:
        raise click.UsageError("--fps and --frames are of videos, and there is no --video")
    shown, text = _inputs((*images, *videos), prompt)
    messages = text if system is None else _conversation(system, text, len(images), len(videos))
    sources = [*shown[: len(images)], *videos_of(shown[len(images) :], fps, frames)]
    from mllm_edge.runtime.trace import Trace
    from mllm_edge.runtime.vlm import VLM

    setting: dict[str, Any] = {
        "threads": threads,
        "spin": spin,
        "affinity": affinity,
        "max_context": max_context,
        "fast_jpeg": fast_jpeg,
        "max_image_tokens": max_image_tokens,
        "min_image_tokens": min_image_tokens,
        "verify": verify,
    }
    unused, loading = without_effect(options), Trace()
    if unused:
        note(unused)
    with VLM.load(bundle, backend=backend, notice=note, trace=loading, **setting) as vlm:
        if context_cut(vlm, max_context):
            note(context_cut(vlm, max_context))
        if scored:
            _scores(vlm, messages, sources, scored, raw, as_json)
            return
        result = _answer(vlm, messages, sources, show=not as_json, raw=raw, **options)
    if guide and result.finish_reason == "length":
        note(f"cut short: not yet all of what {guide} asks for; raise --max-new-tokens")
    load = sum(span.seconds for span in loading.spans)
    if as_json:
        metrics = {**result.metrics.as_dict(), "load": load}
        about = {"token_ids": list(result.token_ids), "finish_reason": result.finish_reason}
        print_json({"text": result.text, **about, "metrics": metrics})
    elif not quiet:
        note(f"load {milliseconds(load)} ms\n{_latencies(result)}")


def _inputs(images: tuple[str, ...], prompt: str) -> tuple[list[str | bytes], str]:
    """Images and videos as paths or bytes, and the prompt's text; standard input can be one of them."""
    if [prompt, *images].count("-") > 1:
        raise click.UsageError("standard input can be read once: only one of PROMPT, --image and --video may be '-'")
    sources: list[str | bytes] = [_stdin() if image == "-" else image for image in images]
    return sources, _stdin_text() if prompt == "-" else prompt


def _stdin() -> bytes:
    if sys.stdin is None:
        raise click.UsageError("standard input is closed")
    return sys.stdin.buffer.read()


def _stdin_text() -> str:
    try:
        return _stdin().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise click.UsageError(f"the prompt on standard input is not UTF-8: {e}") from e


def _conversation(system: str, text: str, images: int, videos: int) -> list[dict[str, Any]]:
    shown = [{"type": "image"}] * images + [{"type": "video"}] * videos
    content = [*shown, {"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def _scores(vlm: "VLM", messages: Any, images: list[Any], choices: tuple[str, ...], raw: bool, as_json: bool) -> None:
    scores = vlm.score_answers(messages, images, answers=choices, raw=raw)
    if as_json:
        print_json({"choices": [{"answer": s.answer, "share": s.share, "logprob": s.logprob} for s in scores]})
        return
    write_shares(scores)


def _answer(vlm: "VLM", messages: Any, images: list[Any], show: bool, **options: Any) -> "Result":
    """Run, and write the pieces as they come when `show`."""
    result, begun = None, False
    for chunk in vlm.stream(messages, images, **options):
        if show:
            # A raw prompt's answer begins with the space that parts the two; a reader has no use for it.
            text = chunk.text if begun else chunk.text.lstrip()
            write_answer(text)
            begun = begun or bool(text)
        result = chunk.result
    if show:
        write_answer("\n")
    assert result is not None
    return result


def _latencies(result: "Result") -> str:
    """Two lines: what the first token took, and how fast the others came."""
    from mllm_edge.runtime.trace import STAGES

    m = result.metrics
    shown = [name for name in m.stages if name not in STAGES or name in ("preprocess", "prefill")]
    parts = {name.replace("_", " "): m.stages[name] for name in shown if m.stages[name]}
    parts["other"] = max(0.0, m.ttft - sum(parts.values()))
    first = " + ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts.items())
    images = f" ({m.image_tokens} of images)" if m.image_tokens else ""
    rate = f"TPOT {milliseconds(m.tpot)} ms = {m.tokens_per_second:.1f} tok/s, " if m.token_seconds else ""
    guesses = f"{m.accepted} of {m.guessed} guesses accepted, " if m.guessed else ""
    counts = f"{m.prompt_tokens} prompt tokens{images}, {m.new_tokens} new, ended by {result.finish_reason}"
    return f"TTFT {milliseconds(m.ttft)} ms = {first}\n{rate}{guesses}{counts}"
