"""What may be written for MODEL, and which folder of the store is whose."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_phi3.catalog import Catalog, HubError, parse_reference
from edge_phi3.catalog.reference import HubCheckpoint, HubGguf, LocalCheckpoint, LocalGguf, ModelReferenceError
from edge_phi3.catalog.store import folder_name, shelf_name
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.catalog.hub_server import HubServer, Repository
from tests.support.cases import cases


@cases
def test_the_hub_is_named_by_repository_revision_and_file(text: str, revision: str, files: list[str]) -> None:
    reference = parse_reference(text)
    if files:
        assert reference == HubGguf("owner/name", revision, tuple(files))
    else:
        assert reference == HubCheckpoint("owner/name", revision, "owner/name")
    assert parse_reference(reference.text) == reference
    assert reference.name in {"owner/name", "file", "big"}


@pytest.mark.parametrize("text", [None, "", "demo", "phi-3-demo"])
def test_the_demo_and_presets_have_names(text: str | None) -> None:
    assert parse_reference(text) == LocalCheckpoint(DEMO_CHECKPOINT, "phi-3-demo")
    preset = HubCheckpoint("microsoft/Phi-3-mini-128k-instruct", "main", "phi-3-mini-128k-instruct")
    assert parse_reference("Phi-3-Mini-128K-Instruct") == preset


def test_what_lies_here_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert parse_reference("owner/name") == LocalCheckpoint(Path("owner/name"), "name")
    (folder / "file.gguf").write_bytes(b"GGUF...")
    assert parse_reference("owner/name/file.gguf") == LocalGguf(Path("owner/name/file.gguf"))
    model = Catalog(tmp_path / "store").resolve("owner/name/file.gguf")
    assert (model.path, model.name, model.quant, model.manifest) == (Path("owner/name/file.gguf"), "file", None, None)


@cases
def test_what_means_nothing_is_answered_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(ModelReferenceError, match=words):
        parse_reference(text)


def test_local_mistakes_are_answered_in_a_sentence(tmp_path: Path) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(ModelReferenceError, match=words):
            parse_reference(str(tmp_path / name))

    refused(".", r"has no config\.json; give the folder of a Hugging Face checkpoint")
    for name, file in (("a", "adapter_config"), ("run/checkpoint-500", "config"), ("run/checkpoint-1000", "config")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{file}.json").write_text("{}")
    refused("a", r"is an adapter \(adapter_config\.json\), not a whole model")
    refused("run", r"has no config\.json; give one of the folders in it, such as checkpoint-1000")
    (tmp_path / "part-00002-of-00002.gguf").write_bytes(b"GGUF")
    refused(".", r"has no config\.json; it holds part-00002-of-00002\.gguf")
    refused("part-00002-of-00002.gguf", r"give its first part, part-00001-of-00002\.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    refused("page.gguf", r"page\.gguf is not a GGUF file \(it begins with b'<htm'\)")


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


@given(st.lists(REFERENCE, max_size=6))
@example(["o/r/Q4/model.gguf", "o/r/Q8/model.gguf", "o/r/model-00001-of-00002.gguf", "o/r/model-00002-of-00002.gguf"])
@example(["o/r/Q4_K_M.gguf", "o/r", "o/r/Q4--model.gguf", "o/r/Q4/model.gguf", "o/r/Q4%2Fmodel.gguf"])
@example(["o/r@a+b", "o/r@a=b", "o/r@a_b", "o/r@refs/pr/7", "o/r@refs--pr--7", "o/r@" + "x" * 200])
@example(["a-/b", "a/b-", "o/r/.work-c0ffee.gguf", "o/r/work-c0ffee.gguf", "o/r/%2Ework-c0ffee.gguf"])
@example(["o/r/" + "x" * 200 + ".gguf", "o/r/" + "x" * 201 + ".gguf", "o/r/m-00000-of-00000.gguf"])
def test_what_means_something_else_has_another_folder(texts: list[str]) -> None:
    folders: dict[object, str] = {}
    for text in texts:
        with contextlib.suppress(ModelReferenceError):
            wanted = parse_reference(text)
            assert isinstance(wanted, HubCheckpoint | HubGguf)
            for quant in [""] if isinstance(wanted, HubGguf) else ["Q4_K_M", "F16"]:
                folder = f"{shelf_name(wanted)}/{folder_name(wanted, quant)}"
                assert folders.setdefault((wanted, quant), folder) == folder
    assert len(set(folders.values())) == len(folders)
    for part in {part for folder in folders.values() for part in folder.split("/", 1)}:
        assert "/" not in part
        assert "\0" not in part
        assert not part.startswith(".")
        assert len(f"{part}.lock".encode()) <= 255


def test_a_folder_here_has_another_shelf_than_a_repository(checkpoint: Path) -> None:
    names = {shelf_name(LocalCheckpoint(checkpoint, name)) for name in ("owner--tiny@main", "a+b", "a=b", "a_b", ".a")}
    assert len(names) == 5
    assert shelf_name(HubCheckpoint("owner/tiny", "main", "owner/tiny")) not in names
    assert not any(name.startswith(".") for name in names)


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
