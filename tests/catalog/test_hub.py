"""Pulling from the Hub with the real client: what comes of it, what is asked for, and what is told of a refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog, HubError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.metadata import SourceInfo
from edge_phi3.conversion.quantize import quantize
from tests.catalog.conftest import SHARD, Notes, files_below
from tests.catalog.hub_server import HubServer, Repository


def test_a_pull_gives_what_convert_and_quantize_give(
    hub: HubServer, catalog: Catalog, checkpoint: Path, tmp_path: Path, notes: Notes
) -> None:
    model = catalog.resolve("owner/tiny", quant="q4_k_m", progress=notes)
    commit, content = hub.repositories["owner/tiny"].commit, hub.repositories["owner/tiny"].files
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_bytes(content["README.md"])
    convert(copy, tmp_path / "auto.gguf", source=SourceInfo("owner/tiny", commit))
    quantize(tmp_path / "auto.gguf", tmp_path / "expected.gguf", type="Q4_K_M")
    assert model.path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert (model.name, model.source, model.revision, model.quant) == ("owner/tiny", "owner/tiny", commit, "Q4_K_M")
    assert files_below(catalog.store) == [
        "owner--tiny@main/Q4_K_M/manifest.json",
        "owner--tiny@main/Q4_K_M/tiny-Q4_K_M.gguf",
    ]
    # No other files are downloaded, and of each the manifest tells.
    wanted = {path.name for path in copy.iterdir()}
    sent = {request.path for request in hub.requests if request.sent and "/api/" not in request.path}
    assert {path.rsplit("/", 1)[-1] for path in sent} == wanted
    assert model.manifest is not None
    assert {file.name: (file.size, file.sha256) for file in model.manifest.made_from} == {
        name: (len(content[name]), hashlib.sha256(content[name]).hexdigest()) for name in wanted
    }
    assert model.manifest.tools.keys() == {"edge-phi3", "llama-cpp-python", "gguf", "huggingface-hub"}
    assert model.manifest.requested_revision == "main"
    # Each step tells how far it is.
    assert notes.titles[-2:] == ["Converting tiny", "Quantising tiny to Q4_K_M"]
    for title in (f"Downloading {SHARD}", *notes.titles[-2:]):
        done, total = notes.updates[title][-1]
        assert done == total
        assert total


def test_the_second_time_needs_no_network_and_makes_nothing(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = first.path.stat()
    assert catalog.resolve("owner/tiny", quant="F16") == first
    assert first.path.stat().st_mtime_ns == made.st_mtime_ns
    assert len(hub.requests) == asked


def test_a_full_store_works_when_it_is_read_only_and_copied(hub: HubServer, catalog: Catalog, tmp_path: Path) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    moved = tmp_path / "elsewhere"
    shutil.copytree(catalog.store, moved, ignore=shutil.ignore_patterns(".locks"))
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    second = Catalog(moved).resolve("owner/tiny", quant="F16")
    assert second.manifest == first.manifest
    assert second.path == moved / first.path.relative_to(catalog.store)
    Catalog(moved).verify(second)
    assert not (moved / ".locks").exists()


def test_the_intermediate_files_can_be_kept_for_the_next_quantisation(hub: HubServer, catalog: Catalog) -> None:
    catalog.resolve("owner/tiny", quant="Q4_0", keep_intermediate=True)
    asked = len(hub.gets(SHARD))
    other = catalog.resolve("owner/tiny", quant="Q5_0", keep_intermediate=True)
    assert len(hub.gets(SHARD)) == asked == 1
    assert other.manifest is not None
    assert SHARD in {file.name for file in other.manifest.made_from}
    catalog.resolve("owner/tiny", quant="F16", keep_intermediate=True)
    assert len(hub.gets(SHARD)) == 1
    assert [(model.source, model.quant) for model in catalog.stored()] == [
        ("owner/tiny", "F16"),
        ("owner/tiny", "Q4_0"),
        ("owner/tiny", "Q5_0"),
    ]


def test_a_moved_branch_is_made_again_when_asked(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    hub.repositories["owner/tiny"].commit = "1" * 40
    assert catalog.resolve("owner/tiny", quant="F16") == first
    second = catalog.resolve("owner/tiny", quant="F16", refresh=True)
    assert second.revision == "1" * 40
    asked = len(hub.gets(SHARD))
    assert catalog.resolve("owner/tiny", quant="F16", refresh=True) == second
    assert len(hub.gets(SHARD)) == asked


def test_a_refresh_without_network_keeps_what_is_there(
    hub: HubServer, catalog: Catalog, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert catalog.resolve("owner/tiny", quant="F16", refresh=True, progress=notes) == first
    assert notes.notes == ["HF_HUB_OFFLINE is set; the model stays as it is in the store."]


def test_revisions_are_models_of_their_own(hub: HubServer, catalog: Catalog) -> None:
    hub.repositories["owner/tiny"].revisions["v1"] = "2" * 40
    hub.repositories["owner/tiny"].revisions["2" * 40] = "2" * 40
    model = catalog.resolve("owner/tiny@v1", quant="F16")
    assert model.revision == "2" * 40
    assert model.path.parent.parent.name == "owner--tiny@v1"
    assert all("2" * 40 in request.path for request in hub.requests if "/resolve/" in request.path)


def test_the_token_goes_to_the_hub_and_not_to_its_content_network(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/tiny"].gated = True
    monkeypatch.setenv("HF_TOKEN", hub.token)
    catalog.resolve("owner/tiny", quant="F16")
    assert {request.authorization for request in hub.requests if request.server == "hub"} == {f"Bearer {hub.token}"}
    assert {request.authorization for request in hub.requests if request.server == "cdn"} == {None}
    assert any(request.sent for request in hub.requests if request.server == "cdn")


def test_ready_made_ggufs_are_kept_as_they_are(hub: HubServer, catalog: Catalog) -> None:
    content = b"GGUF" + bytes(range(256)) * 64
    hub.repositories["owner/ready"] = Repository({"sub/model-q4.gguf": content, "README.md": b"# Ready"})
    model = catalog.resolve("owner/ready/sub/model-q4.gguf", quant="Q8_0")
    assert model.path.read_bytes() == content
    assert (model.name, model.quant, model.source) == ("model-q4", None, "owner/ready")
    assert files_below(catalog.store) == [
        "owner--ready@main/sub%2Fmodel-q4.gguf/manifest.json",
        "owner--ready@main/sub%2Fmodel-q4.gguf/model-q4.gguf",
    ]
    assert not hub.gets("README.md")


OTHERS = {
    "owner/ready": {"config.json": b"{}", "a-q4.gguf": b"GGUF", "b-q8.gguf": b"GGUF"},
    "owner/old": {"config.json": b"{}", "pytorch_model.bin": b"x"},
    "owner/data": {"train.csv": b"1,2"},
}


@pytest.mark.parametrize(
    "case",
    [
        ("owner/tiny", {"gated": True}, "", r"is gated: accept its terms on http\S+/owner/tiny .*; then set HF_TOKEN"),
        ("owner/tiny", {"gated": True, "granted": False}, HubServer.token, r"\(HF_TOKEN\) has not been let in yet"),
        ("owner/tiny", {}, "hf_wrong", r"does not accept the token; set HF_TOKEN to one from http\S+/settings/tokens"),
        ("owner/tiny", {"private": True}, "", r"no repository owner/tiny, or it is private, which takes a token in"),
        ("owner/tiny", {"forbidden": True}, "", r"forbids reading config\.json; the token in HF_TOKEN lacks the"),
        ("owner/absent", {}, "", r"has no repository owner/absent, or it is private"),
        ("owner/absent", {}, HubServer.token, r"owner/absent, or the token may not see it; check the name"),
        ("owner/tiny@v9", {}, "", r"owner/tiny has no revision 'v9'; give a branch, a tag or a commit of http"),
        ("owner/ready/c.gguf", {}, "", r"has no file c\.gguf at c0ffeec0ffee; it holds a-q4\.gguf, b-q8\.gguf"),
        ("owner/tiny/m.gguf", {}, "", r"has no file m\.gguf at c0ffeec0ffee; it holds no GGUF at all"),
        ("owner/ready", {}, "", r"\(a-q4\.gguf, b-q8\.gguf\); name one of them, such as owner/ready/a-q4\.gguf"),
        ("owner/old", {}, "", r"holds only pickled weights \(\.bin\)"),
        ("owner/data", {}, "", r"owner/data holds no config\.json with safetensors beside it"),
    ],
)
def test_a_refusal_is_a_sentence_and_leaves_nothing(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, case: tuple[str, dict[str, bool], str, str]
) -> None:
    reference, traits, token, words = case
    hub.repositories |= {name: Repository(files) for name, files in OTHERS.items()}
    for name, value in traits.items():
        setattr(hub.repositories["owner/tiny"], name, value)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=words):
        catalog.resolve(reference)
    assert not catalog.store.exists() or files_below(catalog.store) == []


def test_a_server_that_is_no_hub_is_told(hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    # The content network's server answers every listing with a broken connection or with nonsense.
    hub.repositories["api/models"] = Repository({"owner/tiny/revision/main": b"<html>Sign in to the hotel</html>"})
    monkeypatch.setenv("HF_ENDPOINT", hub.cdn)
    with pytest.raises(HubError, match=r"does not answer as the Hub does .* check HF_ENDPOINT and any proxy"):
        catalog.resolve("owner/tiny", quant="F16")


@pytest.mark.parametrize("name", ["../../../evil.safetensors", "/etc/evil.safetensors", "sub/x.safetensors", "..", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    hub: HubServer, catalog: Catalog, name: object, tmp_path: Path
) -> None:
    files = hub.repositories["owner/tiny"].files
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    files[str(name)] = b"x" * 5000
    before = set(tmp_path.rglob("*"))
    with pytest.raises(
        HubError, match=r"which is not the name of a file beside it; the repository is damaged, or hostile"
    ):
        catalog.resolve("owner/tiny", quant="F16")
    assert all(catalog.store in path.parents or path == catalog.store for path in set(tmp_path.rglob("*")) - before)


def test_names_in_a_listing_never_become_paths(hub: HubServer, catalog: Catalog, tmp_path: Path) -> None:
    hub.repositories["owner/tiny"].files |= {"../../config.json": b"{}", "/tokenizer.json": b"{}"}
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    catalog.resolve("owner/tiny", quant="F16")
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(catalog.store in path.parents for path in made)
    assert not any(".." in request.path for request in hub.requests)


def test_a_json_file_of_absurd_size_is_not_fetched(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, catalog: Catalog
) -> None:
    monkeypatch.setattr("edge_phi3.catalog.listing._SMALL_LIMIT", 100)
    with pytest.raises(HubError, match=r"config\.json of owner/tiny has [\d,]+ bytes, which it never should"):
        catalog.resolve("owner/tiny", quant="F16")
    assert not hub.gets("config.json")


def test_an_index_of_files_that_are_not_there_is_told(hub: HubServer, catalog: Catalog) -> None:
    del hub.repositories["owner/tiny"].files[SHARD]
    with pytest.raises(
        HubError, match=rf"owner/tiny lacks the file {SHARD} that its model\.safetensors\.index\.json names"
    ):
        catalog.resolve("owner/tiny", quant="F16")
