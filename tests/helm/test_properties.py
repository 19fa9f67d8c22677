"""Whatever values are given, the chart makes a sound release or refuses them with a sentence."""

from __future__ import annotations

from pathlib import Path

import helm_python
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from tests.helm.chart import NEWEST, Object, loaded, of_kind, render, schema_errors
from tests.helm.invariants import check_all, check_service_options

names = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
foreign = names.map("foreign.{}".format)  # never the name of an object of the chart: those have no dot
label_values = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,40}[A-Za-z0-9])?", fullmatch=True)
labels = st.dictionaries(names.map("example.com/{}".format), label_values, max_size=2)
texts = st.dictionaries(names.map("example.com/{}".format), st.text(max_size=20), max_size=2)
booleans = st.booleans()


def some(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[Object]:
    """Give dictionaries with any of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


# Options whose schema says less than the service asks of them.
READ_FURTHER = {
    "max-body-size": st.integers(1024, 1 << 30),
    "host": st.sampled_from(["0.0.0.0", "::"]),
    "lora": st.lists(names.map("/models/{}.gguf=0.5".format), min_size=1, max_size=2),
    "cors-origin": st.lists(names.map("https://{}.example".format), min_size=1, max_size=3),
    "otel-endpoint": names.map("http://{}.example:4318".format),
    "rate-limit": st.sampled_from(["60/minute", "5/second"]),
    "metrics-prefix": st.sampled_from(["edge_phi3_", "vllm:"]),
}


def option(key: str, schema: Object) -> st.SearchStrategy[object]:
    """Give values of an option of the service that its schema allows."""
    if key in READ_FURTHER:
        return READ_FURTHER[key]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    least, most = schema.get("minimum", 0), schema.get("maximum", 1 << 40)
    kinds = {
        "boolean": booleans,
        "integer": st.integers(least, most),
        "number": st.one_of(st.integers(least, most), st.floats(least, most).map(lambda value: round(value, 3))),
    }
    return kinds[schema["type"]]


def options() -> st.SearchStrategy[Object]:
    """Give any of the options that the chart's schema has: a new one is tried as soon as it is there."""
    schema = loaded().schema
    assert schema is not None
    described = schema["properties"]["serve"]["properties"]["options"]["properties"]
    return some(**{key: option(key, described[key]) for key in described})


storage = st.one_of(
    some(
        type=st.sampled_from(["pvc", "ephemeral", "emptyDir"]),
        size=st.sampled_from(["10Gi", "500G"]),
        storageClassName=st.one_of(st.just("-"), names),
        accessMode=st.sampled_from(["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]),
        keep=booleans,
        annotations=texts,
        mountPath=st.sampled_from(["/models", "/var/lib/models"]),
    ),
    st.fixed_dictionaries(
        {"type": st.just("existingClaim"), "existingClaim": foreign},
        optional={"readOnly": booleans, "subPath": names},
    ),
    st.fixed_dictionaries({"type": st.just("image"), "imageReference": names}),
)
models = st.one_of(
    some(name=st.sampled_from(["demo", "phi-3-mini-128k-instruct"]), quant=st.sampled_from(["Q8_0", "IQ4_XS", "F16"])),
    st.fixed_dictionaries({"name": st.just("owner/name")}, optional={"revision": names, "offline": booleans}),
    st.fixed_dictionaries({"name": names.map("/models/{}.gguf".format)}),
    st.fixed_dictionaries({"url": names.map("https://h.example/{}.gguf?a=b".format), "sha256": st.just("ab" * 32)}),
).flatmap(lambda model: prepares.map(lambda prepare: model | {"prepare": prepare}))
prepares = some(
    mode=st.sampled_from(["initContainer", "job", "none"]), resources=st.just({"limits": {"memory": "4Gi"}})
)
spread = st.fixed_dictionaries(
    {
        "maxSkew": st.integers(1, 3),
        "topologyKey": st.just("kubernetes.io/hostname"),
        "whenUnsatisfiable": st.sampled_from(["ScheduleAnyway", "DoNotSchedule"]),
    }
)
values = some(
    nameOverride=names,
    fullnameOverride=names,
    commonLabels=labels,
    commonAnnotations=texts,
    podLabels=labels,
    podAnnotations=texts,
    image=some(registry=names, tag=names, pullPolicy=st.sampled_from(["Always", "Never"])),
    model=models,
    serve=st.fixed_dictionaries({"options": options()}),
    auth=st.one_of(
        some(keys=st.lists(names, max_size=3, unique=True)), st.fixed_dictionaries({"existingSecret": foreign})
    ),
    gpu=some(
        enabled=booleans,
        count=st.integers(1, 8),
        resourceName=st.sampled_from(["nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb"]),
        runtimeClassName=names,
        dra=some(enabled=booleans, selectors=st.lists(st.just("true"), max_size=2)),
    ),
    storage=storage,
    replicas=st.integers(0, 5),
    shutdown=some(graceSeconds=st.integers(0, 3600), delaySeconds=st.integers(0, 60)),
    autoscaling=some(enabled=booleans, minReplicas=st.integers(1, 6)),
    keda=some(enabled=booleans, minReplicas=st.integers(0, 6), threshold=st.floats(0.5, 100)),
    podDisruptionBudget=some(enabled=booleans, maxUnavailable=st.sampled_from([1, "50%"])),
    service=some(type=st.sampled_from(["NodePort", "LoadBalancer"]), port=st.integers(1, 65535), annotations=texts),
    ingress=some(enabled=booleans, hosts=st.lists(st.fixed_dictionaries({"host": names}), max_size=2)),
    httpRoute=some(enabled=booleans, parentRefs=st.lists(st.fixed_dictionaries({"name": names}), max_size=2)),
    inferencePool=some(enabled=booleans, endpointPicker=names),
    networkPolicy=some(enabled=booleans, ports=st.lists(st.integers(1, 65535), min_size=1, max_size=3, unique=True)),
    serviceMonitor=some(enabled=booleans, labels=labels),
    prometheusRule=some(enabled=booleans, queueLength=st.integers(0, 100), errorRate=st.floats(0, 1)),
    dashboard=some(enabled=booleans),
    serviceAccount=some(create=booleans, name=foreign),
    resources=some(requests=st.just({"cpu": "2"}), limits=st.just({"memory": "8Gi"})),
    tolerations=st.lists(st.just({"key": "a", "operator": "Exists"}), max_size=1),
    nodeSelector=labels,
    topologySpreadConstraints=st.lists(spread, max_size=1),
    extraEnv=st.lists(st.just({"name": "A", "value": "b"}), max_size=1),
    tests=some(enabled=booleans),
)


def is_sentence(error: helm_python.HelmRenderError) -> bool:
    """Tell the chart's own refusals from a mistake in a template, which breaks off elsewhere and in other words."""
    return str(error).startswith("execution error at (edge-phi3/templates/deployment.yaml:1:4): ") and str(
        error
    ).endswith(".")


@given(values=values, release=names)
@settings(
    max_examples=150,
    deadline=None,
    # A drawn example says enough; making it smaller takes minutes at a render each.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_any_values_make_a_sound_release_or_a_sentence(
    values: Object, release: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        objects = render(values, name=release)
    except helm_python.HelmRenderError as error:
        event("refused")
        if not is_sentence(error):
            raise
        return
    event("rendered")
    check_all(objects)
    assert [error for obj in objects for error in schema_errors(obj, NEWEST)] == []
    keys = tmp_path_factory.getbasetemp() / "keys"
    keys.write_text("key\n")
    check_service_options(objects, {"log-format": "json"} | values.get("serve", {}).get("options", {}), Path(keys))
    scaled = values.get("autoscaling", {}).get("enabled") or values.get("keda", {}).get("enabled")
    (deployment,) = of_kind(objects, "Deployment")
    assert ("replicas" in deployment["spec"]) == (not scaled), "an autoscaler and the chart would fight"
