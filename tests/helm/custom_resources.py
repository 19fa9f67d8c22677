"""What the custom resources that the chart makes may hold, in our own words, after their published API references.

Kubernetes' own schemas do not know them. These allow only fields that the chart uses, so that a misspelt one is
noticed.

- HTTPRoute: Gateway API v1, https://gateway-api.sigs.k8s.io/reference/spec/
- InferencePool: Gateway API Inference Extension v1, https://gateway-api-inference-extension.sigs.k8s.io/reference/spec/
- ScaledObject: KEDA 2, https://keda.sh/docs/latest/reference/scaledobject-spec/
- ServiceMonitor, PrometheusRule: Prometheus Operator v1, https://prometheus-operator.dev/docs/api-reference/api/
"""

from __future__ import annotations

from typing import Any

TEXT = r"[\s\S]+"
NAME = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
TEXTS = {"*": r"[\s\S]*"}
PORT, COUNT = range(1, 65536), range(1 << 31)
PROMETHEUS_DURATION = r"0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?"
GATEWAY_DURATION = "([0-9]{1,5}(h|m|s|ms)){1,4}"
TARGET = {"group": TEXT, "kind": TEXT, "name!": NAME, "port": PORT}
RULE = {"expr!": TEXT, "labels": TEXTS, "annotations": TEXTS, "for": PROMETHEUS_DURATION}
SELECTOR = {"matchLabels!": TEXTS}

SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): {
        "parentRefs!": [TARGET | {"namespace": NAME, "sectionName": NAME}],
        "hostnames": [r"(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?"],
        "rules!": [
            {
                "matches": [{"path": {"type": "Exact|PathPrefix|RegularExpression", "value": TEXT}}],
                "timeouts": {"request": GATEWAY_DURATION, "backendRequest": GATEWAY_DURATION},
                # A Service, which is what a reference without a kind is, needs a port.
                "backendRefs!": [(TARGET | {"port!": PORT}, TARGET | {"group!": TEXT, "kind!": TEXT})],
            }
        ],
    },
    ("inference.networking.k8s.io/v1", "InferencePool"): {
        "selector!": SELECTOR,
        "targetPorts!": [{"number!": PORT}],
        "endpointPickerRef!": {
            "group": TEXTS["*"],
            "kind": TEXT,
            "name!": NAME,
            "port!": {"number!": PORT},
            "failureMode": "FailOpen|FailClose",
        },
    },
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "scaleTargetRef!": {"apiVersion": TEXT, "kind": TEXT, "name!": NAME},
        **dict.fromkeys(("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"), COUNT),
        "triggers!": [
            {
                "type!": "prometheus",
                # KEDA's metadata are texts, numbers too.
                "metadata!": {"serverAddress!": TEXT, "threshold!": TEXT, "query!": TEXT},
                "authenticationRef": {"name!": NAME},
            }
        ],
    },
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "selector!": SELECTOR,
        "namespaceSelector": {"matchNames": [NAME]},
        "endpoints!": [{"port!": TEXT, "path": TEXT, "interval": PROMETHEUS_DURATION}],
    },
    ("monitoring.coreos.com/v1", "PrometheusRule"): {
        "groups": [{"name!": TEXT, "rules!": [(RULE | {"alert!": TEXT}, RULE | {"record!": TEXT})]}],
    },
}
"""The shape of each resource's ``spec``, by API version and kind.

A dictionary is an object with these fields and no other, those with a ``!`` required (``*`` is any field); a list is
one of 1 to 32 such things; a tuple is one of several shapes; a range holds integers; a text is a regular expression.
"""


def schema_of(shape: Any) -> dict[str, Any]:
    if isinstance(shape, str):
        return {"type": "string", "pattern": f"^(?:{shape})$"}
    if isinstance(shape, range):
        return {"type": "integer", "minimum": shape.start, "maximum": shape.stop - 1}
    if isinstance(shape, tuple):
        return {"anyOf": [schema_of(each) for each in shape]}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0]), "minItems": 1, "maxItems": 32}
    required = [name.removesuffix("!") for name in shape if name.endswith("!")]
    fields = {name.removesuffix("!"): schema_of(each) for name, each in shape.items()}
    others = fields.pop("*", False)
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": others}


METADATA = {"name!": NAME, "namespace!": NAME, "labels": TEXTS, "annotations": TEXTS}
CUSTOM_RESOURCES = {
    key: schema_of({"apiVersion!": TEXT, "kind!": TEXT, "metadata!": METADATA, "spec!": spec})
    for key, spec in SPECS.items()
}
