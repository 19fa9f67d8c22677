"""The Pod Security Standard "restricted".

As https://kubernetes.io/docs/concepts/security/pod-security-standards/ has it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.helm.chart import Object, containers

# "image" since Kubernetes 1.33, which is also the first version that has such volumes on by default.
VOLUME_KINDS = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(pod: Object) -> Iterator[str]:
    spec = pod["spec"]
    shared = spec.get("securityContext", {})
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    for volume in spec.get("volumes", []):
        yield from (f"volume {volume['name']} is a {kind}" for kind in set(volume) - {"name"} - VOLUME_KINDS)
    if shared.get("sysctls") or shared.get("windowsOptions", {}).get("hostProcess"):
        yield "sysctls or hostProcess"
    for container in containers(pod):
        own = shared | container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        wrong = {
            "privileged": own.get("privileged"),
            "privilege escalation": own.get("allowPrivilegeEscalation") is not False,
            "capabilities are not dropped": "ALL" not in capabilities.get("drop", []),
            "capabilities are added": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "may run as root": own.get("runAsNonRoot") is not True,
            "runs as root": own.get("runAsUser") == 0,
            "no seccomp profile": own.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"},
            "procMount": own.get("procMount", "Default") != "Default",
            "a host port": any("hostPort" in port for port in container.get("ports", [])),
        }
        yield from (f"container {container['name']}: {text}" for text, is_so in wrong.items() if is_so)
