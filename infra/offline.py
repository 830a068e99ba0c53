"""An environment by its file alone: what needs neither the Pulumi engine nor the keys to its secrets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.settings import SettingsError
from infra.settings import ROOT, Environment, read_environment


@dataclass(frozen=True)
class Offline:
    """What `Pulumi.<stack>.yaml` says; `location` is Azure's region, where it is given."""

    env: Environment
    location: str | None
    project: str
    file: Path


def read(stack: str, root: Path = ROOT) -> Offline:
    """The settings of a stack, its secrets replaced by a word. Raises `SettingsError` with every problem, by line.

    Where no API key is in the file, what would need one (stress, drills, tiers) is left out: whoever previews may have
    set it elsewhere.
    """
    known = sorted(path.name.removeprefix("Pulumi.").removesuffix(".yaml") for path in root.glob("Pulumi.*.yaml"))
    if stack not in known:
        raise SettingsError([f"Pulumi.{stack}.yaml: no such file; stacks with settings: {', '.join(known) or 'none'}"])
    file = root / f"Pulumi.{stack}.yaml"
    project = str(_mapping(root / "Pulumi.yaml").get("name"))
    config = _mapping(file).get("config")
    if not isinstance(config, dict):
        raise SettingsError([f"{file.name}: config: required, but absent"])
    values = {key.partition(":")[2]: value for key, value in config.items() if str(key).startswith(f"{project}:")}
    secret = {key for key, value in values.items() if _without_secrets(value) != value}
    if not values.get("api_keys"):
        values = {key: value for key, value in values.items() if key not in ("stress", "drills", "tiers")}
    location = config.get("azure-native:location")
    env = read_environment(_without_secrets(values), secret, project=project, file=file)
    return Offline(env, location if isinstance(location, str) else None, project, file)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{file.name}: cannot be read as UTF-8 text: {error}"]) from None
    except yaml.YAMLError as error:
        raise SettingsError([f"{file.name}: not YAML: {error}"]) from None
    if not isinstance(found, dict):
        raise SettingsError([f"{file.name}: expected `name: value` lines"])
    return found


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return "encrypted" if set(value) == {"secure"} else {key: _without_secrets(item) for key, item in value.items()}
    return value
