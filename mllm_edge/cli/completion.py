"""`mllm-edge completion`: the script that completes verbs and options in a shell."""

import click

from mllm_edge.cli.output import write_answer

__all__ = ["command"]

PROGRAM, VARIABLE = "mllm-edge", "_MLLM_EDGE_COMPLETE"


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes verbs and options in SHELL. The line to put into its start file:

    \b
    ~/.bashrc                   eval "$(mllm-edge completion bash)"
    ~/.zshrc                    eval "$(mllm-edge completion zsh)"
    ~/.config/fish/config.fish  mllm-edge completion fish | source
    """
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    write_answer(completion(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())
