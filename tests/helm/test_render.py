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
from edge_phi3.catalog.reference import HubCheckpoint, parse_reference
from edge_phi3.engine.stats import EngineStats
from tests.helm.chart import (
    CHART,
    DATA,
    EXAMPLES,
    NEWEST,
    Object,
    containers,
    deployment,
    environment,
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
)
from tests.helm.invariants import check_all, check_service_options, routes

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
    for release in ("edge-phi3", "r", "a-release-name-of-the-53-characters-that-helm-allows-x"):
        objects = render(values, name=release)
        check_all(objects, is_restricted=header_of(example, "restricted") != "false")
        assert schema_errors(objects, oldest, NEWEST) == []
    options = values.get("serve", {}).get("options", {})
    check_service_options(objects, {"log-format": "json", **options}, keys)


def test_examples_span_the_supported_versions() -> None:
    assert header_of("defaults", "kubernetes") == oldest_kubernetes()
    assert schema_errors(render(values_of(EXAMPLES["dra"])), "1.33"), "the checks see what is too new"


def test_defaults_serve_phi_3_mini_on_one_gpu() -> None:
    objects = render()
    args = server(objects)["args"]
    assert args[1] == "phi-3-mini-4k-instruct"
    assert args[args.index("--quant") + 1] == "Q4_K_M"
    assert isinstance(parse_reference(args[1]), HubCheckpoint)
    assert server(objects)["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert deployment(objects)["spec"]["replicas"] == 1
    (service,) = of_kind(objects, "Service")
    assert [port["port"] for port in service["spec"]["ports"]] == [80]
    (claim,) = of_kind(objects, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_defaults_for_the_gpu_operator_can_be_taken_away() -> None:
    pod = pod_of(render({"gpu": {"nodeSelector": None, "tolerations": None}}))
    assert not pod.keys() & {"nodeSelector", "tolerations"}


def test_cpu_pods_ask_for_no_gpu_and_take_the_cpu_image() -> None:
    objects = render({"gpu": {"enabled": False}})
    assert "resources" not in server(objects)
    assert server(objects)["image"] == f"edge-phi3:{__version__}-cpu"
    assert "nodeSelector" not in pod_of(objects)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, f"edge-phi3:{__version__}-cuda"),
        ({"registry": "r.example:5000/ai/", "tag": "1.2"}, "r.example:5000/ai/edge-phi3:1.2"),
        ({"repository": "a/b", "tag": "x", "digest": "sha256:" + "0" * 64}, "a/b@sha256:" + "0" * 64),
    ],
)
def test_image(image: Object, expected: str) -> None:
    objects = render({"image": image})
    pod = deployment(objects)["spec"]["template"]
    assert {container["image"] for container in containers(pod)} == {expected}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"name": "microsoft/Phi-3-mini-4k-instruct", "revision": "abc"}, "microsoft/Phi-3-mini-4k-instruct@abc"),
        ({"name": "o/n/sub/file.gguf", "revision": "v1"}, "o/n@v1/sub/file.gguf"),
        ({"name": "o/n"}, "o/n"),
        ({"name": "demo"}, "demo"),
    ],
)
def test_model_references_are_those_of_the_catalog(model: Object, expected: str) -> None:
    objects = render({"model": model})
    args = server(objects)["args"]
    assert args[1] == expected
    assert preparer(objects)["command"][:3] == ["edge-phi3", "pull", expected]
    parse_reference(expected)


def test_only_pods_that_fetch_may_reach_out() -> None:
    def egress(example: str, suffix: str = "edge-phi3") -> Any:
        (policy,) = of_kind(render(values_of(EXAMPLES[example])), "NetworkPolicy", suffix)
        return policy["spec"]["egress"]

    assert {port["port"] for rule in egress("defaults") for port in rule["ports"]} == {53, 443}
    assert egress("air-gapped-claim") == egress("image-volume") == egress("cpu-demo") == []
    assert egress("air-gapped-checkpoint") == egress("air-gapped-checkpoint", "-prepare") == []
    assert egress("url")[1] == {
        "ports": [{"port": 8443, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "192.0.2.10/32"}}],
    }
    job = {"model": {"prepare": {"mode": "job"}}, "storage": {"type": "existingClaim", "existingClaim": "c"}}
    serving, preparing = of_kind(render(job), "NetworkPolicy")
    assert serving["spec"]["egress"] == []
    assert preparing["spec"]["egress"]


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://collector.site.example:4318", 4318), ("https://traces.example/otlp", 443), ("http://[fd00::1]", 80)],
)
def test_traces_reach_their_collector_and_nothing_else(endpoint: str, port: int) -> None:
    values = {"model": {"name": "demo"}, "serve": {"options": {"otel-endpoint": endpoint}}}
    (policy,) = of_kind(render(values), "NetworkPolicy")
    assert {item["port"] for rule in policy["spec"]["egress"] for item in rule["ports"]} == {53, port}
    fetching = {"serve": values["serve"], "networkPolicy": {"ports": [8443]}}
    (policy,) = of_kind(render(fetching), "NetworkPolicy")
    assert {item["port"] for rule in policy["spec"]["egress"] for item in rule["ports"]} == {53, 8443, port}


def test_the_job_comes_before_the_pods_and_takes_no_gpu() -> None:
    values = {"model": {"url": "https://h.example/m.gguf", "sha256": "0" * 64, "prepare": {"mode": "job"}}}
    objects = render(values | {"storage": {"type": "existingClaim", "existingClaim": "c"}})
    (job,) = of_kind(objects, "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    weights = {
        obj["kind"]: int(obj["metadata"]["annotations"]["helm.sh/hook-weight"])
        for obj in [*of_kind(objects, "ConfigMap"), *of_kind(objects, "NetworkPolicy", "-prepare"), job]
    }
    assert weights["ConfigMap"] < weights["Job"]
    assert weights["NetworkPolicy"] < weights["Job"]
    assert "initContainers" not in pod_of(objects)


def test_the_token_reaches_only_the_container_that_fetches() -> None:
    objects = render(values_of(EXAMPLES["mirror-token"]))
    prepare = preparer(objects)
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub-token", "key": "HF_TOKEN"}}}
    assert token in prepare["env"]
    assert environment(prepare)["HF_ENDPOINT"] == "https://hub.site.example"
    assert token not in server(objects)["env"]
    serving = server(render(values_of(EXAMPLES["mirror-token"]) | {"model": {"prepare": {"mode": "none"}}}))
    assert not [mount for mount in serving["volumeMounts"] if mount["name"] == "models" and mount.get("readOnly")]


def test_the_pool_takes_the_paths_whose_requests_name_a_model() -> None:
    (route,) = of_kind(render(values_of(EXAMPLES["scaled"])), "HTTPRoute")
    kinds = {
        rule["matches"][0]["path"]["value"]: rule["backendRefs"][0].get("kind", "Service")
        for rule in route["spec"]["rules"]
    }
    assert kinds == {"/v1": "InferencePool", "/": "Service"}
    assert {"/v1/chat/completions", "/v1/completions"} <= routes()


def test_changed_keys_restart_the_pods() -> None:
    first, again, other = (deployment(render({"auth": {"keys": [key]}}))["spec"]["template"] for key in "aab")
    assert first == again != other


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({}, ["port-forward service/edge-phi3 8080:80", "curl -X POST http://127.0.0.1:8080/chat"]),
        ({"service": {"port": 9000}}, ["8080:9000", "http://edge-phi3.ai.svc:9000/chat"]),
        (
            values_of(EXAMPLES["public"]),
            ["https://phi3.example.com/chat", "X-API-Key: $(kubectl", 'index .data "api-keys"'],
        ),
        (values_of(EXAMPLES["scaled"]), ["http://phi3.example.com/chat"]),
        (values_of(EXAMPLES["host-path"]), ["restricted Pod Security Standard does not allow"]),
        (values_of(EXAMPLES["time-sliced"]), ["ReadWriteOnce: all pods must run on one node"]),
    ],
)
def test_notes(values: Object, lines: list[str]) -> None:
    notes = render_texts(values)["NOTES.txt"]
    for line in lines:
        assert line in notes


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
    stats = EngineStats(*[0] * len(EngineStats.__dataclass_fields__))
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
    assert asked - {"up"} <= known
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= known
    for query in queries:
        assert query.count("{") == query.count('namespace="there", service="other-edge-phi3"')


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
