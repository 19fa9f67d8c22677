"""Which folder of the store is whose: references that mean different files never share one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_phi3.catalog import Catalog, HubError, ModelReferenceError, parse_reference
from edge_phi3.catalog.reference import HubCheckpoint, HubGguf, LocalCheckpoint
from edge_phi3.catalog.store import folder_name, shelf_name
from tests.catalog.hub_server import HubServer, Repository

NAME = st.sampled_from(["a", "b", "a-", "a.b", "a_b", "Q4_K_M", "a" * 96, "a" * 95 + "b"])
TEXT = (
    st.text("ab-._Q4K+=%~é\\ ", max_size=9)
    | st.sampled_from(["x" * 150, "x" * 149 + "y", "é" * 60])
    | st.text(max_size=9)
)
REVISION = st.sampled_from(["main", "refs/pr/1", "refs%2Fpr%2F1", "refs--pr--1"]) | TEXT
FILE = st.lists(TEXT, min_size=1, max_size=3).map("/".join)
PART = st.sampled_from(["", "Q4_K_M", "-00001-of-00002", "-00002-of-00002", "-00001-of-00003", "-00000-of-00000"])
REFERENCE = st.one_of(
    st.builds("{}/{}".format, NAME, NAME),
    st.builds("{}/{}@{}".format, NAME, NAME, REVISION),
    st.builds("{}/{}/{}{}.gguf".format, NAME, NAME, FILE, PART),
    st.builds("{}/{}@{}/{}{}.gguf".format, NAME, NAME, REVISION, FILE, PART),
)


def folders(texts: list[str]) -> dict[object, set[str]]:
    """Return for each different thing that the references mean, which folders it has."""
    found: dict[object, set[str]] = {}
    for text in texts:
        with contextlib.suppress(ModelReferenceError):
            wanted = parse_reference(text)
            assert isinstance(wanted, HubCheckpoint | HubGguf)
            quants = [""] if isinstance(wanted, HubGguf) else ["Q4_K_M", "F16"]
            for quant in quants:
                folder = f"{shelf_name(wanted)}/{folder_name(wanted, quant)}"
                found.setdefault((wanted, quant), set()).add(folder)
    return found


@given(st.lists(REFERENCE, max_size=6))
@example(["o/r/Q4/model.gguf", "o/r/Q8/model.gguf", "o/r/model-00001-of-00002.gguf", "o/r/model-00002-of-00002.gguf"])
@example(["o/r/Q4_K_M.gguf", "o/r", "o/r/Q4--model.gguf", "o/r/Q4/model.gguf", "o/r/Q4%2Fmodel.gguf"])
@example(["o/r@a+b", "o/r@a=b", "o/r@a_b", "o/r@refs/pr/7", "o/r@refs--pr--7", "o/r@" + "x" * 200])
@example(["a-/b", "a/b-", "o/r/.work-c0ffee.gguf", "o/r/work-c0ffee.gguf", "o/r/%2Ework-c0ffee.gguf"])
@example(["o/r/" + "x" * 200 + ".gguf", "o/r/" + "x" * 201 + ".gguf", "o/r/m-00000-of-00000.gguf"])
def test_what_means_something_else_has_another_folder(texts: list[str]) -> None:
    found = folders(texts)
    names = [name for (name,) in found.values()]
    assert len(set(names)) == len(names)
    for part in {part for name in names for part in name.split("/", 1)}:
        assert "/" not in part
        assert "\0" not in part
        assert not part.startswith(".")
        assert len(f"{part}.lock".encode()) <= 255


def test_a_folder_here_has_another_shelf_than_a_repository(checkpoint: Path) -> None:
    names = {shelf_name(LocalCheckpoint(checkpoint, name)) for name in ("owner--tiny@main", "a+b", "a=b", "a_b", ".a")}
    assert len(names) == 5
    assert shelf_name(HubCheckpoint("owner/tiny", "main", "owner/tiny")) not in names
    assert not any(name.startswith(".") for name in names)


def test_files_of_one_name_are_pulled_each_with_its_own_content(hub: HubServer, catalog: Catalog) -> None:
    names = ["Q4/model.gguf", "Q8/model.gguf", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    contents = {name: b"GGUF" + bytes([place]) * 9000 for place, name in enumerate(names)}
    hub.repositories["o/r"] = Repository(dict(contents))
    pulled = {name: catalog.resolve(f"o/r/{name}") for name in names}
    assert {name: model.path.with_name(Path(name).name).read_bytes() for name, model in pulled.items()} == contents
    assert {name: catalog.resolve(f"o/r/{name}") for name in names} == pulled
    for model in pulled.values():
        catalog.verify(model)


def test_a_pull_that_broke_off_is_not_continued_for_a_file_of_the_same_name(hub: HubServer, catalog: Catalog) -> None:
    parts = {f"{folder}/m-0000{i}-of-00002.gguf": f"GGUF{folder}{i}".encode() * 2000 for folder in "ab" for i in (1, 2)}
    hub.repositories["o/r"] = Repository(dict(parts))
    # The first part arrives whole, and the second never does.
    hub.served["a/m-00002-of-00002.gguf"] = b""
    with pytest.raises(HubError):
        catalog.resolve("o/r/a/m-00001-of-00002.gguf")
    model = catalog.resolve("o/r/b/m-00001-of-00002.gguf")
    assert {path.name: path.read_bytes() for path in model.path.parent.glob("*.gguf")} == {
        "m-00001-of-00002.gguf": parts["b/m-00001-of-00002.gguf"],
        "m-00002-of-00002.gguf": parts["b/m-00002-of-00002.gguf"],
    }
