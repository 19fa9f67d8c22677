"""``edge-phi3 models``, and models that stay whole while they are made anew."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog, CatalogError
from tests.catalog.conftest import Notes
from tests.catalog.hub_server import HubServer, Repository
from tests.test_cli import Result, edge_phi3

_KILLED = """
import os, signal, sys
from pathlib import Path
from edge_phi3.catalog import Catalog, build
def killed(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
{where} = killed
Catalog(Path(sys.argv[1])).resolve(sys.argv[2], quant="F16", refresh=True)
"""


READY = "o/ready/model-00001-of-00002.gguf"


def models(catalog: Catalog, *arguments: str) -> Result:
    return edge_phi3("models", *arguments, EDGE_PHI3_STORE=str(catalog.store), COLUMNS="200")


def test_the_store_is_listed_checked_and_cleared(hub: HubServer, catalog: Catalog, checkpoint: Path) -> None:
    first, second = (catalog.resolve("owner/tiny", quant=quant) for quant in ("F16", "Q8_0"))
    catalog.resolve(str(checkpoint), quant="F16")
    os.utime(second.path.with_name("manifest.json"), (0, 0))
    work = first.path.parent.with_name(".work-unfinished")
    work.mkdir()
    (work / "half").write_bytes(bytes(5000))
    head, *rows = models(catalog).stdout.splitlines()
    assert head.split() == ["model", "type", "size", "source", "revision", "last", "use"]
    today = time.strftime("%Y-%m-%d")
    for row, words in zip(rows, (
        ["owner/tiny", "F16", "owner/tiny", "c0ffeec0ffee", today],
        ["owner/tiny", "Q8_0", "owner/tiny", "c0ffeec0ffee", "1970-01-01"],
        ["tiny-phi3", "F16", "tiny-phi3", today],
        ["owner--tiny@main", "unfinished", "5.0", "kB"],
    ), strict=True):  # fmt: skip
        assert [word for word in row.split() if word in words] == words, row
    catalog.resolve("owner/tiny", quant="Q8_0")
    assert "1970" not in models(catalog).stdout, "it was asked for"

    assert models(catalog, "verify").stdout.count(": whole\n") == 3
    content = bytearray(second.path.read_bytes())
    content[len(content) // 2] ^= 1
    second.path.write_bytes(content)
    found = models(catalog, "verify", "owner/tiny")
    assert (found.returncode, found.stdout) == (1, "owner/tiny (F16): whole\nowner/tiny (Q8_0): damaged\n")
    assert f"{second.path} is damaged" in found.stderr
    second.path.write_bytes(b"GGUF")
    assert "Q8_0 holds no whole model" in models(catalog, "verify").stderr
    assert "damaged" in models(catalog).stdout

    assert models(catalog, "rm", "owner--tiny@main").stdout.split() == [str(work), str(second.path.parent)]
    assert models(catalog, "rm", "tiny-phi3", "--quant", "q8_0").stderr == (
        f"edge-phi3: tiny-phi3 as Q8_0 is not in the store {catalog.store}; it holds owner/tiny, tiny-phi3.\n"
    )
    assert models(catalog, "rm", "owner/tiny", "--quant", "f16").returncode == 0
    assert models(catalog, "rm", "tiny-phi3").returncode == 0
    assert [path.name for path in catalog.store.iterdir()] == [".locks"]


@pytest.mark.parametrize(
    ("reference", "where"),
    [("owner/tiny", "build.atomic_output"), (READY, "build.atomic_output"), (READY, "Path.unlink")],
)
def test_a_killed_refresh_leaves_a_whole_model(
    hub: HubServer, catalog: Catalog, notes: Notes, reference: str, where: str
) -> None:
    ready = hub.repositories["o/ready"] = Repository(
        {f"model-0000{part}-of-00002.gguf": b"GGUF" + bytes([part]) * 100 for part in (1, 2)}
    )
    old = catalog.resolve(reference, quant="F16")
    for repository in (ready, hub.repositories["owner/tiny"]):
        repository.commit = "1" * 40
        repository.files |= {name: b"GGUF" + content for name, content in repository.files.items() if "gguf" in name}
    script = _KILLED.format(where=where)
    killed = subprocess.run([sys.executable, "-c", script, str(catalog.store), reference], check=False)
    assert killed.returncode == -signal.SIGKILL
    after = catalog.resolve(reference, quant="F16", progress=notes)
    assert notes.titles == [], "nothing is made for it"
    assert after == old or after.revision == "1" * 40
    catalog.verify(after)
    new = catalog.resolve(reference, quant="F16", refresh=True)
    assert new.revision == "1" * 40
    catalog.verify(new)
    assert new.manifest is not None
    names = {path.name for path in new.path.parent.iterdir()}
    assert names >= {"manifest.json", *(file.name for file in new.manifest.files)}
    new.path.write_bytes(b"other")
    with pytest.raises(CatalogError, match="is damaged"):
        catalog.verify(new)
