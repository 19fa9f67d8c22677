"""The Pod Security Standard "restricted".

As https://kubernetes.io/docs/concepts/security/pod-security-standards/ has it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.helm.chart import Object, containers

VOLUME_KINDS = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",  # since Kubernetes 1.33, which is also the first version that has such volumes on by default
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(pod: Object) -> Iterator[str]:
    """Say what about a pod is not restricted."""
    spec = pod["spec"]
    shared = spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    for volume in spec.get("volumes", []):
        (kind,) = set(volume) - {"name"}
        if kind not in VOLUME_KINDS:
            yield f"volume {volume['name']} is a {kind}"
    if shared.get("sysctls") or shared.get("windowsOptions", {}).get("hostProcess"):
        yield "sysctls or hostProcess"
    for container in containers(pod):
        for text in _container(container, shared):
            yield f"container {container['name']}: {text}"


def _container(container: Object, shared: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "privilege escalation"
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities are not dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
        yield "may run as root"
    if own.get("runAsUser", shared.get("runAsUser")) == 0:
        yield "runs as root"
    if own.get("seccompProfile", shared.get("seccompProfile", {})).get("type") not in SECCOMP:
        yield "no seccomp profile"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "a host port"
