"""What the Hub refuses, or holds for evil, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog, HubError
from tests.catalog.conftest import SHARD, files_below
from tests.catalog.hub_server import HubServer, Repository

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
