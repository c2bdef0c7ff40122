"""For griffe, which reads the docstrings: how this code base writes them, and what attrs makes of a class.

Arguments that are explained together ("args, kwargs: of the call") are explained each. A class of attrs gets the
`__init__` that it has when it runs, so that what its docstring says of arguments is checked and shown.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import (
    Attribute,
    Class,
    Expr,
    ExprCall,
    ExprKeyword,
    Extension,
    Function,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

TOGETHER = re.compile(r"^( *)(\w+(?:, \w+)+): ((?:.*\n?)(?:\1 +\S.*\n?|[ ]*\n(?=\1 +\S))*)", re.MULTILINE)
ARGUMENTS = re.compile(r"^( *)Args:\n(?:\1 +\S.*\n?|[ ]*\n(?=\1 +\S))+", re.MULTILINE)


class RivetQ(Extension):
    """See above."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Of the arguments in a docstring, one a name."""
        if obj.docstring is not None:
            obj.docstring.value = ARGUMENTS.sub(lambda found: TOGETHER.sub(_apart, found[0]), obj.docstring.value)

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """The `__init__` of a class of attrs."""
        if "__init__" in cls.members or not any(
            str(decorator.value).startswith(("attrs.frozen", "attrs.define")) for decorator in cls.decorators
        ):
            return
        by_name = any("kw_only=True" in str(decorator.value) for decorator in cls.decorators)
        kind = ParameterKind.keyword_only if by_name else ParameterKind.positional_or_keyword
        fields = [
            Parameter(name.lstrip("_"), annotation=field.annotation, kind=kind, default=_default(field.value))
            for name, field in cls.members.items()
            if isinstance(field, Attribute) and "instance-attribute" in field.labels and field.annotation is not None
        ]
        own = Parameter("self", kind=ParameterKind.positional_or_keyword)
        cls.set_member(
            "__init__", Function("__init__", parameters=Parameters(own, *fields), returns="None", parent=cls)
        )


def _apart(found: re.Match[str]) -> str:
    text = found[3] if found[3].endswith("\n") else found[3] + "\n"
    return "".join(f"{found[1]}{name}: {text}" for name in found[2].split(", "))


def _default(value: str | Expr | None) -> str | Expr | None:
    """What a field is without an argument, None if it needs one."""
    if not isinstance(value, ExprCall) or not str(value.function).endswith(("attrs.field", "_setting")):
        return value
    for argument in value.arguments:
        if isinstance(argument, ExprKeyword) and argument.name == "default":
            return argument.value
        if isinstance(argument, ExprKeyword) and argument.name == "factory":
            return f"{argument.value}()"
    return value.arguments[0] if str(value.function) == "_setting" else None
