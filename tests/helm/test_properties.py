"""Whatever values are given, the chart makes a sound release or refuses them with a sentence."""

import math
import re
from typing import Any

import helm_python
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from tests.helm.chart import EXAMPLES, NEWEST, Object, render, schema, schema_errors, values_of, workload
from tests.helm.invariants import check_all, check_service_options, service_options

names = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
label_values = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,40}[A-Za-z0-9])?", fullmatch=True)
labels = st.dictionaries(names.map("example.com/{}".format), label_values, max_size=2)
texts = st.dictionaries(names.map("example.com/{}".format), st.text(max_size=20), max_size=2)


def some(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[Object]:
    return st.fixed_dictionaries({}, optional=fields)


# Options whose schema says less than the service asks of them.
READ_FURTHER = {
    "max-body-size": st.integers(1024, 1 << 30),
    "max-header-size": st.integers(1024, 1 << 20),
    "max-schema-size": st.integers(1024, 1 << 20),
    "speculation": st.sampled_from(["auto", "off", "5"]),
    "host": st.sampled_from(["0.0.0.0", "::"]),
    "lora": st.lists(names.map("/models/{}.gguf=0.5".format), min_size=1, max_size=2),
    "cors-origin": st.lists(names.map("https://{}.example".format), min_size=1, max_size=3),
    "allowed-host": st.lists(names.map("{}.example".format), min_size=1, max_size=2),
    "trusted-proxies": st.lists(st.sampled_from(["10.0.0.0/8", "::1", "*"]), min_size=1, max_size=2),
    "otel-endpoint": names.map("http://{}.example:4318".format),
    "rate-limit": st.sampled_from(["60/minute", "5/second"]),
    "metrics-prefix": st.sampled_from(["edge_phi3_", "vllm:"]),
}


def option(key: str, described: Object) -> st.SearchStrategy[object]:
    """Return values of an option of the service that its schema allows."""
    if key in READ_FURTHER:
        return READ_FURTHER[key]
    if "enum" in described:
        return st.sampled_from(described["enum"])  # null among them
    least, most = described.get("minimum", 0), described.get("maximum", 1 << 40)
    whole = st.integers(math.ceil(least), most)
    number = whole | st.floats(least, most).map(lambda value: round(value, 3))
    return {"boolean": st.booleans(), "integer": whole, "number": number}[described["type"][0]]


adapter = st.fixed_dictionaries(
    {"file": names.map("/models/{}.gguf".format)},
    optional={"name": names, "strength": st.sampled_from([0, 1, 2, 0.5, -1.25])},
)
adapters = st.lists(adapter, max_size=3, unique_by=lambda adapter: adapter.get("name", adapter["file"]))
# Any of the options that the chart's schema has: a new one is tried as soon as it is there.
described = schema()["properties"]["serve"]["properties"]["options"]["properties"]
options = some(**{key: option(key, described[key]) for key in described})


def joined(one: st.SearchStrategy[Object], other: st.SearchStrategy[Object]) -> st.SearchStrategy[Object]:
    return st.tuples(one, other).map(lambda both: both[0] | both[1])


# For each value that an example sets, what any of the examples has there.
examples = [values_of(path) for path in EXAMPLES.values()]
mixed: dict[str, st.SearchStrategy[Any]] = {
    key: st.sampled_from([example[key] for example in examples if key in example])
    for key in sorted({key for example in examples for key in example if not key.startswith("extra")})
}
further: dict[str, st.SearchStrategy[object]] = {
    "nameOverride": names,
    "fullnameOverride": names,
    "commonLabels": labels,
    "commonAnnotations": texts,
    "podLabels": labels,
    "podAnnotations": texts,
    "image": some(registry=names, tag=names, pullPolicy=st.sampled_from(["Always", "Never"])),
    "model": joined(
        st.one_of(mixed["model"], st.just({"name": "owner/name"})),
        some(prepare=some(mode=st.sampled_from(["initContainer", "job", "none"]))),
    ),
    "serve": st.fixed_dictionaries({"options": options}, optional={"adapters": adapters}),
    "storage": st.one_of(mixed["storage"], some(keep=st.booleans(), annotations=texts, mountPath=st.just("/var/m"))),
    "workload": some(kind=st.sampled_from(["Deployment", "StatefulSet"])),
    "replicas": st.integers(0, 5),
    "shutdown": some(graceSeconds=st.integers(0, 3600), delaySeconds=st.integers(0, 60)),
    "nodeSelector": labels,
    "tests": some(enabled=st.booleans()),
}
everything_else = values_of(EXAMPLES["everything-else"])
extra = {key: value for key, value in everything_else.items() if key.startswith("extra")}  # a volume with its mount
values = joined(some(**mixed | further), st.sampled_from([{}, extra]))


def is_sentence(error: helm_python.HelmRenderError) -> re.Match[str] | None:
    """Tell the chart's own refusals from a mistake in a template, which breaks off elsewhere and in other words."""
    return re.fullmatch(r"execution error at \(edge-phi3/templates/[\w/.-]+:1:4\): .*\.", str(error), re.DOTALL)


@given(values=values, release=names)
@settings(
    max_examples=80,
    deadline=None,
    # A drawn example says enough; making it smaller takes minutes at a render each.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_any_values_are_sound_or_refused(
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
    check_all(objects, is_restricted=values.get("storage", {}).get("type") != "hostPath")
    assert schema_errors(objects, NEWEST) == []
    keys = tmp_path_factory.getbasetemp() / "keys"
    keys.write_text("key\n")
    check_service_options(objects, service_options(values), keys)
    scaled = values.get("autoscaling", {}).get("enabled") or values.get("keda", {}).get("enabled")
    assert ("replicas" in workload(objects)["spec"]) == (not scaled), "an autoscaler and the chart would fight"
