"""What must hold of the chart's objects, whatever the values."""

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from click.testing import CliRunner

from edge_phi3.api.server import create_service
from edge_phi3.cli import app
from edge_phi3.options import key_of
from edge_phi3.settings import Settings
from tests.helm.chart import Object, containers, environment, of_kind, pod_of, pods, server, workload

DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
SERVICE_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")

# "image" since Kubernetes 1.33, two versions before the first that has such volumes on by default.
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim"}
RESTRICTED_VOLUMES |= {"projected", "secret"}


def check_all(objects: list[Object], *, is_restricted: bool = True) -> None:
    check_names(objects)
    check_selectors(objects)
    check_references(objects)
    check_ports_and_routes(objects)
    check_stopping(objects)
    check_no_credentials(objects)
    check_gpus(objects)
    found = [f"{name}: {text}" for name, pod in pods(objects) for text in violations(pod)]
    assert bool(found) is not is_restricted, found


def violations(pod: Object) -> Iterator[str]:
    """Yield what the Pod Security Standard "restricted" forbids.

    As https://kubernetes.io/docs/concepts/security/pod-security-standards/ has it.
    """
    spec = pod["spec"]
    shared = spec.get("securityContext", {})
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    for volume in spec.get("volumes", []):
        yield from (f"volume {volume['name']} is a {kind}" for kind in set(volume) - {"name"} - RESTRICTED_VOLUMES)
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


def check_names(objects: list[Object]) -> None:
    """No two objects are the same one; names and labels are allowed ones."""
    keys = [(obj["apiVersion"], obj["kind"], obj["metadata"]["name"]) for obj in objects]
    assert len(keys) == len(set(keys)), keys
    for obj in objects:
        metadata = obj["metadata"]
        # What its owner names, after a release that may have dots; a Service's name may not begin with a digit either.
        special = {"Service": SERVICE_NAME, "ServiceAccount": DNS_SUBDOMAIN, "ConfigMap": DNS_SUBDOMAIN}
        allowed = special.get(obj["kind"], DNS_LABEL)
        assert allowed.fullmatch(metadata["name"]), metadata["name"]
        assert metadata["namespace"], metadata["name"]
        for value in metadata.get("labels", {}).values():
            assert LABEL_VALUE.fullmatch(value), value
    for _, pod in pods(objects):
        lists = [containers(pod), pod["spec"].get("volumes", [])]
        lists += [container.get("env", []) for container in containers(pod)]
        lists += [[{"name": mount["mountPath"]} for mount in c.get("volumeMounts", [])] for c in containers(pod)]
        for names in ([item["name"] for item in items] for items in lists):
            assert len(names) == len(set(names)), names


def check_selectors(objects: list[Object]) -> None:
    """Service, budget, policy, pool and constraints select the service's pods, and never those of a test or a job."""
    template = workload(objects)["spec"]["template"]
    labels = template["metadata"]["labels"]
    others = [pod["metadata"]["labels"] for name, pod in pods(objects) if pod is not template]
    for selector in _selectors(objects):
        assert selector, "an empty selector selects everything"
        assert selector.items() <= labels.items()
        assert not any(selector.items() <= other.items() for other in others)
    for policy in of_kind(objects, "NetworkPolicy", "-prepare"):
        assert any(policy["spec"]["podSelector"]["matchLabels"].items() <= other.items() for other in others)
    service_labels = of_kind(objects, "Service")[0]["metadata"]["labels"]
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service_labels.items()


def _selectors(objects: list[Object]) -> Iterator[dict[str, str]]:
    yield workload(objects)["spec"]["selector"]["matchLabels"]
    for constraint in pod_of(objects).get("topologySpreadConstraints", []):
        yield constraint["labelSelector"]["matchLabels"]
    for obj in objects:
        if obj["kind"] in {"Service", "PodDisruptionBudget", "InferencePool"}:
            selector = obj["spec"]["selector"]
            yield selector.get("matchLabels", selector)
        elif obj["kind"] == "NetworkPolicy" and not obj["metadata"]["name"].endswith("-prepare"):
            yield obj["spec"]["podSelector"]["matchLabels"]


def check_references(objects: list[Object]) -> None:
    """What an object names and the chart makes, is there; what a container mounts, its pod has."""
    made = {(obj["kind"], obj["metadata"]["name"]) for obj in objects}
    own = workload(objects)["metadata"]["name"]

    def exists(kind: str, name: str) -> None:
        if name == own or name.startswith(f"{own}-"):
            assert (kind, name) in made, f"{kind} {name} is named but not made"

    for _, pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        if pod is workload(objects)["spec"]["template"]:
            claims = workload(objects)["spec"].get("volumeClaimTemplates", [])
            volumes |= {claim["metadata"]["name"]: claim for claim in claims}
        mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
        assert mounted <= set(volumes), mounted - set(volumes)
        assert not (set(volumes) - mounted) & {"models", "tmp", "scripts", "keys", "ca"}, "a volume that nothing mounts"
        for volume in volumes.values():
            for key, kind, field in (
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
                ("configMap", "ConfigMap", "name"),
                ("secret", "Secret", "secretName"),
            ):
                exists(kind, volume.get(key, {}).get(field, ""))
        for claim in pod["spec"].get("resourceClaims", []):
            exists("ResourceClaimTemplate", claim.get("resourceClaimTemplateName", ""))
        exists("ServiceAccount", pod["spec"].get("serviceAccountName", ""))
    for obj in objects:
        target = obj.get("spec", {}).get("scaleTargetRef")
        assert target is None or target["name"] == own
        for rule in obj["spec"].get("rules", []) if obj["kind"] == "HTTPRoute" else []:
            for backend in rule["backendRefs"]:
                exists(backend.get("kind", "Service"), backend["name"])
                assert "kind" in backend or "port" in backend, "the CRD's own rule for a Service"


@functools.cache
def routes() -> frozenset[str]:
    application, _ = create_service(Settings(), mock.Mock())
    inner = next(value for value in vars(application).values() if hasattr(value, "routes"))
    return frozenset(route.path for route in inner.routes)


def check_ports_and_routes(objects: list[Object]) -> None:
    """Services, probes and monitors lead to a port that the container has, and to paths that the service answers."""
    container = server(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["http"]) == _option(container["args"], "--port")
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = container[name]["httpGet"]
        assert get["port"] in ports
        assert get["path"] in routes()
    stay = [each for each in pod_of(objects).get("initContainers", []) if each.get("restartPolicy") == "Always"]
    others = [port for each in pod_of(objects)["containers"][1:] + stay for port in each.get("ports", [])]
    numbers = {port["containerPort"] for port in others}
    service = of_kind(objects, "Service")[0]["spec"]["ports"]
    assert all(port["targetPort"] in ports or port["targetPort"] in numbers for port in service)
    assert len(service) == 1 + len(others)
    names = {port["name"] for port in service}
    for monitor in of_kind(objects, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["port"] in names
            assert endpoint["path"] in routes()
    for pool in of_kind(objects, "InferencePool"):
        assert [port["number"] for port in pool["spec"]["targetPorts"]] == [ports["http"]]
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            # The tunnels of an ambient mesh beside our own.
            assert {port["port"] for port in rule["ports"]} <= {*ports, *numbers, 15008}
        if policy["metadata"]["name"] == workload(objects)["metadata"]["name"]:
            assert {port["port"] for port in policy["spec"]["ingress"][0]["ports"]} >= {"http", *numbers}
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            assert all(path["backend"]["service"]["port"]["name"] in names for path in rule["http"]["paths"])


def check_stopping(objects: list[Object]) -> None:
    """A pod has time to drain, and an update never waits for a second GPU."""
    container = server(objects)
    delay = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])[1]
    longest = float(_option(container["args"], "--grace-period")) + float(delay)
    assert pod_of(objects)["terminationGracePeriodSeconds"] > longest
    strategy = workload(objects)["spec"].get("strategy", {"type": "Recreate"})  # which a StatefulSet has not
    assert strategy == {"type": "Recreate"} or strategy["rollingUpdate"]["maxSurge"] == 0


def check_no_credentials(objects: list[Object]) -> None:
    """No pod has a token of the cluster, and the service's container none of the Hub once the model is prepared."""
    for _, pod in pods(objects):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
    spec = pod_of(objects)
    prepared = any(c["name"] == "prepare" for c in spec.get("initContainers", [])) or of_kind(objects, "Job")
    if prepared:
        container = server(objects)
        assert not any(item["name"] == "HF_TOKEN" for item in container["env"])
        assert environment(container)["HF_HUB_OFFLINE"] == "1"
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
        assert mount["readOnly"] is True


def check_gpus(objects: list[Object]) -> None:
    """Only the service's container asks for GPUs, and containers that ask for none see none."""
    for _, pod in pods(objects):
        for container in containers(pod):
            resources = container.get("resources", {})
            asks = any("/" in name for name in resources.get("limits", {}))
            if container["name"] != "edge-phi3":
                assert not asks
                assert not resources.get("claims")
            if container["name"] in {"edge-phi3", "prepare", "ask"}:
                assert environment(container).get("NVIDIA_VISIBLE_DEVICES") == (None if asks else "void")


def service_options(values: Object) -> Object:
    """Return the options that some values give to the service, adapters among them."""
    serve = values.get("serve", {})
    options: Object = {"log-format": "json", **serve.get("options", {})}
    adapters = [(each.get("name"), each["file"], each.get("strength", 1)) for each in serve.get("adapters", [])]
    lora = [f"{name}={file}:{strength}" if name else f"{file}={strength}" for name, file, strength in adapters]
    return options | ({"lora": [*lora, *options.get("lora", [])]} if lora else {})


def check_service_options(objects: list[Object], options: Object, keys: Path) -> None:
    """The real command line reads the container's arguments, and comes to the values that were given."""
    arguments = [keys.as_posix() if arg.startswith("/etc/edge-phi3/keys/") else arg for arg in server(objects)["args"]]
    assert arguments[0] == "serve"
    result = CliRunner().invoke(app, [*arguments, "--print-config"], env=environment(server(objects)))
    assert result.exit_code == 0, result.stderr
    read = tomllib.loads(result.stdout)
    options = {name: value for name, value in options.items() if value is not None}
    if names := options.get("allowed-host"):
        options["allowed-host"] = [*([names] if isinstance(names, str) else names), own_name(objects)]
    expected = Settings.model_validate({name.replace("-", "_"): value for name, value in options.items()})
    dumped = expected.model_dump()
    for name in options:
        value = dumped[name.replace("-", "_")]
        assert read[key_of(name)] == (list(value) if isinstance(value, tuple) else value), name
    assert read["model"] == arguments[1]


def own_name(objects: list[Object]) -> str:
    """Return the name by which the pod of `helm test` calls the service."""
    metadata = of_kind(objects, "Service")[0]["metadata"]
    return f"{metadata['name']}.{metadata['namespace']}.svc"


def _option(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]
