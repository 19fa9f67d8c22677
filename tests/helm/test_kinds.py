"""What must hold for every value of a kind: each may be null, each mode meets each storage, and ports are open."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest

from tests.helm.chart import (
    CHART,
    EXAMPLES,
    NEWEST,
    Object,
    loaded,
    of_kind,
    pod_of,
    render,
    schema_errors,
    values_of,
    workload,
)
from tests.helm.invariants import check_all
from tests.helm.test_properties import is_sentence


def joined(*parts: Object) -> Object:
    """Return the values of several files, as `helm -f a -f b` joins them."""
    result: Object = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = joined(result[key], value) if both else value
    return result


def at(path: tuple[str, ...], value: object) -> Object:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def nulls(values: Object, *above: str) -> Iterator[tuple[tuple[str, ...], Object]]:
    """Yield each map of the values with its way, and with null for all that it holds, but for what is asked for."""
    yield above, {key: None for key in values if ".".join((*above, key)) not in ASKED_FOR}
    for key, value in values.items():
        if isinstance(value, dict):
            yield from nulls(value, *above, key)


EVERYTHING = joined(
    *(values_of(EXAMPLES[name]) for name in ("everything-else", "public", "scaled", "mig")),
    {"keda": {"enabled": False}, "autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True}},
)
"""Values that make an object of almost every template."""

ASKED_FOR = {"ingress.hosts", "httpRoute.parentRefs", "inferencePool.endpointPicker", "extraVolumes"}
"""What cannot be null together with `EVERYTHING`, which needs it."""


@pytest.mark.parametrize("base", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_null_is_nothing_or_the_default_for_every_value(base: Object) -> None:
    before = render(base)
    ours = [path for path, _ in nulls(json.loads((CHART / "files" / "empty-values.json").read_text(encoding="utf-8")))]
    tried: list[tuple[tuple[str, ...], Object]]
    tried = [((key,), {key: None}) for key in loaded().values if key not in ASKED_FOR]
    tried += [(path, at(path, empty)) for path, empty in nulls(loaded().values) if path]
    for path, values in tried:
        objects = render(joined(base, values))
        # What lies deeper, within a part of a pod's own specification, means to Kubernetes what it likes.
        if len(path) == 1 or path in ours:
            check_all(objects, is_restricted="ecurityContext" not in path[0])
            assert schema_errors([obj for obj in objects if obj not in before], NEWEST) == [], path


def test_null_empties_what_is_a_list_or_a_map() -> None:
    emptied = ("resources", "nodeSelector", "tolerations", "podLabels", "podAnnotations", "updateStrategy", "affinity")
    objects = render(dict.fromkeys((*emptied, "commonLabels", "commonAnnotations", "gpu", "image", "auth", "serve")))
    pod = pod_of(objects)
    assert "nodeSelector" not in pod
    assert "tolerations" not in pod
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert "strategy" not in workload(objects)["spec"]
    assert "resources" not in pod_of(render({"resources": None, "gpu": {"enabled": False}}))["containers"][0]


MODES = ("initContainer", "job", "none")
STORAGES: dict[str, Object] = {
    "pvc": {},
    "existingClaim": {"existingClaim": "c", "accessMode": "ReadWriteMany"},
    "existingClaim, read": {"type": "existingClaim", "existingClaim": "c", "readOnly": True},
    "hostPath": {"hostPath": "/var/lib/phi3"},
    "hostPath, read": {"type": "hostPath", "hostPath": "/var/lib/phi3", "readOnly": True},
    "image": {"imageReference": "r/m:1"},
    "ephemeral": {},
    "emptyDir": {},
}
MODELS: dict[str, Object] = {
    "preset": {},
    "file": {"name": "/models/m.gguf"},
    "checkpoint": {"name": "/models/checkpoint"},
    "url": {"url": "https://h/m.gguf", "sha256": "0" * 64},
}
REFUSED = {
    # A job runs before the release's own volumes exist.
    *itertools.product(["job"], [name for name in STORAGES if "existingClaim" not in name], MODELS),
    # Nothing can be downloaded to what is only read, nor by the service from a URL.
    *itertools.product(MODES, ["existingClaim, read", "hostPath, read", "image"], ["url"]),
    *itertools.product(["none"], STORAGES, ["url"]),
    # An image is no store.
    *itertools.product(MODES, ["image"], ["preset"]),
}


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_every_mode_meets_every_storage_or_is_refused(kind: str) -> None:
    for mode, storage, model in itertools.product(MODES, STORAGES, MODELS):
        values: Object = {
            "workload": {"kind": kind},
            "storage": {"type": storage.split(",")[0], **STORAGES[storage]},
            "model": {**MODELS[model], "prepare": {"mode": mode}},
        }
        if (mode, storage, model) in REFUSED:
            with pytest.raises(helm_python.HelmRenderError) as caught:
                render(values)
            assert is_sentence(caught.value), caught.value
            continue
        objects = render(values)
        check_all(objects, is_restricted="hostPath" not in storage)
        assert schema_errors(objects, NEWEST) == []
        # Somebody who can write makes the model, unless it is there.
        is_there = model == "file" or "read" in storage or storage == "image"
        makers = [c["name"] for c in pod_of(objects).get("initContainers", [])] + ["job"] * len(of_kind(objects, "Job"))
        assert makers == ([] if is_there or mode == "none" else ["job" if mode == "job" else "prepare"])


PLACES: dict[str, Object] = {
    "model.url": {"model": {"url": "https://h:7001/m.gguf", "sha256": "0" * 64}},
    "model.endpoint": {"model": {"endpoint": "http://hub.example:7001"}},
    "networkPolicy.ports": {"networkPolicy": {"ports": [7001]}},
    "otel-endpoint": {"serve": {"options": {"otel-endpoint": "http://c:7001"}}},
    "a proxy": {"extraEnv": [{"name": "https_proxy", "value": "http://p:7001"}]},
    "a proxy of prepare": {"model": {"prepare": {"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://p:7001/"}]}}},
}


@pytest.mark.parametrize("mode", ["initContainer", "job"])
@pytest.mark.parametrize("place", PLACES)
def test_every_port_that_a_value_names_can_be_reached(place: str, mode: str) -> None:
    claim = {"type": "existingClaim", "existingClaim": "c", "accessMode": "ReadWriteMany"}
    objects = render(joined(PLACES[place], {"model": {"prepare": {"mode": mode}}, "storage": claim}))
    fetching = mode == "job" and place != "otel-endpoint"
    for suffix in ["-prepare"] if fetching else [""]:
        (policy,) = of_kind(objects, "NetworkPolicy", f"edge-phi3{suffix}")
        reached = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
        assert {53, 7001} <= reached


def test_every_port_of_a_container_can_be_connected_to() -> None:
    safe = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    ports: list[Any] = [
        {"containerPort": 7001, "name": "a"},
        {"containerPort": 7001, "protocol": "UDP"},
        {"containerPort": 7002},
    ]
    sources: list[list[Object]] = [[], [{"podSelector": {}}]]
    for source in sources:
        values = {
            "extraContainers": [{"name": "x", "image": "x", "ports": ports, "securityContext": safe}],
            "networkPolicy": {"from": source},
        }
        objects = render(values)
        check_all(objects)
        assert schema_errors(objects, NEWEST) == []
        wanted = {(port["containerPort"], port.get("protocol", "TCP")) for port in ports}
        (service,), (policy,) = of_kind(objects, "Service"), of_kind(objects, "NetworkPolicy")
        assert {(port["targetPort"], port["protocol"]) for port in service["spec"]["ports"]} == wanted | {
            ("http", "TCP")
        }
        (rule, *_) = policy["spec"]["ingress"]
        assert {(port["port"], port["protocol"]) for port in rule["ports"]} == wanted | {("http", "TCP")}


@pytest.mark.parametrize(
    "base", [{"storage": {"type": "ephemeral"}}, EVERYTHING, {"workload": {"kind": "StatefulSet"}}]
)
def test_a_new_version_of_the_chart_alone_restarts_no_pod(base: Object, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "edge-phi3")
    about = tmp_path / "edge-phi3" / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: ", "\nversion: 9"))
    with helm_python.Chart.load(about.parent) as newer:
        assert newer.version != loaded().version
        texts = newer.render(base, name="edge-phi3", namespace="ai")
    before = workload(render(base))["spec"]
    (after,) = [text for path, text in texts.items() if path.endswith("/workload.yaml")]
    new = helm_python.values_from_yaml(after)["spec"]
    # What cannot be changed in a StatefulSet neither.
    for key in ("template", "selector", "volumeClaimTemplates"):
        assert new.get(key) == before.get(key)


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "HTTPRoute", "InferencePool", "ScaledObject"])
def test_a_field_that_a_custom_resource_does_not_have_is_seen(kind: str) -> None:
    (found,) = of_kind(render(values_of(EXAMPLES["scaled"])), kind)
    assert schema_errors([found], NEWEST) == []
    assert schema_errors([joined(found, {"spec": {"intreval": "15s"}})], NEWEST)
    assert schema_errors([joined(found, {"apiVersion": "example.com/v1"})], NEWEST)
