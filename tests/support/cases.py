"""Tables of cases and other data, in a YAML file beside the module that they are for.

What is long stands there as ``!times 3 ab``, which is ababab, ``!times [2, {a: 1}]``, which is [{a: 1}, {a: 1}], or
``!range 3``, which is [0, 1, 2].
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

_Test = TypeVar("_Test", bound=Callable[..., None])
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _times(loader: Any, node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        count, value = loader.construct_sequence(node, deep=True)
        return [value] * count
    count, _, text = node.value.partition(" ")
    return text * int(count)


SafeLoader.add_constructor("!times", _times)
SafeLoader.add_constructor("!range", lambda _, node: [*range(int(node.value))])


@functools.cache
def tables(module: str) -> dict[str, Any]:
    """Return what the YAML file beside a module holds: ``test_this.yaml`` is that of ``test_this.py``."""
    return yaml.load(Path(module).with_suffix(".yaml").read_text(encoding="utf-8"), SafeLoader)


def cases(test: _Test) -> _Test:
    """Parametrise a test with the table of its name: first the names of its arguments, then a list for each case.

    The table ``NAME at length`` has cases for the marker "soak".
    """
    import pytest  # some who read tables alone lack it

    found = tables(inspect.getfile(test))
    names, *rows = found[test.__name__]
    soak = [pytest.param(*row, marks=pytest.mark.soak) for row in found.get(f"{test.__name__} at length", ())]
    return pytest.mark.parametrize(",".join(names), [pytest.param(*row) for row in rows] + soak)(test)
