"""The environment and the command line of a container."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localcloud.runner.fields import ConfigError, field, resource
from localcloud.runner.images import Image

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")

# (`configmaps` or `secrets`, name) -> its entries as text, None where there is no such object
Lookup = Callable[[str, str], Mapping[str, str] | None]


def expand(text: str, known: Mapping[str, str]) -> str:
    """`$(NAME)` becomes its value where there is one, `$$` becomes `$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return _REFERENCE.sub(value, text)


def environment(
    pod: Mapping[str, Any],
    container: Mapping[str, Any],
    image: Image,
    *,
    base: Mapping[str, str],
    cluster: Mapping[str, str],
    lookup: Lookup,
    node: Mapping[str, Any],
) -> dict[str, str]:
    """All variables of `container`. What comes later wins: `base`, the image, `cluster` (its services), the pod.

    Raises `ConfigError` for a ConfigMap, Secret or key that is not there and not optional.
    """
    result = {"PATH": PATH, **base, **dict(item.partition("=")[::2] for item in image.env), **cluster}
    for source in container.get("envFrom", []):
        for name, value in _whole(source, lookup).items():
            result[source.get("prefix", "") + name] = value
    for item in container.get("env", []):
        if "valueFrom" not in item:
            result[item["name"]] = expand(item.get("value", ""), result)
        else:
            found = _value(pod, container["name"], item["valueFrom"], lookup, node)
            result |= {} if found is None else {item["name"]: found}
    return result


def _whole(source: Mapping[str, Any], lookup: Lookup) -> Mapping[str, str]:
    kind, reference = ("configmaps", source["configMapRef"]) if "configMapRef" in source else (
        "secrets", source["secretRef"])  # fmt: skip
    found = lookup(kind, reference["name"])
    if found is None and not reference.get("optional"):
        raise ConfigError(f'{kind[:-1]} "{reference["name"]}" not found')
    return found or {}


def _value(
    pod: Mapping[str, Any], container: str, source: Mapping[str, Any], lookup: Lookup, node: Mapping[str, Any]
) -> str | None:
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource(pod, container, source["resourceFieldRef"], node)
    kind, reference = ("configmaps", source["configMapKeyRef"]) if "configMapKeyRef" in source else (
        "secrets", source["secretKeyRef"])  # fmt: skip
    found = lookup(kind, reference["name"])
    if found is not None and reference["key"] in found:
        return found[reference["key"]]
    if reference.get("optional"):
        return None
    if found is None:
        raise ConfigError(f'{kind[:-1]} "{reference["name"]}" not found')
    raise ConfigError(f"couldn't find key {reference['key']} in {kind[:-1]} {pod['metadata']['namespace']}/"
                      f"{reference['name']}")  # fmt: skip


def command(container: Mapping[str, Any], image: Image, known: Mapping[str, str]) -> list[str]:
    """What is run: `command` replaces the image's entry point and its arguments, `args` the arguments alone."""
    entry: Sequence[str] = container.get("command") or image.entrypoint
    arguments: Sequence[str] = container.get("args") or (() if container.get("command") else image.cmd)
    own = bool(container.get("command")), bool(container.get("args"))
    words = [expand(word, known) if own[0] else word for word in entry]
    words += [expand(word, known) if own[1] else word for word in arguments]
    if not words:
        raise ConfigError("no command specified")
    return words


def services(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The variables that tell of each Service of the pod's namespace (`enableServiceLinks`)."""
    result: dict[str, str] = {}
    for service in found:
        address, ports = service["spec"].get("clusterIP"), service["spec"].get("ports", [])
        if address in (None, "", "None") or not ports:
            continue
        name = service["metadata"]["name"].upper().replace("-", "_")
        result |= {f"{name}_SERVICE_HOST": address, f"{name}_SERVICE_PORT": str(ports[0]["port"])}
        for index, port in enumerate(ports):
            protocol, number = port.get("protocol", "TCP").lower(), str(port["port"])
            url, prefix = f"{protocol}://{address}:{number}", f"{name}_PORT_{number}_{protocol.upper()}"
            result |= {f"{name}_PORT": url} if index == 0 else {}
            result |= {prefix: url, f"{prefix}_PROTO": protocol, f"{prefix}_PORT": number, f"{prefix}_ADDR": address}
            if port.get("name"):
                result[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = number
    return result
