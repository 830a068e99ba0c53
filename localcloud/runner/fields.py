"""What a pod may be told of itself: field references, resource references, and quantities as Kubernetes writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_UNITS = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15"}
_POWERS = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5}
_ENTRY = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class ConfigError(RuntimeError):
    """A container or volume cannot be made from what the cluster has; the text names the object and the key."""


def quantity(text: object) -> Decimal:
    """The number that a quantity such as `500m`, `1Gi` or `2e3` stands for."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in _UNITS | _POWERS:
        raise ConfigError(f"{text}: not a quantity")
    factor = Decimal(1024) ** _POWERS[match[2]] if match[2] in _POWERS else Decimal(_UNITS[match[2]])
    return Decimal(match[1]) * factor


def field(pod: Mapping[str, Any], path: str) -> str:
    """The value of a `fieldRef`. `status.podIP` must be in the pod already. Raises `ConfigError` for other paths."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    if match := _ENTRY.fullmatch(path):
        return str((metadata.get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        return _lines(metadata.get(path.removeprefix("metadata.")))
    place, _, name = path.removesuffix("s").partition(".")  # podIPs: there is one of them
    known = {"metadata": ("name", "namespace", "uid"), "spec": ("nodeName", "serviceAccountName"),
             "status": ("podIP", "hostIP")}  # fmt: skip
    if name not in known.get(place, ()):
        raise ConfigError(f"fieldPath {path}: not supported by this runner")
    return str({"metadata": metadata, "spec": spec, "status": status}[place].get(name, ""))


def _lines(entries: Mapping[str, str] | None) -> str:
    quoted = {key: value.replace("\\", "\\\\").replace('"', '\\"') for key, value in (entries or {}).items()}
    return "\n".join(f'{key}="{value}"' for key, value in sorted(quoted.items()))


def resource(pod: Mapping[str, Any], container: str, reference: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The value of a `resourceFieldRef` of `container`, in units of its divisor, rounded up.

    A limit that is not set is all that the `node` can give (its `allocatable`), a request that is not set is 0.
    """
    spec = pod["spec"]
    name = reference.get("containerName") or container
    found = next(item for item in [*spec.get("initContainers", []), *spec["containers"]] if item["name"] == name)
    kind, _, what = reference["resource"].partition(".")
    given = (found.get("resources") or {}).get(kind, {}).get(what)
    if given is None:
        given = node["status"]["allocatable"].get(what, "0") if kind == "limits" else "0"
    divisor = quantity(reference.get("divisor") or "1") or Decimal(1)
    return str(math.ceil(quantity(given) / divisor))
