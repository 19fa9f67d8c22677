"""Downloads that break off, arrive damaged, are killed, meet each other, or have no network at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog, CatalogError, HubError
from tests.catalog.conftest import SHARD, Notes
from tests.catalog.hub_server import Hold, HubServer, once


def test_a_lost_connection_is_taken_up_where_it_broke(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.cuts[SHARD] = [50_000, 50_000]
    catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=50000-", "bytes=100000-"]
    assert hub.bytes_sent(SHARD) == size
    assert [note.partition(" (")[0] for note in notes.notes] == [f"{SHARD} broke off"] * 2


def test_a_file_that_ends_short_is_continued(hub: HubServer, catalog: Catalog, notes: Notes) -> None:
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.altered[SHARD] = once(lambda body: body[:60_000])
    catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=60000-"]
    assert notes.notes == [f"{SHARD} ended at 60,000 of {size:,} bytes; trying again."]


def test_a_file_that_always_ends_short_is_told_and_what_came_is_kept(hub: HubServer, catalog: Catalog) -> None:
    # The first part arrives; each request for the rest brings nothing.
    size = len(hub.repositories["owner/tiny"].files[SHARD])
    hub.altered[SHARD] = lambda body: body[:30_000] if len(body) == size else b""
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny ended at 30,000 of [\d,]+ bytes, time and again; try"):
        catalog.resolve("owner/tiny", quant="F16")
    hub.altered.clear()
    catalog.resolve("owner/tiny", quant="F16")
    assert [request.range for request in hub.gets(SHARD)] == [None, "bytes=30000-"]
    assert hub.bytes_sent(SHARD) == size


def test_a_server_that_has_less_than_it_lists_is_not_asked_for_ever(hub: HubServer, catalog: Catalog) -> None:
    hub.served[SHARD] = hub.repositories["owner/tiny"].files[SHARD][:30_000]
    with pytest.raises(HubError, match=rf"{SHARD} of owner/tiny .*, time and again; try later, or another mirror"):
        catalog.resolve("owner/tiny", quant="F16")
    assert hub.bytes_sent(SHARD) <= 5 * 30_000


@pytest.mark.parametrize("file", [SHARD, "config.json"])
def test_damaged_content_is_fetched_again(hub: HubServer, catalog: Catalog, notes: Notes, file: str) -> None:
    hub.altered[file] = once(lambda body: bytes(len(body)))
    model = catalog.resolve("owner/tiny", quant="F16", progress=notes)
    assert notes.notes == [f"{file} arrived with other content than the Hub lists; trying again."]
    catalog.verify(model)
    hub.altered[file] = lambda body: bytes(len(body))
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


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that becomes true soon, where the machine has nothing else to do."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_pull_goes_on_where_it_stopped(hub: HubServer, catalog: Catalog) -> None:
    hold = hub.holds[SHARD] = Hold(after=60_000)
    with start_pull(catalog.store) as pull:
        wait_until(lambda: any(path.stat().st_size for path in catalog.store.rglob(f"{SHARD}.partial")))
        assert hold.reached.wait(300)
        pull.send_signal(signal.SIGKILL)
    # The server notices at its next write, and notes the request then.
    hold.released.set()
    wait_until(lambda: bool(hub.gets(SHARD)))
    [partial] = catalog.store.rglob(f"{SHARD}.partial")
    arrived = partial.stat().st_size
    assert 0 < arrived <= hub.bytes_sent(SHARD)
    hub.holds.clear()
    hub.requests.clear()
    catalog.resolve("owner/tiny")
    assert [request.range for request in hub.gets(SHARD)] == [f"bytes={arrived}-"]
    assert hub.bytes_sent("tokenizer.json") == 0


def test_two_pulls_at_once_do_the_work_once(hub: HubServer, catalog: Catalog) -> None:
    hold = hub.holds[SHARD] = Hold(after=0)
    worker = start_pull(catalog.store)
    assert hold.reached.wait(300)
    waiter = start_pull(catalog.store)
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == "Another process is making owner--tiny@main; waiting for it.\n"
    hold.released.set()
    worked, waited = (pull.communicate(timeout=300)[0].splitlines() for pull in (worker, waiter))
    assert worker.returncode == waiter.returncode == 0
    assert worked[-1] == waited[-1] == str(catalog.resolve("owner/tiny").path)
    assert len(waited) == 1
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
