"""The chart renders to valid objects, or refuses values with a sentence; what watches it, and picks its pods, fits."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from edge_phi3 import __version__
from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.catalog.reference import parse_reference
from edge_phi3.engine.stats import EngineStats
from tests.helm import chart
from tests.helm.invariants import check_all, check_service_options, routes, service_options

REJECTED = [(by, *case) for by, cases in chart.values_of(chart.DATA / "rejections.yaml").items() for case in cases]
DASHBOARD = json.loads((chart.CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))

_METRIC = re.compile(r"(?<![\w.$])([a-zA-Z_:][a-zA-Z0-9_:]*)(?=\{)")
"""A metric in PromQL: every query of ours gives its labels."""


def header_of(example: str, key: str) -> str | None:
    """Return what an example says of itself in a comment such as ``# kubernetes: 1.34``."""
    found = re.search(rf"^# {key}: (.+)$", chart.EXAMPLES[example].read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_an_example_makes_a_sound_release_under_any_name(example: str, tmp_path: Path) -> None:
    values, keys = chart.values_of(chart.EXAMPLES[example]), tmp_path / "api-keys"
    keys.write_text("key\n")
    report = helm_python.lint(chart.CHART, values, strict=True)
    assert report["errors"] == []
    # Severity 1 is information: a chart without an icon.
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    oldest = header_of(example, "kubernetes")
    assert oldest is not None, "an example says from which Kubernetes on it works"
    for release in ("edge-phi3", "r", "3phi", "a.b", "a-release-name-of-the-53-characters-that-helm-allows-x"):
        objects = chart.render(values, name=release)
        check_all(objects, is_restricted=header_of(example, "restricted") != "false")
        assert chart.schema_errors(objects, oldest, chart.NEWEST) == []
    check_service_options(objects, service_options(values), keys)


def test_examples_span_the_supported_versions() -> None:
    assert header_of("defaults", "kubernetes") == chart.oldest_kubernetes()
    too_new = chart.render(chart.values_of(chart.EXAMPLES["dra"]))
    assert chart.schema_errors(too_new, "1.33"), "the checks see what is too new"


def part_of(whole: Any, keys: list[str]) -> Any:
    """Return a part of an object, None where there is none; the key * takes a part of each item."""
    if not keys:
        return whole
    if keys[0] == "*":
        return [part_of(item, keys[1:]) for item in whole]
    return part_of(whole[int(keys[0])] if isinstance(whole, list) else whole.get(keys[0]), keys[1:])


@pytest.mark.parametrize(
    "case", chart.values_of(chart.DATA / "renders.yaml"), ids=lambda case: case["it"].replace(" ", "-")
)
def test_the_chart(case: Any) -> None:
    values = chart.values_of(chart.EXAMPLES[case["example"]]) if "example" in case else case.get("values", {})
    objects = chart.render(values)
    named: chart.Object = {f"{obj['kind']}/{obj['metadata']['name']}": obj for obj in objects} | {
        "pod": chart.pod_of(objects)
    }
    expected = json.loads(json.dumps(case.get("parts", {})).replace("VERSION", __version__))
    assert {path: part_of(named, path.split()) for path in expected} == expected
    notes = chart.render_texts(values)["NOTES.txt"]
    assert [line for line in case.get("notes", []) if line not in notes] == []
    if model := case.get("serves"):
        parse_reference(model)
        assert chart.server(objects)["args"][:2] == ["serve", model]
        assert chart.preparer(objects)["command"][:3] == ["edge-phi3", "pull", model]


@pytest.mark.parametrize("values", chart.values_of(chart.DATA / "operators.yaml").values(), ids=str)
def test_what_operators_set_makes_a_sound_release(values: chart.Object, tmp_path: Path) -> None:
    objects, keys = chart.render(values), tmp_path / "api-keys"
    keys.write_text("key\n")
    check_all(objects)
    assert chart.schema_errors(objects, chart.NEWEST) == []
    check_service_options(objects, {"log-format": "json"} | values.get("serve", {}).get("options", {}), keys)


def test_changed_keys_restart_no_pod_and_reach_it() -> None:
    first, other = (chart.workload(chart.render({"auth": {"keys": [key]}}))["spec"]["template"] for key in ("a", "x b"))
    assert first == other
    (mount,) = (mount for mount in first["spec"]["containers"][0]["volumeMounts"] if mount["name"] == "keys")
    assert "subPath" not in mount, "the kubelet never changes a file that is mounted by its path"


def test_package_and_show(tmp_path: Path) -> None:
    archive = helm_python.package(chart.CHART, destination=tmp_path)
    assert Path(archive).name == f"edge-phi3-{chart.loaded().version}.tgz"
    with helm_python.Chart.load(archive) as packaged:
        assert packaged.values == chart.loaded().values
        assert packaged.schema == chart.loaded().schema
        names = {file["name"] for file in packaged.files}
        assert {"README.md", "files/fetch_model.py", "files/dashboard.json"} <= names
        assert not [name for name in names if name.startswith("ci/")]
        assert packaged.render({}, name="a", namespace="b") == chart.loaded().render({}, name="a", namespace="b")


def test_every_value_is_used_by_a_template() -> None:
    templates = "\n".join(template["data"] for template in chart.loaded().templates)
    assert [key for key in chart.loaded().values if not re.search(rf"(\.Values|\$v)\.{key}", templates)] == []


@pytest.mark.parametrize(("by", "values", "words"), REJECTED, ids=str)
def test_values_that_cannot_work_are_refused(by: str, values: chart.Object, words: str) -> None:
    with pytest.raises(helm_python.HelmValuesError if by == "schema" else helm_python.HelmRenderError) as caught:
        chart.render(values)
    assert words in str(caught.value)


def metrics_of_the_service(prefix: str) -> set[str]:
    stats = EngineStats()
    families = list(ServiceMetrics(prefix, lambda: stats).registry.collect())
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ("",))}


def queries_of(objects: list[chart.Object]) -> Iterator[str]:
    for rule in chart.of_kind(objects, "PrometheusRule"):
        yield from (entry["expr"] for group in rule["spec"]["groups"] for entry in group["rules"])
    for scaler in chart.of_kind(objects, "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"])


@pytest.mark.parametrize(("example", "prefix"), [("scaled", "edge_phi3_"), ("hpa-ephemeral", "vllm:")])
def test_alerts_and_autoscalers_ask_for_metrics_there_are_of_this_release_alone(example: str, prefix: str) -> None:
    objects = chart.render(chart.values_of(chart.EXAMPLES[example]), name="other", namespace="there")
    known, queries = metrics_of_the_service(prefix), list(queries_of(objects))
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert {f"{prefix}num_requests_waiting", f"{prefix}requests_total", "up"} <= asked
    # Those of kube-state-metrics, in the names that its documents give them.
    kube = {"kube_deployment_spec_replicas", "kube_deployment_status_replicas_ready"}
    assert asked - {"up"} - kube <= known
    for scaler in chart.of_kind(objects, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= known
    for query in queries:
        own = re.findall(r'\{namespace="there", (?:service|deployment)="other-edge-phi3"', query)
        assert query.count("{") == len(own)


def test_the_dashboard_asks_for_metrics_there_are_under_the_prefix_in_panels_that_do_not_overlap() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert len(asked) > 10
    assert asked <= metrics_of_the_service("edge_phi3_")
    assert all(query.count("(") == query.count(")") for query in queries)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
    (map_,) = chart.of_kind(chart.render(chart.values_of(chart.EXAMPLES["hpa-ephemeral"])), "ConfigMap", "-dashboard")
    text = map_["data"]["edge-phi3.json"]
    assert "vllm:num_requests_running" in text
    assert "edge_phi3_" not in text
    assert map_["metadata"]["labels"]["grafana_dashboard"] == "1"


ROUTER = chart.values_of(chart.CHART / "examples" / "llm-d-router-values.yaml")["router"]
CONFIG: Any = yaml.safe_load(ROUTER["epp"]["pluginsCustomConfig"][ROUTER["epp"]["pluginsConfigFile"]])

KNOWN = {f"{name}-scorer": set[str]() for name in ("queue", "kv-cache-utilization", "prefix-cache")}
KNOWN["metrics-data-source"] = {"scheme", "path", "insecureSkipVerify"}
KNOWN["core-metrics-extractor"] = {"engineLabelKey", "defaultEngine", "engineConfigs"}
"""Plugins and their parameters in llm-d/llm-d-router v0.10.0, pkg/epp/framework/plugins."""

ENGINE = {"name", "queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "loraSpec", "cacheInfoSpec"}
"""Of its datalayer/extractor/metrics/factories.go."""


def test_the_picker_takes_the_configuration() -> None:
    assert (CONFIG["apiVersion"], CONFIG["kind"]) == ("llm-d.ai/v1alpha1", "EndpointPickerConfig")
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in CONFIG["plugins"]}
    assert all(plugins[name].keys() <= KNOWN[name] for name in plugins)
    used = [plugin["pluginRef"] for profile in CONFIG["schedulingProfiles"] for plugin in profile["plugins"]]
    assert set(used) <= plugins.keys()
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    assert engine.keys() <= ENGINE
    metrics = {value for key, value in engine.items() if key != "name"}
    assert len(metrics) == 4
    assert metrics <= metrics_of_the_service("edge_phi3_") | {"edge_phi3_cache_config_info"}
    assert plugins["metrics-data-source"]["path"] in routes()
    assert engine["name"] == extractor["defaultEngine"]


@pytest.mark.parametrize(("prefix", "own"), list(itertools.product(["edge_phi3_", "vllm:"], [False, True])))
def test_the_pods_are_those_that_it_looks_for(prefix: str, own: bool) -> None:
    pool = {"inferencePool": {"enabled": True, "endpointPicker": "p"}} if own else {"httpRoute": {"inferencePool": "p"}}
    objects = chart.render({**pool, "serve": {"options": {"metrics-prefix": prefix}}})
    labels = chart.workload(objects)["spec"]["template"]["metadata"]["labels"]
    assert ROUTER["modelServers"]["matchLabels"].items() <= labels.items()
    (key,) = [plugin["parameters"]["engineLabelKey"] for plugin in CONFIG["plugins"] if "extractor" in plugin["type"]]
    assert labels[key] == ("vllm" if prefix == "vllm:" else "edge-phi3")
    ports = chart.of_kind(objects, "InferencePool")[0]["spec"] if own else ROUTER["modelServers"]
    assert ports["targetPorts"] == [{"number": 8080}]
    # Nothing restarts where there is no pool.
    assert key not in chart.workload(chart.render())["spec"]["template"]["metadata"]["labels"]
