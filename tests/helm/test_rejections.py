"""Values that cannot work fail when they are given, with a sentence."""

from __future__ import annotations

import json

import helm_python
import pytest

from tests.helm.chart import Object, render

CLAIM = {"type": "existingClaim", "existingClaim": "models"}
SHA256 = "0" * 64

WRONG_TYPES_AND_RANGES: list[tuple[Object, str]] = [
    ({"replica": 2}, "replica"),
    ({"replicas": -1}, "replicas"),
    ({"replicas": "two"}, "replicas"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"image": {"digest": "sha256:123"}}, "digest"),
    ({"image": {"repository": ""}}, "repository"),
    ({"model": {"quant": "Q4"}}, "quant"),
    ({"model": {"name": ""}}, "name"),
    ({"model": {"url": "ftp://example.com/model.gguf", "sha256": SHA256}}, "url"),
    ({"model": {"url": "https://example.com/model.gguf"}}, "sha256"),
    ({"model": {"url": "https://example.com/model.gguf", "sha256": "abc"}}, "sha256"),
    ({"model": {"prepare": {"mode": "sidecar"}}}, "mode"),
    ({"serve": {"options": {"ctx-size": -1}}}, "ctx-size"),
    ({"serve": {"options": {"ctx-size": "big"}}}, "ctx-size"),
    ({"serve": {"options": {"ctxSize": 4096}}}, "ctxSize"),
    ({"serve": {"options": {"parallel": 256}}}, "parallel"),
    ({"serve": {"options": {"prefix-cache-mib": -1}}}, "prefix-cache-mib"),
    ({"serve": {"options": {"prefix-cache-mib": "1GiB"}}}, "prefix-cache-mib"),
    ({"serve": {"options": {"kv-cache-type": "q4_0"}}}, "kv-cache-type"),
    ({"serve": {"options": {"flash-attn": True}}}, "flash-attn"),
    ({"serve": {"options": {"rate-limit": "many"}}}, "rate-limit"),
    ({"serve": {"options": {"port": 9000}}}, "port"),
    ({"serve": {"options": {"api-key": ["secret"]}}}, "api-key"),
    ({"auth": {"keys": ["with space"]}}, "keys"),
    ({"auth": {"keys": [""]}}, "keys"),
    ({"gpu": {"count": 0}}, "count"),
    ({"gpu": {"resourceName": "gpu"}}, "resourceName"),
    ({"gpu": {"tolerations": {}}}, "tolerations"),
    ({"storage": {"type": "nfs"}}, "type"),
    ({"storage": {"size": "20 GB"}}, "size"),
    ({"storage": {"accessMode": "RWX"}}, "accessMode"),
    ({"storage": {"mountPath": "models"}}, "mountPath"),
    ({"storage": {"type": "existingClaim"}}, "existingClaim"),
    ({"storage": {"type": "hostPath"}}, "hostPath"),
    ({"storage": {"type": "image"}}, "imageReference"),
    ({"service": {"port": 0}}, "port"),
    ({"service": {"type": "ExternalName"}}, "type"),
    ({"ingress": {"enabled": True, "hosts": [{"paths": []}]}}, "host"),
    ({"httpRoute": {"timeout": "ten minutes"}}, "timeout"),
    ({"networkPolicy": {"ports": []}}, "ports"),
    ({"podDisruptionBudget": {"maxUnavailable": "101%"}}, "maxUnavailable"),
    ({"prometheusRule": {"errorRate": 5}}, "errorRate"),
    ({"serviceMonitor": {"interval": "often"}}, "interval"),
    ({"commonLabels": {"a": "not a label"}}, "commonLabels"),
    ({"nameOverride": "Not_A_Name"}, "nameOverride"),
    ({"resources": {"limit": {}}}, "limit"),
    ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "topologyKey"),
]

VALUES_THAT_DO_NOT_FIT: list[tuple[Object, str]] = [
    ({"model": {"revision": "main"}}, "name it as owner/name"),
    ({"model": {"name": "/models/a.gguf", "revision": "main"}}, "is no Hub repository"),
    ({"model": {"name": "/data/a.gguf"}}, "does not lie under storage.mountPath /models"),
    (
        {"model": {"url": "https://h/a.gguf", "sha256": SHA256}, "storage": CLAIM | {"readOnly": True}},
        "needs a volume that can be written",
    ),
    ({"storage": {"type": "image", "imageReference": "r/m:1"}}, "holds a finished model"),
    ({"model": {"prepare": {"mode": "job"}}}, "needs storage.type existingClaim, not pvc"),
    ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "two autoscalers"),
    ({"autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas 5 is more than autoscaling.maxReplicas 4"),
    ({"keda": {"minReplicas": 5}}, "keda.minReplicas 5 is more than"),
    ({"auth": {"keys": ["a"], "existingSecret": "b"}}, "choose one"),
    ({"gpu": {"enabled": False, "dra": {"enabled": True}}}, "gpu.enabled is false"),
    ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"),
    ({"replicas": 2, "storage": {"accessMode": "ReadWriteOncePod"}}, "there may be 2"),
    ({"keda": {"enabled": True}, "storage": {"accessMode": "ReadWriteOncePod"}}, "there may be 4"),
    (
        {"serve": {"options": {"prefix-cache-mib": 8192}}, "resources": {"limits": {"memory": "8Gi"}}},
        "is main memory, and resources.limits.memory 8Gi has no room for it",
    ),
    ({"serve": {"options": {"prefix-cache-mib": 954}}, "resources": {"limits": {"memory": "1G"}}}, "1G has no room"),
    ({"serve": {"options": {"prefix-cache-mib": 1}}, "resources": {"limits": {"memory": 1 << 20}}}, "has no room"),
]


@pytest.mark.parametrize(("values", "named"), WRONG_TYPES_AND_RANGES, ids=lambda value: json.dumps(value)[:70])
def test_the_schema_refuses(values: Object, named: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as caught:
        render(values)
    assert named in str(caught.value)


@pytest.mark.parametrize(("values", "sentence"), VALUES_THAT_DO_NOT_FIT, ids=lambda value: json.dumps(value)[:70])
def test_values_that_do_not_fit_together_are_refused(values: Object, sentence: str) -> None:
    with pytest.raises(helm_python.HelmRenderError) as caught:
        render(values)
    assert sentence in str(caught.value)
