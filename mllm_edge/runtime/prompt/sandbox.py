"""Where a bundle's chat template is rendered: as transformers renders it, with no way into Python and with a bound on
its work.

Templates come from strangers. Jinja's sandbox keeps them from Python's insides; here they are also kept from looping or
growing without end: every pass through a loop, a macro or a call counts, and no text or list may become longer than any
prompt is.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

__all__ = ["Sandbox"]

_MOST_WORK = 1_000_000  # passes and calls; the longest templates of real models take some thousands
_LONGEST = 16 << 20  # characters of a text
_MOST = 1 << 20  # entries of a list
_LARGEST = 1 << 20  # numbers that a template may hand to a function, such as the width of a column
# Of a column in a format string, printf's or str.format's: six digits, or taken from the values.
_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\d{6,}|\*)|\{[^{}]*:[^{}]*(\d{6,}|\{)")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' template environment."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
        self._work = threading.local()
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """The template's text; raises SecurityError when it does more than any prompt takes."""
        self._work.done = 0
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            _check_length("", length)
        return "".join(pieces)

    # ------------------------------------------------------------ counted
    def tick(self) -> str:
        """One more pass through a loop, a macro or a call."""
        self._work.done = getattr(self._work, "done", 0) + 1
        if self._work.done > _MOST_WORK:
            raise SecurityError(f"the template takes more than {_MOST_WORK} steps")
        return ""

    def joined(self, *parts: Any) -> str:
        """What `~` gives."""
        return self._checked("".join(str(part) for part in parts))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:  # the two above
            return __obj(*args)
        __self.tick()
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            _check_widths(getattr(__obj, "__self__", None))
        _check_numbers(args, kwargs)
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > _LARGEST or abs(right) > 64):
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "%":
            _check_widths(left)
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(times, int):
                    _check_length(text, len(text) * times)
        return self._checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose numbers and result are of a size that prompts have."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if function is jinja2.filters.do_format:
                _check_widths(args[0])
            _check_numbers(args, kwargs)
            return self._checked(function(*args, **kwargs))

        # What the filter is handed first: the context, the environment.
        guarded.__dict__.update(getattr(function, "__dict__", {}))
        return guarded

    def _checked(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple, dict)):
            _check_length(value, len(value))
        return value


def _check_length(value: Any, length: int) -> None:
    if length > (_LONGEST if isinstance(value, str) else _MOST):
        raise SecurityError(f"the template makes a text or a list of {length} entries")


class _Counted(NodeTransformer):
    """Puts a tick into every loop and macro, and `joined` in the place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call("joined", node.nodes, node.lineno)

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def _call(self, name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=line)
        return nodes.Call(function, args, [], None, None, lineno=line)


def _check_widths(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise SecurityError(f"the width in {text!r:.40} is too large")


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise SecurityError(f"{value} is too large a number for a prompt")


# ---------------------------------------------------------------- what templates may use
class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only prints it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without underscore names: templates come from strangers, and those reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _forbid_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _forbid_underscore(name)
        super().__setitem__(name, value)


def _forbid_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)` of a template, and nothing else of Python's type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
