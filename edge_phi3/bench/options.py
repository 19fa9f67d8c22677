"""Options of the command line that are the fields of a structure, so that each is described once."""

import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import rich_click as click

ONE_OR_MORE = click.IntRange(min=1)
ZERO_OR_MORE = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)
FILE = click.Path(path_type=Path)


class Option(NamedTuple):
    """How a field is given on the command line, by default as its name and type say; odd defaults stand in `help`."""

    help: str
    type: Any = None
    metavar: str | None = None
    flag: str | None = None
    envvar: str | None = None


def options_of(struct: type[msgspec.Struct]) -> Callable[[Any], Any]:
    """Return a decorator that gives a command an option for each field of `struct` that is annotated with `Option`."""

    def decorate(function: Any) -> Any:
        for field in reversed(msgspec.structs.fields(struct)):
            hint = hints[field.name]
            option = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)), None)
            if option is None:
                continue
            flag = option.flag or "--" + field.name.replace("_", "-")
            is_boolean = hint.__origin__ is bool
            is_many = typing.get_origin(hint.__origin__) is Sequence
            function = click.option(
                f"{flag}/--no-{flag[2:]}" if is_boolean and field.default else flag,
                field.name,
                type=option.type or (str if is_many else hint.__origin__),
                multiple=is_many,
                is_flag=is_boolean,
                default=field.default,
                show_default="[default:" not in option.help,
                metavar=option.metavar,
                envvar=option.envvar,
                help=option.help,
            )(function)
        return function

    hints = typing.get_type_hints(struct, include_extras=True)
    return decorate
