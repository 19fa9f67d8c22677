"""What imports what: no circle, type checking included, and nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter

import grimp
import pytest

HEAVY = {"litestar", "pydantic", "numpy", "llama_cpp", "uvicorn", "gguf"}


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("edge_phi3", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["edge_phi3.__main__"] == {"edge_phi3.cli"}, "the graph is that of the package"
    TopologicalSorter(imports).prepare()  # raises an error that names the modules of a circle


@pytest.mark.parametrize("start", ["import edge_phi3", "from edge_phi3.cli import app; app(['--help'], 'edge-phi3')"])
def test_the_public_names_and_help_import_nothing_heavy(start: str) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print({HEAVY} & {{*sys.modules}})); {start}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
