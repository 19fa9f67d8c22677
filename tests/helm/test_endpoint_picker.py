"""The configuration of llm-d's endpoint picker fits the pods of the chart, and the picker."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, of_kind, render, values_of, workload
from tests.helm.invariants import routes
from tests.helm.test_render import metrics_of_the_service

ROUTER = values_of(CHART / "examples" / "llm-d-router-values.yaml")["router"]
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
    pool = (
        {"inferencePool": {"enabled": True, "endpointPicker": "p"}} if own else {"httpRoute": {"inferencePool": "phi3"}}
    )
    objects = render({**pool, "serve": {"options": {"metrics-prefix": prefix}}})
    labels = workload(objects)["spec"]["template"]["metadata"]["labels"]
    assert ROUTER["modelServers"]["matchLabels"].items() <= labels.items()
    (key,) = [plugin["parameters"]["engineLabelKey"] for plugin in CONFIG["plugins"] if "extractor" in plugin["type"]]
    assert labels[key] == ("vllm" if prefix == "vllm:" else "edge-phi3")
    (port,) = (
        of_kind(objects, "InferencePool")[0]["spec"]["targetPorts"] if own else ROUTER["modelServers"]["targetPorts"]
    )
    assert port == {"number": 8080}
    # Nothing restarts where there is no pool.
    assert key not in workload(render())["spec"]["template"]["metadata"]["labels"]
