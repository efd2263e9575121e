"""Options that several verbs have, alike in all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from mllm_edge.runtime.vlm import VLM

__all__ = [
    "TARGETS",
    "POSITIVE",
    "RecipeName",
    "calibration_options",
    "choices_option",
    "context_cut",
    "json_option",
    "runtime_options",
    "sampling_options",
    "speculation_option",
    "target_option",
    "video_options",
    "videos_of",
    "without_effect",
]

# Repeated here so that the help needs no export extra; a test compares them with the exporter's own.
TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-10.3")
POSITIVE = click.IntRange(min=1)
_COUNT = click.IntRange(min=0)
_MOST_GUESSED = 15  # as in runtime/decode/speculation.py
_FRACTION = click.FloatRange(0, 1)
_THREADS = click.IntRange(1, 1024)  # as in runtime/threads.py

_F = TypeVar("_F", bound=Callable[..., Any])

_SAMPLING = (
    click.option("-n", "--max-new-tokens", type=POSITIVE, help="Longest answer; default: the model's own, else 256."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=_COUNT, help="Sample from the k best; 0 is all; default: the model's own."),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus; 1 is all; default: the model's own."
    ),
    click.option("--min-p", type=_FRACTION, help="Least share of the best probability; default: the model's own."),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(0, min_open=True),
        help="Above 1: tokens of prompt and answer become less likely; default: the model's own.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken off a token's logit each time it stands in the answer.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken off once from the logit of each token in the answer.",
    ),
    click.option("--seed", type=_COUNT, help="Makes sampling repeatable."),
    click.option(
        "--stop",
        multiple=True,
        callback=lambda ctx, parameter, value: value or None,
        metavar="TEXT",
        help="End the answer before this text; repeatable.",
    ),
)
_RUNTIME = (
    click.option("--threads", type=_THREADS, help="Threads inside one operator; default: physical cores."),
    click.option(
        "--spin",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Whether threads wait awake: auto between two steps, on behind the last one as well, off never.",
    ),
    click.option("--affinity", metavar="CPUS", help="CPUs that the threads run on, such as 4-7."),
    click.option("--max-context", type=POSITIVE, help="Most tokens of prompt and answer together."),
    click.option("--max-image-tokens", type=POSITIVE, metavar="N", help="Show no image in more tokens."),
    click.option("--min-image-tokens", type=POSITIVE, metavar="N", help="Enlarge small images to so many tokens."),
    click.option("--fast-jpeg", is_flag=True, help="Decode large JPEGs at a smaller scale; pixels differ a little."),
    click.option("--backend", type=click.Choice(["auto", *TARGETS]), default="auto", show_default=True),
)


def sampling_options(command: _F) -> _F:
    """How tokens are chosen, by the names that `VLM.stream` has for them."""
    return _apply(_SAMPLING, command)


def runtime_options(command: _F) -> _F:
    """How a bundle is opened, by the names that `VLM.load` has for them."""
    return _apply(_RUNTIME, command)


def video_options(command: _F) -> _F:
    """Videos, and which of their frames are shown, for the verbs that make answers: `videos_of` takes these."""
    options = (
        click.option(
            "--video", "videos", multiple=True, metavar="FILE", help="A video (needs the extra 'video'); repeatable."
        ),
        click.option(
            "--fps",
            type=click.FloatRange(0, min_open=True),
            help="Frames a second to take of a video; default: as the model's own processor.",
        ),
        click.option(
            "--frames", type=POSITIVE, help="Frames to take of a video, evenly; with --fps no more than these."
        ),
    )
    return _apply(options, command)


def videos_of(files: Sequence[Any], fps: float | None, frames: int | None) -> list[Any]:
    """The videos of `--video`, as paths or bytes, with what `--fps` and `--frames` say."""
    from mllm_edge.runtime.prompt.sources import Video

    return [Video.open(file, fps=fps, frames=frames) for file in files]


def choices_option(command: _F) -> _F:
    """`--choices`, for the verbs that make answers, as `scored`."""
    return click.option(
        "--choices", "scored", multiple=True, metavar="TEXT", help="Tell how likely this answer is; repeatable."
    )(command)


def speculation_option(command: _F) -> _F:
    """`--speculation`, which the verbs have that make answers."""
    return click.option(
        "--speculation",
        type=click.IntRange(0, _MOST_GUESSED),
        default=0,
        show_default=True,
        help="Guess up to N tokens by prompt lookup and check them in one step; the answer stays the same.",
    )(command)


class RecipeName(click.ParamType):
    """A recipe's name, or a .toml file: what it means is decided where the exporter is; the names complete."""

    name = "recipe"

    def __init__(self, names: Sequence[str]):
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so."""
        return [CompletionItem(name) for name in self._names if name.startswith(incomplete)]


def calibration_options(without_data: str) -> Callable[[_F], _F]:
    """Calibration data and what the result must show; `without_data` says what happens without any."""
    options = (
        click.option(
            "--data",
            type=click.Path(),
            help=f"A folder of images, or a .jsonl file of questions, to calibrate with; without it {without_data}.",
        ),
        click.option(
            "--most-bits",
            type=float,
            metavar="BITS",
            help="Bits a weight of int4's decoder at most, scales included; default: 6.15.",
        ),
        click.option("--no-builtin-text", is_flag=True, help="Calibrate without the built-in questions."),
        click.option("--prompt", help="The question that goes with each image of a folder."),
        click.option("--skip-bad", is_flag=True, help="Leave out samples whose image cannot be read, and list them."),
        click.option("--held-back", type=POSITIVE, help="Samples kept for the proof; default: a quarter, to 32."),
        click.option(
            "--max-kl",
            type=click.FloatRange(min=0),
            metavar="NATS",
            help="Fail when quantization's mean KL divergence is larger; default: 0.5.",
        ),
        click.option("--allow-loss", is_flag=True, help="Write the bundle whatever quantization costs."),
        click.option("--min-agreement", type=_FRACTION, help="Fail when fewer likeliest tokens stay the same."),
    )
    return lambda command: _apply(options, command)


def target_option(help: str) -> Callable[[_F], _F]:
    """`--target`, which the verbs have that write graphs."""
    return click.option(
        "--target",
        "targets",
        type=click.Choice(TARGETS),
        multiple=True,
        default=("cpu",),
        show_default="cpu",
        help=help,
    )


def json_option(help: str) -> Callable[[_F], _F]:
    """`--json`, which every verb that reports something has."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def without_effect(options: Mapping[str, Any]) -> str:
    """The line that says which sampling options do nothing for want of a temperature; empty when none is given."""
    given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
    names = [f"--{name.replace('_', '-')}" for name, plain in given.items() if options[name] not in (None, plain)]
    if options["temperature"] or not names:
        return ""
    return f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} nothing at --temperature 0, which is greedy"


def context_cut(vlm: "VLM", wanted: int | None) -> str:
    """The line that says that --max-context is more than there is; empty when it is not."""
    if wanted is None or wanted <= vlm.context_length:
        return ""
    return f"--max-context {wanted} is more than this bundle holds: {vlm.context_length} tokens"


def _apply(options: tuple[Callable[[_F], _F], ...], command: _F) -> _F:
    for option in reversed(options):
        command = option(command)
    return command
