"""The chart renders to valid objects, or refuses values with a sentence; what it watches is there to be watched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest

from edge_phi3 import __version__
from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.catalog.reference import parse_reference
from edge_phi3.engine.stats import EngineStats
from tests.helm.chart import (
    CHART,
    DATA,
    EXAMPLES,
    NEWEST,
    Object,
    loaded,
    of_kind,
    oldest_kubernetes,
    pod_of,
    preparer,
    render,
    render_texts,
    schema_errors,
    server,
    values_of,
    workload,
)
from tests.helm.invariants import check_all, check_service_options

REJECTIONS = values_of(DATA / "rejections.yaml")
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))

_METRIC = re.compile(r"(?<![\w.$])([a-zA-Z_:][a-zA-Z0-9_:]*)(?=\{)")
"""A metric in PromQL: every query of ours gives its labels."""


def header_of(example: str, key: str) -> str | None:
    """Return what an example says of itself in a comment such as ``# kubernetes: 1.34``."""
    found = re.search(rf"^# {key}: (.+)$", EXAMPLES[example].read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_makes_a_sound_release_under_any_name(example: str, tmp_path: Path) -> None:
    values, keys = values_of(EXAMPLES[example]), tmp_path / "api-keys"
    keys.write_text("key\n")
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    # Severity 1 is information: a chart without an icon.
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    oldest = header_of(example, "kubernetes")
    assert oldest is not None, "an example says from which Kubernetes on it works"
    for release in ("edge-phi3", "r", "3phi", "a.b", "a-release-name-of-the-53-characters-that-helm-allows-x"):
        objects = render(values, name=release)
        check_all(objects, is_restricted=header_of(example, "restricted") != "false")
        assert schema_errors(objects, oldest, NEWEST) == []
    options = values.get("serve", {}).get("options", {})
    check_service_options(objects, {"log-format": "json", **options}, keys)


def test_examples_span_the_supported_versions() -> None:
    assert header_of("defaults", "kubernetes") == oldest_kubernetes()
    assert schema_errors(render(values_of(EXAMPLES["dra"])), "1.33"), "the checks see what is too new"


def part_of(whole: Any, keys: list[str]) -> Any:
    """Return a part of an object, None where there is none; the key * takes a part of each item."""
    if not keys:
        return whole
    if keys[0] == "*":
        return [part_of(item, keys[1:]) for item in whole]
    return part_of(whole[int(keys[0])] if isinstance(whole, list) else whole.get(keys[0]), keys[1:])


@pytest.mark.parametrize("case", values_of(DATA / "renders.yaml"), ids=lambda case: case["it"].replace(" ", "-"))
def test_the_chart(case: Any) -> None:
    values = values_of(EXAMPLES[case["example"]]) if "example" in case else case.get("values", {})
    objects = render(values)
    named: Object = {f"{obj['kind']}/{obj['metadata']['name']}": obj for obj in objects} | {"pod": pod_of(objects)}
    expected = json.loads(json.dumps(case.get("parts", {})).replace("VERSION", __version__))
    assert {path: part_of(named, path.split()) for path in expected} == expected
    notes = render_texts(values)["NOTES.txt"]
    assert [line for line in case.get("notes", []) if line not in notes] == []
    if model := case.get("serves"):
        parse_reference(model)
        assert server(objects)["args"][:2] == ["serve", model]
        assert preparer(objects)["command"][:3] == ["edge-phi3", "pull", model]


@pytest.mark.parametrize("values", values_of(DATA / "operators.yaml").values(), ids=str)
def test_what_operators_set_makes_a_sound_release(values: Object, tmp_path: Path) -> None:
    objects, keys = render(values), tmp_path / "api-keys"
    keys.write_text("key\n")
    check_all(objects)
    assert schema_errors(objects, NEWEST) == []
    check_service_options(objects, {"log-format": "json"} | values.get("serve", {}).get("options", {}), keys)


def test_changed_keys_restart_the_pods() -> None:
    first, again, other = (workload(render({"auth": {"keys": [key]}}))["spec"]["template"] for key in "aab")
    assert first == again != other


def test_package_and_show(tmp_path: Path) -> None:
    archive = helm_python.package(CHART, destination=tmp_path)
    assert Path(archive).name == f"edge-phi3-{loaded().version}.tgz"
    with helm_python.Chart.load(archive) as packaged:
        assert packaged.values == loaded().values
        assert packaged.schema == loaded().schema
        names = {file["name"] for file in packaged.files}
        assert {"README.md", "files/fetch_model.py", "files/dashboard.json"} <= names
        assert not [name for name in names if name.startswith("ci/")]
        assert packaged.render({}, name="a", namespace="b") == loaded().render({}, name="a", namespace="b")


def test_every_value_is_used_by_a_template() -> None:
    templates = "\n".join(template["data"] for template in loaded().templates)
    assert [key for key in loaded().values if not re.search(rf"(\.Values|\$v)\.{key}", templates)] == []


@pytest.mark.parametrize(("values", "named"), REJECTIONS["schema"], ids=str)
def test_the_schema_refuses(values: Object, named: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as caught:
        render(values)
    assert named in str(caught.value)


@pytest.mark.parametrize(("values", "sentence"), REJECTIONS["templates"], ids=str)
def test_values_that_do_not_fit_together_are_refused(values: Object, sentence: str) -> None:
    with pytest.raises(helm_python.HelmRenderError) as caught:
        render(values)
    assert sentence in str(caught.value)


def metrics_of_the_service(prefix: str) -> set[str]:
    stats = EngineStats()
    families = list(ServiceMetrics(prefix, lambda: stats).registry.collect())
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ("",))}


def queries_of(objects: list[Object]) -> Iterator[str]:
    for rule in of_kind(objects, "PrometheusRule"):
        yield from (entry["expr"] for group in rule["spec"]["groups"] for entry in group["rules"])
    for scaler in of_kind(objects, "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"])


@pytest.mark.parametrize(("example", "prefix"), [("scaled", "edge_phi3_"), ("hpa-ephemeral", "vllm:")])
def test_alerts_and_autoscalers_ask_for_metrics_there_are_of_this_release_alone(example: str, prefix: str) -> None:
    objects = render(values_of(EXAMPLES[example]), name="other", namespace="there")
    known, queries = metrics_of_the_service(prefix), list(queries_of(objects))
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert {f"{prefix}num_requests_waiting", f"{prefix}requests_total", "up"} <= asked
    # Those of kube-state-metrics, in the names that its documents give them.
    kube = {"kube_deployment_spec_replicas", "kube_deployment_status_replicas_ready"}
    assert asked - {"up"} - kube <= known
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= known
    for query in queries:
        own = re.findall(r'\{namespace="there", (?:service|deployment)="other-edge-phi3"', query)
        assert query.count("{") == len(own)


def test_the_dashboard_asks_for_metrics_there_are() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert len(asked) > 10
    assert asked <= metrics_of_the_service("edge_phi3_")
    assert all(query.count("(") == query.count(")") for query in queries)


def test_the_dashboard_is_rendered_under_the_prefix_and_covers_the_engine() -> None:
    (map_,) = of_kind(render(values_of(EXAMPLES["hpa-ephemeral"])), "ConfigMap", "-dashboard")
    text = map_["data"]["edge-phi3.json"]
    assert "vllm:num_requests_running" in text
    assert "edge_phi3_" not in text
    assert map_["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
