"""Pulling from the Hub with the real client: success, interruptions, refusals, damage, and no network."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_phi3.catalog import Catalog, CatalogError, HubError
from edge_phi3.catalog.hub import Hub
from edge_phi3.conversion.convert import SourceInfo, convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.progress import SilentProgress
from tests.catalog.conftest import Notes
from tests.catalog.hub_server import Fault, HubServer, Repository

SHARD = "model-00001-of-00002.safetensors"


def files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )


def test_a_pull_gives_what_convert_and_quantize_give(
    hub: HubServer, catalog: Catalog, checkpoint: Path, tmp_path: Path, notes: Notes
) -> None:
    model = catalog.resolve("owner/tiny", quant="q4_k_m", progress=notes)
    commit = hub.repositories["owner/tiny"].commit
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_bytes(hub.repositories["owner/tiny"].files["README.md"])
    convert(copy, tmp_path / "auto.gguf", source=SourceInfo("owner/tiny", commit))
    quantize(tmp_path / "auto.gguf", tmp_path / "expected.gguf", type="Q4_K_M")
    assert model.path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert (model.name, model.source, model.revision, model.quant) == ("owner/tiny", "owner/tiny", commit, "Q4_K_M")
    assert files_below(catalog.store) == [
        "owner--tiny@main/Q4_K_M/manifest.json",
        "owner--tiny@main/Q4_K_M/tiny-Q4_K_M.gguf",
    ]


def test_only_the_files_that_are_needed_are_downloaded(hub: HubServer, catalog: Catalog, checkpoint: Path) -> None:
    manifest = catalog.resolve("owner/tiny", quant="F16").manifest
    assert manifest is not None
    wanted = {path.name for path in checkpoint.iterdir()} | {"README.md"}
    assert {
        request.path.rsplit("/", 1)[-1] for request in hub.requests if request.sent and "/api/" not in request.path
    } == wanted
    content = hub.repositories["owner/tiny"].files
    assert {file.name: (file.size, file.sha256) for file in manifest.made_from} == {
        name: (len(content[name]), hashlib.sha256(content[name]).hexdigest()) for name in wanted
    }
    assert manifest.tools.keys() == {"edge-phi3", "llama-cpp-python", "gguf", "huggingface-hub"}
    assert manifest.requested_revision == "main"


def test_progress_is_told_for_each_file_conversion_and_quantisation(
    hub: HubServer, catalog: Catalog, notes: Notes
) -> None:
    catalog.resolve("owner/tiny", progress=notes)
    assert f"Downloading {SHARD}" in notes.titles
    assert notes.titles[-2:] == ["Converting owner/tiny", "Quantising owner/tiny to Q4_K_M"]
    for title in (f"Downloading {SHARD}", "Converting owner/tiny", "Quantising owner/tiny to Q4_K_M"):
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


def test_another_quantisation_shares_nothing_but_the_shelf(hub: HubServer, catalog: Catalog) -> None:
    small, large = catalog.resolve("owner/tiny", quant="Q4_0"), catalog.resolve("owner/tiny", quant="F16")
    assert small.path.stat().st_size < large.path.stat().st_size
    assert [(model.source, model.quant) for model in catalog.stored()] == [
        ("owner/tiny", "F16"),
        ("owner/tiny", "Q4_0"),
    ]


def test_the_intermediate_files_can_be_kept_for_the_next_quantisation(hub: HubServer, catalog: Catalog) -> None:
    catalog.resolve("owner/tiny", quant="Q4_0", keep_intermediate=True)
    asked = len(hub.gets(SHARD))
    other = catalog.resolve("owner/tiny", quant="Q5_0", keep_intermediate=True)
    assert len(hub.gets(SHARD)) == asked == 1
    assert other.manifest is not None
    assert SHARD in {file.name for file in other.manifest.made_from}
    catalog.resolve("owner/tiny", quant="F16", keep_intermediate=True)
    assert len(hub.gets(SHARD)) == 1


def test_a_direct_q8_0_conversion_has_the_tensors_of_the_quantiser(
    hub: HubServer, catalog: Catalog, checkpoint: Path, tmp_path: Path
) -> None:
    model = catalog.resolve("owner/tiny", quant="Q8_0")
    convert(checkpoint, tmp_path / "auto.gguf")
    quantize(tmp_path / "auto.gguf", tmp_path / "q8.gguf", type="Q8_0")
    expected = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "q8.gguf").tensors}
    made = {t.name: t.data for t in gguf.GGUFReader(model.path).tensors}
    assert made.keys() == expected.keys()
    for name, data in expected.items():
        np.testing.assert_array_equal(made[name], data, err_msg=name)


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


def test_a_lost_connection_is_taken_up_where_it_broke(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.faults[SHARD] = Fault(after=50_000, times=2)
    catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=50000-", "bytes=100000-"]
    assert hub.bytes_sent(SHARD) == size
    assert [note.partition(" (")[0] for note in notes.notes] == [
        f"{SHARD} broke off",
        f"{SHARD} broke off",
    ]


def test_a_file_that_ends_short_is_continued(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.faults[SHARD] = Fault(after=60_000, consistent=True)
    catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=60000-"]
    assert notes.notes == [f"{SHARD} ended at 60,000 of {size:,} bytes; trying again."]


def test_a_file_that_always_ends_short_is_told_and_what_came_is_kept(hub: HubServer, catalog: Catalog) -> None:
    # The first part arrives; each request for the rest brings nothing.
    hub.faults[SHARD] = Fault(after=30_000, consistent=True)
    hub.empty.add(SHARD)
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny ended at 30,000 of [\d,]+ bytes, time and again; try"):
        catalog.resolve("owner/tiny", quant="F16")
    hub.empty.clear()
    catalog.resolve("owner/tiny", quant="F16")
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=30000-"]
    assert hub.bytes_sent(SHARD) == len(hub.repositories["owner/tiny"].files[SHARD])


def test_a_server_that_has_less_than_it_lists_is_not_asked_for_ever(hub: HubServer, catalog: Catalog) -> None:
    hub.served[SHARD] = hub.repositories["owner/tiny"].files[SHARD][:30_000]
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny .*, time and again; try later, or another mirror"):
        catalog.resolve("owner/tiny", quant="F16")
    assert hub.bytes_sent(SHARD) <= 5 * 30_000


@pytest.mark.parametrize("file", [SHARD, "config.json"])
def test_damaged_content_is_fetched_again(hub: HubServer, catalog: Catalog, notes: Notes, file: str) -> None:
    hub.damaged[file] = 1
    model = catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert notes.notes == [f"{file} arrived with other content than the Hub lists; trying again."]
    catalog.verify(model)
    hub.damaged[file] = 99
    with pytest.raises(HubError, match=r"arrived with other content than the Hub lists, time and again"):
        catalog.resolve("owner/tiny@main", quant="Q8_0")


PULL = """
import sys
from pathlib import Path
from edge_phi3.catalog import Catalog
from edge_phi3.progress import LineProgress
say = lambda line: print(line, flush=True)
model = Catalog(Path(sys.argv[1])).resolve(sys.argv[2], progress=LineProgress(say))
print(model.path, flush=True)
"""


def start_pull(store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PULL, str(store), "owner/tiny"], stdout=subprocess.PIPE, text=True)


def test_a_killed_pull_goes_on_where_it_stopped(hub: HubServer, catalog: Catalog) -> None:
    hub.chunk_delay = 0.05
    with start_pull(catalog.store) as pull:
        assert pull.stdout is not None
        deadline = time.monotonic() + 30
        partial = []
        while not (partial and partial[0].stat().st_size > 60_000):
            assert time.monotonic() < deadline
            time.sleep(0.02)
            partial = list(catalog.store.rglob(f"{SHARD}.partial"))
        pull.send_signal(signal.SIGKILL)
    # The server notices at its next write, and notes the request then.
    while not hub.gets(SHARD):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    arrived = partial[0].stat().st_size
    hub.chunk_delay = 0.0
    hub.requests.clear()
    catalog.resolve("owner/tiny")
    assert [request.range for request in hub.gets(SHARD)] == [f"bytes={arrived}-"]
    assert hub.bytes_sent("tokenizer.json") == 0


def test_two_pulls_at_once_do_the_work_once(hub: HubServer, catalog: Catalog) -> None:
    hub.chunk_delay = 0.02
    pulls = [start_pull(catalog.store) for _ in range(2)]
    outputs = [pull.communicate(timeout=60)[0].splitlines() for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] == str(catalog.resolve("owner/tiny").path)
    waited, worked = sorted(outputs, key=len)
    assert waited[0] == "Another process is making owner--tiny@main; waiting for it."
    assert len(waited) == 2
    assert any(line.startswith("Quantising") for line in worked)
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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CatalogError, match=words.format("HF_HUB_OFFLINE is set")):
        catalog.resolve("owner/tiny", quant="Q8_0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # A port that was free a moment ago: nobody listens there.
    with HubServer() as gone:
        endpoint = gone.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(CatalogError, match=words.format(rf"{endpoint} cannot be reached \(.*\)")):
        catalog.resolve("owner/tiny", quant="Q8_0")


def test_huggingface_hubs_own_offline_switch_holds(hub: HubServer, catalog: Catalog) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PULL, str(catalog.store), "owner/tiny"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "HF_HUB_OFFLINE is set" in finished.stderr
    assert hub.requests == []


def test_a_server_that_is_no_hub_is_told(hub: HubServer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    # The content network's server answers every listing with a broken connection or with nonsense.
    hub.repositories["api/models"] = Repository({"owner/tiny/revision/main": b"<html>Sign in to the hotel</html>"})
    monkeypatch.setenv("HF_ENDPOINT", hub.cdn)
    with pytest.raises(HubError, match=r"does not answer as the Hub does .* check HF_ENDPOINT and any proxy"):
        catalog.resolve("owner/tiny", quant="F16")


def test_ready_made_ggufs_are_kept_as_they_are(hub: HubServer, catalog: Catalog) -> None:
    content = b"GGUF" + bytes(range(256)) * 64
    hub.repositories["owner/ready"] = Repository({"sub/model-q4.gguf": content, "README.md": b"# Ready"})
    model = catalog.resolve("owner/ready/sub/model-q4.gguf", quant="Q8_0")
    assert model.path.read_bytes() == content
    assert (model.name, model.quant, model.source) == ("model-q4", None, "owner/ready")
    assert files_below(catalog.store) == [
        "owner--ready@main/model-q4/manifest.json",
        "owner--ready@main/model-q4/model-q4.gguf",
    ]
    assert not hub.gets("README.md")


def test_split_ggufs_are_pulled_with_all_their_parts(hub: HubServer, catalog: Catalog) -> None:
    parts = {f"big-0000{i}-of-00002.gguf": b"GGUF" + bytes([i]) * 9000 for i in (1, 2)}
    hub.repositories["owner/ready"] = Repository(dict(parts))
    model = catalog.resolve("owner/ready/big-00001-of-00002.gguf")
    assert model.path.name == "big-00001-of-00002.gguf"
    assert {path.name: path.read_bytes() for path in model.path.parent.glob("*.gguf")} == parts


@pytest.mark.parametrize("name", ["../../../evil.safetensors", "/etc/evil.safetensors", "sub/x.safetensors", "..", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    hub: HubServer, catalog: Catalog, name: object, tmp_path: Path
) -> None:
    files = hub.repositories["owner/tiny"].files
    index = f'{{"weight_map": {{"a": {__import__("json").dumps(name)}}}}}'.encode()
    files["model.safetensors.index.json"] = index
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


def test_the_endpoint_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert Hub(SilentProgress()).endpoint == "https://mirror.example"
