"""KAITO's CRDs in our own words: the fields of `kaito.sh/v1beta1` in v0.12.0 that a person may write, and their types.

Compared by hand with config/crd/bases of kaito-project/kaito at 056b8280. Status is left open.
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
ANYTHING: Schema = {"x-kubernetes-preserve-unknown-fields": True}


def an_object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


EXPRESSION = an_object({"key": TEXT, "operator": TEXT, "values": TEXTS}, "key", "operator")
SELECTOR = an_object(
    {
        "matchExpressions": {"type": "array", "items": EXPRESSION},
        "matchLabels": {"type": "object", "additionalProperties": TEXT},
    }
)
PARTITION = an_object(
    {
        "mode": {"type": "string", "enum": ["mig", "accelerator"]},
        "profile": TEXT,
        "count": {"type": "integer", "minimum": 1},
    },
    "mode",
)
PRESET = an_object(
    {
        "name": TEXT,
        "accessMode": {"type": "string", "enum": ["public", "private"], "default": "public"},
        "presetOptions": an_object({"image": TEXT, "imagePullSecrets": TEXTS, "modelAccessSecret": TEXT}),
    },
    "name",
)
SOURCE = an_object({"name": TEXT, "urls": TEXTS, "volumeSource": ANYTHING, "image": TEXT, "imagePullSecrets": TEXTS})
INFERENCE = an_object(
    {
        "preset": PRESET,
        "template": ANYTHING,
        "config": TEXT,
        "adapters": {"type": "array", "items": an_object({"source": SOURCE, "strength": TEXT})},
    }
)
TUNING = an_object(
    {
        "preset": PRESET,
        "method": TEXT,
        "config": TEXT,
        "input": SOURCE,
        "output": an_object({"volumeSource": ANYTHING, "image": TEXT, "imagePushSecret": TEXT}),
    },
    "input",
    "output",
)
HEAD: dict[str, Schema] = {"apiVersion": TEXT, "kind": TEXT, "metadata": {"type": "object"}, "status": ANYTHING}
WORKSPACE = an_object(
    HEAD
    | {
        "resource": an_object(
            {
                "count": {"type": "integer", "default": 1},
                "instanceType": TEXT,
                "labelSelector": SELECTOR,
                "preferredNodes": TEXTS,
                "partition": PARTITION,
            },
            "labelSelector",
        ),
        "inference": INFERENCE,
        "tuning": TUNING,
    }
)
TEMPLATE = an_object(
    {
        "metadata": ANYTHING,
        "resource": an_object({"instanceType": TEXT, "partition": PARTITION}),
        "inference": INFERENCE,
    },
    "inference",
)
WINDOW = an_object({"schedule": TEXT, "duration": {"type": "string", "default": "4h"}}, "schedule")
UPGRADE = an_object(
    {
        "enabled": {"type": "boolean", "default": False},
        "strategy": {"type": "string", "enum": ["InPlace", "Surge"], "default": "InPlace"},
        "maintenanceWindow": WINDOW,
    }
)
SET_SPEC = an_object(
    {
        "replicas": {"type": "integer", "format": "int32", "minimum": 0, "default": 1},
        "nodeCountLimit": {"type": "integer"},
        "labelSelector": SELECTOR,
        "template": TEMPLATE,
        "updateStrategy": ANYTHING,
        "autoUpgrade": UPGRADE,
    },
    "labelSelector",
    "template",
)
INFERENCE_SET = an_object(HEAD | {"spec": SET_SPEC}, "spec")
SCHEMAS = {"Workspace": WORKSPACE, "InferenceSet": INFERENCE_SET}


def definition(kind: str) -> dict[str, Any]:
    """The CustomResourceDefinition of `kind`, for a real API server."""
    plural = f"{kind.lower()}s"
    version: dict[str, Any] = {
        "name": "v1beta1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": SCHEMAS[kind]},
        "subresources": {"status": {}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.kaito.sh"},
        "spec": {
            "group": "kaito.sh",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def problems(item: dict[str, Any]) -> list[str]:
    """What the schema of its kind says against `item`; a field that it does not know is a problem."""
    found = jsonschema.Draft202012Validator(_closed(SCHEMAS[item["kind"]])).iter_errors(item)
    return sorted(f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}" for error in found)


def _closed(schema: Schema) -> Schema:
    """`schema` without room for fields that it does not name."""
    inner = {name: _closed(part) for name, part in schema.get("properties", {}).items()}
    closed = schema | ({"properties": inner, "additionalProperties": False} if inner else {})
    return closed | ({"items": _closed(schema["items"])} if "items" in schema else {})
