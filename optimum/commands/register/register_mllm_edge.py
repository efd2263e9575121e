"""`optimum-cli export mllm-edge`: the verb `mllm-edge export` under Optimum's command line.

A portion of Optimum's namespace package, which is why no folder above holds an `__init__.py`. Optimum imports it at
every start, so it imports nothing heavy.
"""

import inspect
from argparse import ArgumentParser, Namespace
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from mllm_edge.cli.export import command

__all__ = ["REGISTER_COMMANDS", "MllmEdgeExportCommand"]


class MllmEdgeExportCommand(BaseOptimumCLICommand):
    """Arguments, help and behaviour are those of `mllm-edge export`."""

    COMMAND = CommandInfo(name="mllm-edge", help=command.short_help or "")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """One argument for each parameter of the verb."""
        parser.description = _escaped(inspect.cleandoc(command.help or ""))
        for parameter in command.params:
            _add(parser, parameter)

    def run(self) -> None:
        """Call the verb; it ends the process when it fails."""
        from mllm_edge.cli import main

        main(["export", *_words(self.args)], prog_name="mllm-edge", standalone_mode=True)


def _add(parser: ArgumentParser, parameter: click.Parameter) -> None:
    if isinstance(parameter, click.Argument):
        parser.add_argument(parameter.name or "", metavar=parameter.human_readable_name)
        return
    assert isinstance(parameter, click.Option)
    settings: dict[str, Any] = {"dest": parameter.name, "help": _help(parameter)}
    if parameter.is_flag:
        settings["action"] = "store_true"
    else:
        settings["action"] = "append" if parameter.multiple else "store"
        if isinstance(parameter.type, click.Choice):
            settings["choices"] = list(parameter.type.choices)
        else:
            settings["metavar"] = (parameter.metavar or parameter.type.name).upper()
    parser.add_argument(*parameter.opts, **settings)


def _help(option: click.Option) -> str:
    text = option.help or ""
    if option.show_default:
        text += f" [default: {option.show_default if isinstance(option.show_default, str) else option.default}]"
    return _escaped(text)


def _escaped(text: str) -> str:
    """argparse fills in %-formats."""
    return text.replace("%", "%%")


def _words(args: Namespace) -> list[str]:
    """What was given, as the verb's own command line; what was not is left to the verb's defaults."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in command.params:
        value = getattr(args, parameter.name or "")
        if isinstance(parameter, click.Argument):
            arguments.append(value)
        elif value is True:
            options.append(parameter.opts[0])
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            options += [f"{parameter.opts[0]}={each}" for each in values]
    return [*options, "--", *arguments]


REGISTER_COMMANDS = [(MllmEdgeExportCommand, ExportCommand)]
