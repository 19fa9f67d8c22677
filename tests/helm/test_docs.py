"""What the pages say of the chart: values, commands and objects exist, and figures are right."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from edge_phi3.cli import app
from tests.helm.chart import CHART, NEWEST, Object, of_kind, oldest_kubernetes, render, schema, schema_errors
from tests.helm.invariants import violations
from tests.support.documents import PAGES, ROOT, blocks, commands_of, unfenced

PAGE = ROOT / "docs" / "deployment.md"
TEXT = PAGE.read_text(encoding="utf-8")

_DOTTED = re.compile(r"(?<![\w./-])(?<!-m )([a-z][A-Za-z]+(?:\.[A-Za-z-]+)+)(?==|`|[ ,;)])")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_named_is_one_of_the_charts(page: Path) -> None:
    named = _DOTTED.findall(unfenced(page.read_text(encoding="utf-8")))
    paths = {tuple(name.split(".")) for name in named}
    known = {path for path in paths if path[0] in schema()["properties"]}
    assert page != PAGE or len(known) > 20
    assert [path for path in sorted(known) if not _knows(schema(), *path)] == []


def test_every_yaml_block_of_a_page_is_values_that_render_or_objects() -> None:
    found = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "yaml")]
    assert len(found) >= 5
    loaders = []
    for block in found:
        documents = list(yaml.safe_load_all(block.text.replace("THE_SUM", "0" * 64)))
        if "kind" in documents[0]:
            assert schema_errors(documents, oldest_kubernetes(), NEWEST) == []
            loaders += [(pod, of_kind(documents, "PersistentVolumeClaim")) for pod in of_kind(documents, "Pod")]
        else:
            assert render(documents[0])
    ((loader, (claim,)),) = loaders
    assert list(violations(loader)) == []
    assert loader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_helm_commands_of_the_pages_render() -> None:
    commands = [words for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))]
    releases = [words for words in commands if words[:2] in (["helm", "install"], ["helm", "upgrade"])]
    assert len(releases) >= 5
    for words in releases:
        values: Object = {}
        for name, value in (word.split("=", 1) for word in words if re.match(r"[^-][^=]*=", word)):
            *path, last = name.split(".")
            target = values
            for key in path:
                target = target.setdefault(key, {})
            target[last] = yaml.safe_load(value)
        assert render(values)
        assert words[3].endswith(".tgz") or ROOT / words[3] == CHART


def _knows(described: Object, *path: str) -> bool:
    if not path:
        return True
    if "$ref" in described:
        described = schema()["definitions"][described["$ref"].rpartition("/")[2]]
    if "properties" not in described:
        return described.get("type") == "object"  # what Kubernetes checks, not the chart
    return path[0] in described["properties"] and _knows(described["properties"][path[0]], *path[1:])


def test_the_figures_of_the_kv_cache_are_those_of_its_shape() -> None:
    layers, heads, size = 32, 32, 96
    elements = 2 * layers * heads * size
    rows = re.findall(r"^ +\| (\d+)(?: \(.*?\))? \| ([\d.]+) GiB \| ([\d.]+) GiB \|", TEXT, re.MULTILINE)
    assert len(rows) == 3
    for tokens, f16, q8_0 in rows:
        assert f16 == f"{int(tokens) * elements * 2 / 2**30:.1f}"
        assert q8_0 == f"{int(tokens) * elements * 34 / 32 / 2**30:.1f}"
    assert f"{elements * 2 // 1024} KiB per token" in TEXT
    kept = [(1 << 30) // (elements * size // 32) for size in (64, 34)]
    assert "1024 MiB keep about {:,} tokens, or {:,} with".format(*kept) in TEXT


def test_the_planned_sizes_are_those_of_fit() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) GiB \| ([\d.]+) GiB \|", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for context in {row[1] for row in rows}:
        for column, kind in ((2, "f16"), (3, "q8_0")):
            written = {row[0]: float(row[column]) for row in rows if row[1] == context}
            command = f"fit phi-3-mini-4k-instruct --device gpu --memory 24GiB --ctx-size {context} --json"
            types = [flag for name in written for flag in ("--quant", name)]
            result = CliRunner().invoke(app, [*command.split(), "--kv-cache-type", kind, *types])
            assert result.exit_code == 0, result.stderr
            planned = {row["type"]: row["gpu"]["total"] / 2**30 for row in json.loads(result.stdout)["types"]}
            # Compute buffers differ a little from one CPU to another.
            assert written == pytest.approx(planned, abs=0.1)
