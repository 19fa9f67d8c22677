"""What the Hub refuses, or holds for evil, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog, HubError
from tests.catalog.conftest import SHARD, files_below
from tests.catalog.hub_server import HubServer, Repository


def _refuse(hub: HubServer, monkeypatch: pytest.MonkeyPatch, case: str) -> str:
    repository = hub.repositories["owner/tiny"]
    if case == "gated":
        repository.gated = True
    elif case == "gated-other-account":
        repository.gated, repository.granted = True, False
        monkeypatch.setenv("HF_TOKEN", hub.token)
    elif case == "bad-token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif case == "private":
        repository.private = True
    elif case == "absent-with-token":
        monkeypatch.setenv("HF_TOKEN", hub.token)
        return "owner/absent"
    elif case == "absent":
        return "owner/absent"
    elif case == "revision":
        return "owner/tiny@v9"
    elif case == "forbidden":
        repository.forbidden = True
    elif case == "gguf-file":
        repository.files["model-q4.gguf"] = b"GGUF"
        return "owner/tiny/model-q5.gguf"
    elif case == "no-gguf":
        return "owner/tiny/model.gguf"
    elif case == "only-gguf":
        hub.repositories["owner/ready"] = Repository({"config.json": b"{}", "a-q4.gguf": b"GGUF", "b-q8.gguf": b"GGUF"})
        return "owner/ready"
    elif case == "only-pickle":
        hub.repositories["owner/old"] = Repository({"config.json": b"{}", "pytorch_model.bin": b"x"})
        return "owner/old"
    elif case == "data":
        hub.repositories["owner/data"] = Repository({"train.csv": b"1,2"})
        return "owner/data"
    return "owner/tiny"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("gated", r"owner/tiny is gated: accept its terms on http\S+/owner/tiny with your account; then set HF_TOKEN"),
        ("gated-other-account", r"with your account; the account of your token \(HF_TOKEN\) has not been let in yet"),
        ("bad-token", r"The Hub does not accept the token; set HF_TOKEN to one from http\S+/settings/tokens"),
        ("private", r"has no repository owner/tiny, or it is private, which takes a token in HF_TOKEN; check the name"),
        ("absent", r"has no repository owner/absent, or it is private"),
        ("absent-with-token", r"has no repository owner/absent, or the token may not see it; check the name"),
        ("revision", r"owner/tiny has no revision 'v9'; give a branch, a tag or a commit of http"),
        ("forbidden", r"The Hub forbids reading config\.json; the token in HF_TOKEN lacks the permission"),
        ("gguf-file", r"owner/tiny has no file model-q5\.gguf at c0ffeec0ffee; it holds model-q4\.gguf"),
        ("no-gguf", r"owner/tiny has no file model\.gguf at c0ffeec0ffee; it holds no GGUF at all"),
        ("only-gguf", r"but GGUF files \(a-q4\.gguf, b-q8\.gguf\); name one of them, such as owner/ready/a-q4\.gguf"),
        ("only-pickle", r"holds only pickled weights \(\.bin\)"),
        ("data", r"owner/data holds no config\.json with safetensors beside it"),
    ],
)
def test_a_refusal_is_a_sentence_and_leaves_nothing(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, case: str, words: str
) -> None:
    reference = _refuse(hub, monkeypatch, case)
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
