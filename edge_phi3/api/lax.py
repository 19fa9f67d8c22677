"""Values as the original service read them: its requests were pydantic's, which took `"30"` and `"true"`."""

import contextlib
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Union, get_args, get_origin

import pydantic

from edge_phi3.generation.parameters import PARAMETERS


def _scalar(type_: Any) -> type | None:
    """Return which of the readers' types a type is, or may be."""
    if type_ in _READERS:
        found: type = type_
        return found
    parts = get_args(type_) if get_origin(type_) in {Annotated, types.UnionType, Union} else ()
    return next(filter(None, map(_scalar, parts)), None)


_READERS: Final[Mapping[type, Callable[[Any], Any]]] = {
    type_: pydantic.TypeAdapter[Any](type_).validate_python for type_ in (bool, int, float)
}
_FIELDS: Final = dict.fromkeys(("return_full_text", "clean_up_tokenization_spaces", "stream"), bool)
_PARAMETERS: Final = {
    name: scalar for name, each in PARAMETERS.items() if (scalar := _scalar(each.value.kind.type)) is not None
}


def read(body: dict[str, Any]) -> None:
    """Turn what pydantic takes for a truth value or a number into one, in place; the rest stays as it is."""
    _read(body, _FIELDS)
    if isinstance(kwargs := body.get("generate_kwargs"), dict):
        _read(kwargs, _PARAMETERS)


def _read(values: dict[str, Any], types_: Mapping[str, type]) -> None:
    for name in values.keys() & types_.keys():
        if isinstance(values[name], str | int | float):
            with contextlib.suppress(pydantic.ValidationError):
                values[name] = _READERS[types_[name]](values[name])
