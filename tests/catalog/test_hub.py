"""Pulling from the Hub with the real client: what comes of it, refusals, and downloads that break off or are killed."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from edge_phi3.catalog import Catalog, CatalogError, HubError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.metadata import SourceInfo
from edge_phi3.conversion.quantize import quantize
from tests.catalog.conftest import SHARD, Notes, files_below
from tests.catalog.hub_server import HubServer, Repository
from tests.support.cases import cases, tables


def test_a_pull_gives_what_convert_and_quantize_give(
    hub: HubServer, catalog: Catalog, checkpoint: Path, tmp_path: Path, notes: Notes
) -> None:
    model = catalog.resolve("owner/tiny", quant="q4_k_m", progress=notes)
    commit, content = hub.repositories["owner/tiny"].commit, hub.repositories["owner/tiny"].files
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
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
    assert f"Downloading {SHARD}" in notes.titles
    assert all(step.total and step.done == step.total for step in notes.steps)


def test_the_second_time_needs_no_network_and_makes_nothing(
    hub: HubServer, catalog: Catalog, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    asked, made = len(hub.requests), first.path.stat().st_mtime_ns
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert catalog.resolve("owner/tiny", quant="F16", progress=notes) == first
    assert notes.notes == []
    assert catalog.resolve("owner/tiny", quant="F16", refresh=True, progress=notes) == first
    assert notes.notes == ["HF_HUB_OFFLINE is set; the model stays as it is in the store."]
    assert (len(hub.requests), first.path.stat().st_mtime_ns) == (asked, made)


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
    for quant in ("Q4_0", "Q5_0", "F16"):
        model = catalog.resolve("owner/tiny", quant=quant, keep_intermediate=True)
        assert model.manifest is not None
        assert SHARD in {file.name for file in model.manifest.made_from}
    assert len(hub.gets(SHARD)) == 1
    assert [(model.source, model.quant) for model in catalog.stored()] == [
        ("owner/tiny", quant) for quant in ("F16", "Q4_0", "Q5_0")
    ]


def test_a_moved_branch_is_made_again_when_asked_and_revisions_are_models_of_their_own(
    hub: HubServer, catalog: Catalog, notes: Notes
) -> None:
    first = catalog.resolve("owner/tiny", quant="F16")
    hub.repositories["owner/tiny"].commit = "1" * 40
    assert catalog.resolve("owner/tiny", quant="F16") == first
    second = catalog.resolve("owner/tiny", quant="F16", refresh=True)
    assert second.revision == "1" * 40
    asked = len(hub.gets(SHARD))
    assert catalog.resolve("owner/tiny", quant="F16", refresh=True) == second
    assert len(hub.gets(SHARD)) == asked
    hub.repositories["owner/tiny"].revisions["v1"] = "2" * 40
    hub.requests.clear()
    model = catalog.resolve("owner/tiny@v1", quant="F16")
    assert (model.revision, model.path.parent.parent.name) == ("2" * 40, "owner--tiny@v1")
    assert all("2" * 40 in request.path for request in hub.requests if "/resolve/" in request.path)


def test_the_token_goes_to_the_hub_and_not_to_its_content_network(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    catalog.resolve("owner/tiny", quant="F16")
    assert {request.authorization for request in hub.requests if request.server == "hub"} == {f"Bearer {hub.token}"}
    assert {request.authorization for request in hub.requests if request.server == "cdn"} == {None}
    assert any(request.sent for request in hub.requests if request.server == "cdn")


def test_ready_made_ggufs_are_kept_as_they_are_each_with_its_own_content(hub: HubServer, catalog: Catalog) -> None:
    names = ["Q4/model.gguf", "Q8/model.gguf", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    contents = {name: b"GGUF" + bytes([place]) * 9000 for place, name in enumerate(names)}
    hub.repositories["o/r"] = Repository({"README.md": b"# Ready", **contents})
    pulled = {name: catalog.resolve(f"o/r/{name}", quant="Q8_0") for name in names}
    assert {name: model.path.with_name(Path(name).name).read_bytes() for name, model in pulled.items()} == contents
    assert {name: catalog.resolve(f"o/r/{name}") for name in names} == pulled
    for model in pulled.values():
        catalog.verify(model)
    first = pulled["Q4/model.gguf"]
    assert (first.name, first.quant, first.source) == ("model", None, "o/r")
    assert files_below(first.path.parent) == ["manifest.json", "model.gguf"]
    assert first.path.parent.relative_to(catalog.store).as_posix() == "o--r@main/Q4%2Fmodel.gguf"
    assert not hub.gets("README.md")


@cases
def test_a_refusal_is_a_sentence_and_leaves_nothing(
    hub: HubServer,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    *,
    reference: str,
    refusal: tuple[int, str, str] | None,
    token: str,
    words: str,
) -> None:
    for name, files in tables(__file__)["OTHERS"].items():
        hub.repositories[name] = Repository({file: text.encode() for file, text in files.items()})
    hub.repositories["owner/tiny"].refusal = refusal
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


def test_names_in_an_index_or_a_listing_never_lead_out_of_the_folder(
    hub: HubServer, catalog: Catalog, tmp_path: Path
) -> None:
    repository = hub.repositories["owner/tiny"]
    files, index = repository.files, repository.files["model.safetensors.index.json"]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    names = ("../../../evil.safetensors", "/etc/evil.safetensors", "sub/x.safetensors", "..", 7)
    for place, name in enumerate(names, 1):
        repository.commit = str(place) * 40
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
        files[str(name)] = b"x" * 5000
        words = f"{name}.* which is not the name of a file beside it; the repository is damaged, or hostile"
        with pytest.raises(HubError, match=words):
            catalog.resolve("owner/tiny", quant="F16")
    files |= {"../../config.json": b"{}", "/tokenizer.json": b"{}", "model.safetensors.index.json": index}
    repository.commit = "c0ffee" * 6 + "c0ff"
    catalog.resolve("owner/tiny", quant="F16")
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(catalog.store in path.parents for path in made)
    assert not any(".." in request.path for request in hub.requests)


def test_a_json_file_of_absurd_size_is_not_fetched_and_an_index_of_files_that_are_not_there_is_told(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, catalog: Catalog
) -> None:
    del hub.repositories["owner/tiny"].files[SHARD]
    with pytest.raises(HubError, match=rf"lacks the file {SHARD} that its model\.safetensors\.index\.json names"):
        catalog.resolve("owner/tiny", quant="F16")
    hub.requests.clear()
    monkeypatch.setattr("edge_phi3.catalog.listing._SMALL_LIMIT", 100)
    with pytest.raises(HubError, match=r"config\.json of owner/tiny has [\d,]+ bytes, which it never should"):
        catalog.resolve("owner/tiny", quant="F16")
    assert not hub.gets("config.json")


def test_a_lost_connection_is_taken_up_where_it_broke(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.cuts[SHARD] = [50_000, 50_000]
    catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=50000-", "bytes=100000-"]
    assert hub.bytes_sent(SHARD) == size
    assert [note.partition(" (")[0] for note in notes.notes] == [f"{SHARD} broke off"] * 2


def test_a_file_that_ends_short_is_told_and_continued_the_next_time(
    hub: HubServer, catalog: Catalog, notes: Notes
) -> None:
    # The first part arrives; each request for the rest brings nothing.
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.altered[SHARD] = lambda body: body[:30_000] if len(body) == size else b""
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny ended at 30,000 of [\d,]+ bytes, time and again; try"):
        catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert set(notes.notes) == {f"{SHARD} ended at 30,000 of {size:,} bytes; trying again."}
    hub.altered.clear()
    catalog.resolve("owner/tiny", quant="F16")
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=30000-"]
    assert hub.bytes_sent(SHARD) == size
    # A server that has less than it lists is not asked for ever.
    hub.served[SHARD] = hub.repositories["owner/tiny"].files[SHARD][:30_000]
    hub.requests.clear()
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny .*, time and again; try later, or another mirror"):
        catalog.resolve("owner/tiny@main", quant="Q8_0")
    assert hub.bytes_sent(SHARD) <= 5 * 30_000


@pytest.mark.parametrize("file", [SHARD, "config.json"])
def test_damaged_content_is_fetched_again(hub: HubServer, catalog: Catalog, notes: Notes, file: str) -> None:
    damaged = iter([True])
    hub.altered[file] = lambda body: bytes(len(body)) if next(damaged, False) else body
    model = catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert notes.notes == [f"{file} arrived with other content than the Hub lists; trying again."]
    catalog.verify(model)
    hub.altered[file] = lambda body: bytes(len(body))
    with pytest.raises(HubError, match=r"arrived with other content than the Hub lists, time and again"):
        catalog.resolve("owner/tiny@main", quant="Q8_0")


def test_a_killed_pull_goes_on_where_it_stopped(hub: HubServer, catalog: Catalog) -> None:
    def kill(body: bytes) -> bytes:
        if len(body) < len(hub.repositories["owner/tiny"].files[SHARD]):
            pull.kill()
            pull.wait()
        return body

    # The connection breaks once, and the process is killed when it asks for the rest.
    hub.cuts[SHARD], hub.altered[SHARD] = [60_000], kill
    script = "import sys; from pathlib import Path; from edge_phi3.catalog import Catalog\n"
    script += "Catalog(Path(sys.argv[1])).resolve('owner/tiny')"
    pull = subprocess.Popen([sys.executable, "-c", script, str(catalog.store)])
    assert pull.wait(300) == -signal.SIGKILL
    hub.altered.clear()
    [partial] = catalog.store.rglob(f"{SHARD}.partial")
    assert partial.stat().st_size == 60_000
    catalog.resolve("owner/tiny")
    assert [request.range for request in hub.gets(SHARD)].count(None) == 1
    assert len(hub.gets("tokenizer.json")) == 1


def test_two_pulls_at_once_do_the_work_once(
    hub: HubServer, catalog: Catalog, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def the_other_ends(sentence: str) -> None:
        notes.notes.append(sentence)
        lock.release()
        catalog.resolve("owner/tiny")

    monkeypatch.setattr(notes, "note", the_other_ends)
    (catalog.store / ".locks").mkdir(parents=True)
    lock = filelock.FileLock(catalog.store / ".locks" / "owner--tiny@main.lock")
    lock.acquire()
    catalog.resolve("owner/tiny", progress=notes)
    assert notes.notes == ["Another process is making owner--tiny@main; waiting for it."]
    assert notes.titles == []
    for file in hub.repositories["owner/tiny"].files:
        assert len(hub.gets(file)) <= 1, file


def test_an_empty_store_without_network_says_what_to_do(
    hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.resolve("owner/tiny", quant="Q4_0")
    words = (
        r"owner/tiny as Q8_0 is not in the store \S+, and {}\. On a machine with a network run"
        r" `edge-phi3 pull owner/tiny --quant Q8_0` and copy the folder owner--tiny@main of its store into this one"
        r".* It holds owner/tiny \(Q4_0\)\."
    )
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CatalogError, match=words.format("HF_HUB_OFFLINE is set")):
        catalog.resolve("owner/tiny", quant="Q8_0")
    assert len(hub.requests) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # A port that was free a moment ago: nobody listens there.
    with HubServer() as gone:
        endpoint = gone.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(CatalogError, match=words.format(rf"{endpoint} cannot be reached \(.*\)")):
        catalog.resolve("owner/tiny", quant="Q8_0")
