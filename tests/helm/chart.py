"""The chart, rendered by Helm's own engine, and the objects that come out."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml
from jsonschema.validators import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from tests.support.cases import SafeLoader

Object = dict[str, Any]


def values_of(path: Path) -> Object:
    return yaml.load(path.read_text(encoding="utf-8"), SafeLoader) or {}


DATA = Path(__file__).with_name("data")
CHART = Path(__file__).resolve().parents[2] / "helm" / "edge-phi3"
EXAMPLES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
NEWEST = ".".join(kubernetes_validate.latest_version().split(".")[:2])
CUSTOM_RESOURCES = values_of(DATA / "custom_resources.yaml")


@functools.cache
def loaded() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def schema() -> Object:
    """Return the schema of the chart's values."""
    found = loaded().schema
    assert found is not None
    return found


def oldest_kubernetes() -> str:
    return ".".join(str(loaded().metadata["kubeVersion"]).removeprefix(">=").split(".")[:2])


def render_texts(values: Object | None = None, name: str = "edge-phi3", namespace: str = "ai") -> dict[str, str]:
    """Render the chart: template -> text. Values that the schema refuses raise."""
    loaded().validate_schema(values or {})
    texts = loaded().render(values or {}, name=name, namespace=namespace)
    return {path.removeprefix("edge-phi3/templates/"): text for path, text in texts.items()}


def render(values: Object | None = None, **release: str) -> list[Object]:
    texts = render_texts(values, **release)
    texts.pop("NOTES.txt")
    return [obj for text in texts.values() for obj in yaml.load_all(text, SafeLoader) if obj]


def of_kind(objects: list[Object], kind: str, suffix: str = "") -> list[Object]:
    """Return the objects of a kind whose names end in `suffix`."""
    return [obj for obj in objects if obj["kind"] == kind and obj["metadata"]["name"].endswith(suffix)]


def workload(objects: list[Object]) -> Object:
    (found,) = [*of_kind(objects, "Deployment"), *of_kind(objects, "StatefulSet")]
    return found


def pod_of(objects: list[Object]) -> Any:
    return workload(objects)["spec"]["template"]["spec"]


def server(objects: list[Object]) -> Any:
    (found,) = [container for container in pod_of(objects)["containers"] if container["name"] == "edge-phi3"]
    return found


def preparer(objects: list[Object]) -> Any:
    (found,) = pod_of(objects)["initContainers"]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Return each pod or pod template with its object's name."""
    for obj in objects:
        if obj["kind"] == "Pod":
            yield obj["metadata"]["name"], obj
        elif "template" in obj.get("spec", {}):
            yield obj["metadata"]["name"], obj["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: Object) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}


@functools.cache
def _validator(kubernetes: str, kind: str, api_version: str) -> Draft202012Validator:
    if kind in CUSTOM_RESOURCES:
        return Draft202012Validator(_strict(CUSTOM_RESOURCES[kind]["schema"]))
    # The names that kubernetes-validate gives its files; its own `validate` reads them anew each time, seconds in all.
    group, _, version = api_version.rpartition("/")
    suffix = f"{group.split('.')[0]}-{version}" if group else version
    folder = f"kubernetes-json-schema/v{kubernetes}.0-local-strict"
    contents = schema_contents(f"{folder}/{kind.lower()}-{suffix}.json", kubernetes)
    registry: Registry[Any] = _definitions(folder, kubernetes) @ Registry()
    return Draft202012Validator(contents, registry=Resource.from_contents(contents) @ registry)


def _strict(schema: Any) -> Any:
    """Return a CRD's schema as a JSON Schema that refuses fields which the CRD does not know."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@functools.cache
def _definitions(folder: str, kubernetes: str) -> Resource[Any]:
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", kubernetes))


def schema_errors(objects: list[Object], *versions: str) -> list[str]:
    """Check objects against the strict schemas of some Kubernetes versions, or of their custom resources."""
    found = []
    for obj in objects:
        for kubernetes in versions:
            try:
                errors = _validator(kubernetes, obj["kind"], obj["apiVersion"]).iter_errors(obj)
            except FileNotFoundError:
                found.append(f"Kubernetes {kubernetes} has no {obj['apiVersion']} {obj['kind']}")
            else:
                found += [
                    f"{obj['kind']} {obj['metadata']['name']}: {error.json_path}: {error.message}" for error in errors
                ]
    return found
