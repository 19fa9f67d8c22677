"""The import graph of the package has no circle, imports for type checking included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


def assert_no_circle(imports: Mapping[str, Iterable[str]]) -> None:
    """Fail with the modules of a circle, each of which imports the next."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("edge_phi3", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["edge_phi3.__main__"] == {"edge_phi3.cli"}, "the graph is that of the package"
    assert_no_circle(imports)


def test_a_circle_is_named() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"b -> c -> b|c -> b -> c"):
        assert_no_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})
