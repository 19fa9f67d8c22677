"""What must hold for every value of a kind: each may be null, each mode meets each storage, and ports are open."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import helm_python
import pytest

from tests.helm import chart
from tests.helm.invariants import check_all
from tests.helm.test_properties import is_sentence
from tests.support.cases import tables


def joined(*parts: chart.Object) -> chart.Object:
    """Return the values of several files, as `helm -f a -f b` joins them."""
    result: chart.Object = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = joined(result[key], value) if both else value
    return result


def at(path: tuple[str, ...], value: object) -> chart.Object:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def nulls(values: chart.Object, *above: str) -> Iterator[tuple[tuple[str, ...], chart.Object]]:
    """Yield each map of the values with its way, and with null for all that it holds, but for what is asked for."""
    yield above, {key: None for key in values if ".".join((*above, key)) not in ASKED_FOR}
    for key, value in values.items():
        if isinstance(value, dict):
            yield from nulls(value, *above, key)


EVERYTHING = joined(
    *(chart.values_of(chart.EXAMPLES[name]) for name in ("everything-else", "public", "scaled", "mig")),
    {"keda": {"enabled": False}, "autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True}},
)
"""Values that make an object of almost every template."""

ASKED_FOR = {"ingress.hosts", "httpRoute.parentRefs", "inferencePool.endpointPicker", "extraVolumes"}
"""What cannot be null together with `EVERYTHING`, which needs it."""


@pytest.mark.parametrize("base", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_null_is_nothing_or_the_default_for_every_value(base: chart.Object) -> None:
    before = chart.render(base)
    check_all(before)
    empty_values = json.loads((chart.CHART / "files" / "empty-values.json").read_text(encoding="utf-8"))
    ours = [path for path, _ in nulls(empty_values)]
    tried: list[tuple[tuple[str, ...], chart.Object]]
    tried = [((key,), {key: None}) for key in chart.loaded().values if key not in ASKED_FOR]
    tried += [(path, at(path, empty)) for path, empty in nulls(chart.loaded().values) if path]
    for path, values in tried:
        objects = chart.render(joined(base, values))
        # What lies deeper, within a part of a pod's own specification, means to Kubernetes what it likes.
        if objects != before and (len(path) == 1 or path in ours):
            check_all(objects, is_restricted="ecurityContext" not in path[0])
            assert chart.schema_errors([obj for obj in objects if obj not in before], chart.NEWEST) == [], path


def test_null_empties_what_is_a_list_or_a_map() -> None:
    emptied = ("resources", "nodeSelector", "tolerations", "podLabels", "podAnnotations", "updateStrategy", "affinity")
    others = ("commonLabels", "commonAnnotations", "gpu", "image", "auth", "serve")
    objects = chart.render(dict.fromkeys(emptied + others))
    assert not {"nodeSelector", "tolerations"} & chart.pod_of(objects).keys()
    assert chart.server(objects)["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert "strategy" not in chart.workload(objects)["spec"]
    assert "resources" not in chart.server(chart.render({"resources": None, "gpu": {"enabled": False}}))


MODES = ("initContainer", "job", "none")
STORAGES: dict[str, chart.Object] = tables(__file__)["STORAGES"]
MODELS: dict[str, chart.Object] = tables(__file__)["MODELS"]
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
        values: chart.Object = {
            "workload": {"kind": kind},
            "storage": {"type": storage.split(",")[0], **STORAGES[storage]},
            "model": {**MODELS[model], "prepare": {"mode": mode}},
        }
        if (mode, storage, model) in REFUSED:
            with pytest.raises(helm_python.HelmRenderError) as caught:
                chart.render(values)
            assert is_sentence(caught.value), caught.value
            continue
        objects = chart.render(values)
        check_all(objects, is_restricted="hostPath" not in storage)
        assert chart.schema_errors(objects, chart.NEWEST) == []
        # Somebody who can write makes the model, unless it is there.
        is_there = model == "file" or "read" in storage or storage == "image"
        makers = [container["name"] for container in chart.pod_of(objects).get("initContainers", [])]
        makers += ["job" for _ in chart.of_kind(objects, "Job")]
        assert makers == ([] if is_there or mode == "none" else ["job" if mode == "job" else "prepare"])


PLACES: dict[str, chart.Object] = tables(__file__)["PLACES"]


@pytest.mark.parametrize("mode", ["initContainer", "job"])
@pytest.mark.parametrize("place", PLACES)
def test_every_port_that_a_value_names_can_be_reached(place: str, mode: str) -> None:
    claim = {"type": "existingClaim", "existingClaim": "c", "accessMode": "ReadWriteMany"}
    objects = chart.render(joined(PLACES[place], {"model": {"prepare": {"mode": mode}}, "storage": claim}))
    fetching = mode == "job" and place != "otel-endpoint"
    for suffix in ["-prepare"] if fetching else [""]:
        (policy,) = chart.of_kind(objects, "NetworkPolicy", f"edge-phi3{suffix}")
        reached = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
        assert {53, 7001} <= reached


def test_every_port_of_a_container_can_be_connected_to() -> None:
    container: chart.Object = tables(__file__)["CONTAINER"]
    source: list[chart.Object]
    for source in ([], [{"podSelector": {}}]):
        objects = chart.render({"extraContainers": [container], "networkPolicy": {"from": source}})
        check_all(objects)
        assert chart.schema_errors(objects, chart.NEWEST) == []
        wanted = {(port["containerPort"], port.get("protocol", "TCP")) for port in container["ports"]}
        wanted.add(("http", "TCP"))
        (service,), (policy,) = chart.of_kind(objects, "Service"), chart.of_kind(objects, "NetworkPolicy")
        assert {(port["targetPort"], port["protocol"]) for port in service["spec"]["ports"]} == wanted
        assert {(port["port"], port["protocol"]) for port in policy["spec"]["ingress"][0]["ports"]} == wanted


@pytest.mark.parametrize(
    "base", [{"storage": {"type": "ephemeral"}}, EVERYTHING, {"workload": {"kind": "StatefulSet"}}]
)
def test_a_new_version_of_the_chart_alone_restarts_no_pod(base: chart.Object, tmp_path: Path) -> None:
    shutil.copytree(chart.CHART, tmp_path / "edge-phi3")
    about = tmp_path / "edge-phi3" / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: ", "\nversion: 9"))
    with helm_python.Chart.load(about.parent) as newer:
        assert newer.version != chart.loaded().version
        texts = newer.render(base, name="edge-phi3", namespace="ai")
    before = chart.workload(chart.render(base))["spec"]
    (after,) = [text for path, text in texts.items() if path.endswith("/workload.yaml")]
    new = helm_python.values_from_yaml(after)["spec"]
    # What cannot be changed in a StatefulSet neither.
    for key in ("template", "selector", "volumeClaimTemplates"):
        assert new.get(key) == before.get(key)


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "HTTPRoute", "InferencePool", "ScaledObject"])
def test_a_field_that_a_custom_resource_does_not_have_is_seen(kind: str) -> None:
    (found,) = chart.of_kind(chart.render(chart.values_of(chart.EXAMPLES["scaled"])), kind)
    assert chart.schema_errors([found], chart.NEWEST) == []
    assert chart.schema_errors([joined(found, {"spec": {"intreval": "15s"}})], chart.NEWEST)
    assert chart.schema_errors([joined(found, {"apiVersion": "example.com/v1"})], chart.NEWEST)
