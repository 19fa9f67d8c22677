"""Alerts, dashboard and autoscalers ask for metrics that the service has."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.engine.stats import EngineStats
from tests.helm.chart import EXAMPLES, Object, dashboard, of_kind, render, values_of

_NAME = re.compile(r"(?<![\w.$])([a-zA-Z_:][a-zA-Z0-9_:]*)(?=\{)")
"""A metric in PromQL: every query of ours gives its labels."""

FROM_PROMETHEUS = {"up"}


def metrics_of_the_service(prefix: str) -> set[str]:
    stats = EngineStats(*[0] * len(EngineStats.__dataclass_fields__))
    metrics = ServiceMetrics(prefix, lambda: stats)
    families = list(metrics.registry.collect())
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ("",))}


def queries_of(objects: list[Object]) -> Iterator[str]:
    for rule in of_kind(objects, "PrometheusRule"):
        yield from (entry["expr"] for group in rule["spec"]["groups"] for entry in group["rules"])
    for scaler in of_kind(objects, "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"])


def queries_of_the_dashboard() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@pytest.mark.parametrize(("example", "prefix"), [("scaled", "edge_phi3_"), ("hpa-ephemeral", "vllm:")])
def test_alerts_and_autoscalers_ask_for_metrics_there_are(example: str, prefix: str) -> None:
    objects = render(values_of(EXAMPLES[example]))
    known = metrics_of_the_service(prefix)
    asked = {name for query in queries_of(objects) for name in _NAME.findall(query)}
    assert {f"{prefix}num_requests_waiting", f"{prefix}requests_total", "up"} <= asked
    assert asked - FROM_PROMETHEUS <= known
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= known


def test_the_dashboard_asks_for_metrics_there_are() -> None:
    known = metrics_of_the_service("edge_phi3_")
    queries = list(queries_of_the_dashboard())
    asked = {name for query in queries for name in _NAME.findall(query)}
    assert len(asked) > 10
    assert asked <= known
    assert all(query.count("(") == query.count(")") for query in queries)


def test_the_dashboard_is_rendered_under_the_prefix_and_covers_the_engine() -> None:
    (map_,) = of_kind(render(values_of(EXAMPLES["hpa-ephemeral"])), "ConfigMap", "-dashboard")
    text = map_["data"]["edge-phi3.json"]
    assert "vllm:num_requests_running" in text
    assert "edge_phi3_" not in text
    assert map_["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells


def test_alerts_are_for_this_release_alone() -> None:
    values = values_of(EXAMPLES["scaled"])
    for query in queries_of(render(values, name="other", namespace="there")):
        assert query.count("{") == query.count('namespace="there", service="other-edge-phi3"')
