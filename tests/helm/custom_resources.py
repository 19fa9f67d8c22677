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

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT: Schema = {"type": "integer", "minimum": 0}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
PROMETHEUS_DURATION: Schema = {"type": "string", "pattern": r"^(0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$"}
GATEWAY_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def fields(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object with these fields and no other; `required` names some, with spaces between."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def list_of(items: Schema, at_least: int = 0, at_most: int = 16) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, "minItems": at_least, "maxItems": at_most}


SELECTOR = fields("matchLabels", matchLabels=TEXTS)

HTTP_ROUTE = fields(
    "parentRefs rules",
    parentRefs=list_of(
        fields("name", group=TEXT, kind=TEXT, name=NAME, namespace=NAME, sectionName=NAME, port=PORT), 1, 32
    ),
    hostnames=list_of({"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}),
    rules=list_of(
        fields(
            "backendRefs",
            matches=list_of(
                fields(path=fields(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=TEXT))
            ),
            timeouts=fields(request=GATEWAY_DURATION, backendRequest=GATEWAY_DURATION),
            backendRefs=list_of(
                {
                    **fields("name", group=TEXT, kind=TEXT, name=NAME, port=PORT),
                    # A Service, which is what a reference without a kind is, needs a port.
                    "anyOf": [{"required": ["port"]}, {"required": ["group", "kind"]}],
                },
                1,
            ),
        ),
        1,
    ),
)

INFERENCE_POOL = fields(
    "selector targetPorts endpointPickerRef",
    selector=SELECTOR,
    targetPorts=list_of(fields("number", number=PORT), 1, 8),
    endpointPickerRef=fields(
        "name port",
        group={"type": "string"},
        kind=TEXT,
        name=NAME,
        port=fields("number", number=PORT),
        failureMode={"enum": ["FailOpen", "FailClose"]},
    ),
)

SCALED_OBJECT = fields(
    "scaleTargetRef triggers",
    scaleTargetRef=fields("name", apiVersion=TEXT, kind=TEXT, name=NAME),
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    pollingInterval=COUNT,
    cooldownPeriod=COUNT,
    triggers=list_of(
        fields(
            "type metadata",
            type={"const": "prometheus"},
            # KEDA's metadata are texts, numbers too.
            metadata=fields("serverAddress threshold query", serverAddress=TEXT, threshold=TEXT, query=TEXT),
            authenticationRef=fields("name", name=NAME),
        ),
        1,
    ),
)

SERVICE_MONITOR = fields(
    "selector endpoints",
    selector=SELECTOR,
    namespaceSelector=fields(matchNames=list_of(NAME)),
    endpoints=list_of(fields("port", port=TEXT, path=TEXT, interval=PROMETHEUS_DURATION), 1),
)

PROMETHEUS_RULE = fields(
    groups=list_of(
        fields(
            "name rules",
            name=TEXT,
            rules=list_of(
                {
                    **fields(
                        "expr",
                        alert=TEXT,
                        record=TEXT,
                        expr=TEXT,
                        labels=TEXTS,
                        annotations=TEXTS,
                        **{"for": PROMETHEUS_DURATION},
                    ),
                    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                },
                1,
                100,
            ),
        ),
        1,
    )
)


def resource(spec: Schema) -> Schema:
    """Return the schema of a whole custom resource."""
    metadata = fields("name namespace", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    return fields("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)


CUSTOM_RESOURCES: dict[str, dict[str, Schema]] = {
    "HTTPRoute": {"gateway.networking.k8s.io/v1": resource(HTTP_ROUTE)},
    "InferencePool": {"inference.networking.k8s.io/v1": resource(INFERENCE_POOL)},
    "ScaledObject": {"keda.sh/v1alpha1": resource(SCALED_OBJECT)},
    "ServiceMonitor": {"monitoring.coreos.com/v1": resource(SERVICE_MONITOR)},
    "PrometheusRule": {"monitoring.coreos.com/v1": resource(PROMETHEUS_RULE)},
}
"""Kind -> API version -> schema."""
