"""Whether Kubernetes would take an object: its published schema, strict, of one version."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
import kubernetes_validate.utils
import referencing

PINNED = "1.35"  # the default of infra.settings.Cluster.kubernetes_version


def problems(object: dict[str, Any], version: str = PINNED) -> list[str]:
    """What the schema of Kubernetes `version` says against `object`, one line each: `path: message`.

    Strict: a field that the schema does not know is a problem, where the API server would drop it. An object of a kind
    that Kubernetes itself does not have (a custom resource) is one problem.
    """
    kind, api_version = object.get("kind"), object.get("apiVersion")
    if not kind or not api_version:
        return [f"an object has a kind and an apiVersion, not {kind!r} and {api_version!r}"]
    validator = _validator(kind, api_version, version)
    if validator is None:
        return [f"Kubernetes {version} has no {kind} of {api_version}"]
    return sorted(f"{_path(error)}: {error.message[:300]}" for error in validator.iter_errors(object))


def _path(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "(object)"


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> jsonschema.Draft202012Validator | None:
    """As `kubernetes_validate.validate` does it, which reads two megabytes anew for every object and stops at the first."""
    group, _, number = api_version.rpartition("/")
    name = f"{kind}-{group.split('.')[0]}-{number}" if group else f"{kind}-{number}"
    try:
        schema = kubernetes_validate.utils.schema_contents(f"{_folder(version)}/{name.lower()}.json", version)
    except FileNotFoundError:
        return None
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> referencing.Registry[Any]:
    contents = kubernetes_validate.utils.schema_contents(f"{_folder(version)}/_definitions.json", version)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"
