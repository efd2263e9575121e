"""`mllm-edge chat`: a conversation in the terminal."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.guiding import guide_of, guide_options
from mllm_edge.cli.options import (
    choices_option,
    context_cut,
    runtime_options,
    sampling_options,
    speculation_option,
    video_options,
    videos_of,
    without_effect,
)
from mllm_edge.cli.output import note, write_answer, write_shares
from mllm_edge.errors import CancelledError, ContextError, MllmEdgeError

if TYPE_CHECKING:
    from mllm_edge.runtime.conversation import Conversation, WhenFull
    from mllm_edge.runtime.machine.threads import Spin
    from mllm_edge.runtime.stopping import Cancel
    from mllm_edge.runtime.vlm import VLM, Result

__all__ = ["command"]

_HELP = """/image FILE  attach an image to the next message; several are allowed
/video FILE  attach a video, of whose frames --fps and --frames say which
/reset       forget the conversation
/save FILE   write the conversation as JSON messages
/load FILE   go on with a saved conversation
/help        this
/quit        leave (or Ctrl-D); Ctrl-C stops an answer"""


@click.command("chat", short_help="Talk with a bundle about images and videos.")
@click.argument("bundle", type=click.Path())
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@video_options
@click.option(
    "--when-full",
    type=click.Choice(["error", "drop-oldest"]),
    default="error",
    show_default=True,
    help="Whether the oldest turns go when the context is full.",
)
@choices_option
@sampling_options
@guide_options
@speculation_option
@runtime_options
@click.option("--quiet", is_flag=True, help="No rates on standard error.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: str,
    videos: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    system: str | None,
    when_full: str,
    scored: tuple[str, ...],
    threads: int | None,
    spin: "Spin",
    affinity: str | None,
    max_context: int | None,
    max_image_tokens: int | None,
    min_image_tokens: int | None,
    fast_jpeg: bool,
    backend: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk with the model in BUNDLE, one message a line; /help lists the commands.

    Answers go to standard output, everything else to standard error. Ctrl-C stops an answer and keeps the
    conversation, Ctrl-D leaves. Without a terminal, lines are read from standard input, and the exit code is 1 when one
    of them failed. With --choices the answer to each message is the likeliest of these: all stand behind their shares,
    the likeliest first.
    """
    from mllm_edge.runtime.conversation import Conversation
    from mllm_edge.runtime.vlm import VLM

    setting: dict[str, Any] = {"threads": threads, "spin": spin, "affinity": affinity, "max_context": max_context}
    setting |= {"fast_jpeg": fast_jpeg, "max_image_tokens": max_image_tokens, "min_image_tokens": min_image_tokens}
    guide_of(options, scored)  # one at most
    unused = without_effect(options)
    if unused:
        note(unused)
    with VLM.load(bundle, backend=backend, notice=note, **setting) as vlm:
        if context_cut(vlm, max_context):
            note(context_cut(vlm, max_context))
        policy: WhenFull = "drop_oldest" if when_full == "drop-oldest" else "error"
        chat = _Chat(vlm, Conversation(vlm, system, policy), quiet, options, (fps, frames), scored)
        for video in videos:
            chat.attach_video(video)
        for line in _lines():
            if not chat.take(line):
                break
        chat.finish()
    if chat.failed and not sys.stdin.isatty():
        ctx.exit(1)


class _Chat:
    """One conversation with its commands and counts."""

    def __init__(
        self,
        vlm: "VLM",
        conversation: "Conversation",
        quiet: bool,
        options: dict[str, Any],
        sampled: tuple[float | None, int | None] = (None, None),
        choices: Sequence[str] = (),
    ):
        self._vlm, self._conversation = vlm, conversation
        self._quiet, self._options, self._sampled, self._choices = quiet, options, sampled, choices
        self._answers = self._tokens = self._steps = 0
        self._seconds = 0.0
        self.failed = False

    def take(self, line: str) -> bool:
        """Obey or answer one line; False when the user leaves. Errors are told, and nothing is lost."""
        text = line.strip()
        if text == "/quit":
            return False
        try:
            if text.startswith("/"):
                self._obey(text)
            elif text and self._choices:
                self._choose(text)
            elif text:
                self._answer(text)
        except (MllmEdgeError, OSError) as e:
            self._tell(e)
        except ValueError as e:  # an option out of range
            raise click.UsageError(str(e)) from e
        return True

    def attach_video(self, path: str) -> None:
        """For the next message; raises MllmEdgeError for a model that takes none."""
        self._vlm.processor.require(["video"])
        self._conversation.attach(videos_of([path], *self._sampled)[0])
        self._waiting()

    def finish(self) -> None:
        """The last line: how fast the answers were."""
        if not self._quiet:
            rate = f", {self._steps / self._seconds:.1f} tok/s" if self._seconds else ""
            note(f"{self._answers} answers, {self._tokens} tokens{rate}")

    def _obey(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        conversation, path = self._conversation, _path(argument)
        if name in ("/image", "/video", "/save", "/load") and not path:
            raise MllmEdgeError(f"{name} needs a file", f"{name} FILE")
        if name == "/image":
            conversation.attach(path)
            self._waiting()
        elif name == "/video":
            self.attach_video(path)
        elif name == "/save":
            conversation.save(path)
            note(f"saved to {path}")
        elif name == "/load":
            conversation.load(path)
            note(f"{len(conversation.messages())} messages loaded")
        elif name == "/reset":
            conversation.reset()
            note("the conversation is forgotten")
        elif name == "/help":
            note(_HELP)
        else:
            raise MllmEdgeError(f"no command {name}", "/help lists them")

    def _waiting(self) -> None:
        count, kinds = self._conversation.waiting, self._conversation.waiting_kinds
        what = "image" if kinds == {"image"} else "video" if kinds == {"video"} else "picture"
        note(f"{count} {what}{'s' * (count > 1)} with the next message")

    def _answer(self, text: str) -> None:
        result = None
        with _stoppable() as stopped:
            chunks = self._conversation.ask(text, **self._options)
            for chunk in chunks:
                write_answer(chunk.text)
                result = chunk.result
                if stopped:
                    chunks.close()  # type: ignore[attr-defined]
                    break
        write_answer("\n")
        if result is not None:
            self._count(result)
        elif stopped:
            note("stopped; the answer so far is kept")

    def _choose(self, text: str) -> None:
        from mllm_edge.runtime.stopping import Cancel

        cancel, turns = Cancel(), self._conversation.turns
        try:
            with _stoppable(cancel):
                scores = self._conversation.score_answers(text, answers=self._choices, keep=True, cancel=cancel)
        except CancelledError:
            note("stopped; the question is forgotten")
            return
        write_shares(scores)
        self._answers += 1
        self._dropped(turns + 1 - self._conversation.turns)

    def _dropped(self, turns: int) -> None:
        if turns:
            note(
                f"the context was full: the {'oldest turn is' if turns == 1 else f'{turns} oldest turns are'} forgotten"
            )

    def _count(self, result: "Result") -> None:
        m = result.metrics
        self._answers, self._tokens = self._answers + 1, self._tokens + m.new_tokens
        self._steps, self._seconds = self._steps + len(m.token_seconds), self._seconds + sum(m.token_seconds)
        used = m.prompt_tokens + m.new_tokens
        self._dropped(result.dropped_turns)
        if result.finish_reason == "length":
            full = used >= self._vlm.context_length
            note("cut short: the context is full; /reset begins anew" if full else "cut short by --max-new-tokens")
        if not self._quiet and sys.stdin.isatty():
            note(f"({m.tokens_per_second:.1f} tok/s, {used} of {self._vlm.context_length} tokens)")

    def _tell(self, error: MllmEdgeError | OSError) -> None:
        self.failed = True
        if isinstance(error, MllmEdgeError):
            note(f"error: {error.message}")
            more = "/reset, --when-full drop-oldest, or a shorter message; "
            fix = more + error.fix if isinstance(error, ContextError) else error.fix
            note(f"  fix: {fix}")
        else:
            note(f"error: {error.filename}: {error.strerror}")


def _path(argument: str) -> str:
    """A file name, with or without quotes."""
    try:
        words = shlex.split(argument)
    except ValueError:
        words = []
    return words[0] if len(words) == 1 else argument.strip()


def _lines() -> Iterator[str]:
    """What the user types until the end of input; Ctrl-C at a terminal's prompt only begins a new line."""
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # not on Windows; elsewhere input() then has a history
        import readline  # noqa: F401
    note("/help lists the commands")
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                click.echo("> ", err=True, nl=False)
                line = sys.stdin.readline()
                if not line:
                    return
                yield line
        except EOFError:
            note()
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves")


@contextmanager
def _stoppable(cancel: "Cancel | None" = None) -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes true, which ends calls with `cancel`; a second one raises KeyboardInterrupt.

    The answer ends between two tokens: an exception inside the engine could leave half-bound buffers behind.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if cancel is not None:  # takes a lock, which this thread may hold
            Thread(target=cancel.cancel).start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
