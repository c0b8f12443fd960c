"""The canonical string form of a chosen activation: ``provider/name(key=value, learn=key, per_channel=true)``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError

Value = float | str
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_CALL = re.compile(r"\s*(?:(?P<provider>[A-Za-z_][\w.-]*)/)?(?P<name>[A-Za-z_]\w*)\s*(?P<arguments>\(.*\))?\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class ActivationSpec:
    """An activation as a config names it, not yet looked up.

    Attributes:
        name: the activation, e.g. ``swish``.
        provider: the plugin it must come from, or None for the preferred one.
        parameters: values that differ from the declaration's defaults, in the order they were written.
        learn: the parameters to learn; None leaves the choice to the declaration, ``()`` fixes all.
        per_channel: learned parameters have one value per channel instead of one per site.
    """

    name: str
    provider: str | None = None
    parameters: tuple[tuple[str, Value], ...] = ()
    learn: tuple[str, ...] | None = None
    per_channel: bool = False

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | ActivationSpec) -> ActivationSpec:
        """Read the string form, or the same as a mapping ``{name: ..., beta: 1.5}``.

        Raises:
            UserError: the text is not of that form.
        """
        if isinstance(value, ActivationSpec):
            return value
        if isinstance(value, str):
            return cls._parse_string(value)
        if isinstance(value, Mapping):
            entries = dict(value)
            name = entries.pop("name", None)
            if not isinstance(name, str):
                raise UserError(f"activation {dict(value)!r} has no name; write {{name: swish, beta: 1.5}}")
            head = cls._parse_string(name)
            if head.parameters or head.learn is not None:
                raise UserError(f"activation {name!r}: parameters stand in the mapping or in the string, not in both")
            return cls._build(head.provider, head.name, entries, repr(dict(value)))
        raise UserError(f"an activation is a string or a mapping, not {value!r}")

    @classmethod
    def _parse_string(cls, text: str) -> ActivationSpec:
        match = _CALL.match(text)
        if match is None:
            raise UserError(f"activation {text!r} is not of the form name, name(key=value) or provider/name(key=value)")
        entries: dict[str, Any] = {}
        if match["arguments"]:
            try:
                call = ast.parse("f" + match["arguments"].replace("\n", " "), mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise UserError(f"activation {text!r}: the part in parentheses is not a list of key=value") from error
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                raise UserError(f"activation {text!r}: every argument needs its name, as in name(key=value)")
            for keyword in call.keywords:
                if keyword.arg is None or keyword.arg in entries:
                    raise UserError(f"activation {text!r}: argument {keyword.arg!r} is given twice or has no name")
                entries[keyword.arg] = _literal(keyword.value, text)
        return cls._build(match["provider"], match["name"], entries, text)

    @classmethod
    def _build(cls, provider: str | None, name: str, entries: dict[str, Any], text: str) -> ActivationSpec:
        learn = entries.pop("learn", None)
        if isinstance(learn, str):
            learn = () if learn == "none" else (learn,)
        if learn is not None and not (isinstance(learn, list | tuple) and all(isinstance(n, str) for n in learn)):
            raise UserError(f"activation {text!r}: learn names parameters, as in learn=beta or learn=[alpha, beta]")
        per_channel = entries.pop("per_channel", False)
        if not isinstance(per_channel, bool):
            raise UserError(f"activation {text!r}: per_channel is true or false")
        parameters = []
        for key, entry in entries.items():
            if isinstance(entry, bool) or not isinstance(entry, int | float | str) or not _NAME.match(str(key)):
                raise UserError(f"activation {text!r}: {key}={entry!r} is neither a number nor a word")
            if isinstance(entry, str) and not _NAME.match(entry):
                raise UserError(f"activation {text!r}: {key}={entry!r} is neither a number nor a word")
            try:
                parameters.append((str(key), entry if isinstance(entry, str) else float(entry)))
            except OverflowError as error:
                raise UserError(f"activation {text!r}: {key} is too large for a number") from error
        return cls(name, provider, tuple(parameters), None if learn is None else tuple(learn), per_channel)

    def __str__(self) -> str:
        arguments = [f"{key}={_format(value)}" for key, value in self.parameters]
        if self.learn is not None:
            names = self.learn
            arguments.append("learn=" + (names[0] if len(names) == 1 else f"[{', '.join(names)}]" if names else "none"))
        if self.per_channel:
            arguments.append("per_channel=true")
        prefix = f"{self.provider}/" if self.provider else ""
        return f"{prefix}{self.name}" + (f"({', '.join(arguments)})" if arguments else "")


def _literal(node: ast.expr, text: str) -> Any:
    """The value of one argument: a number, a bare or quoted word, true/false, or a list of words."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "True": True, "False": False, "inf": float("inf")}.get(node.id, node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.Constant) and node.value is None:
        return "none"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand, text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, text) for item in node.elts]
    raise UserError(f"activation {text!r}: {ast.unparse(node)!r} is neither a number nor a word")


def _format(value: Value) -> str:
    if isinstance(value, str):
        return value
    return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
