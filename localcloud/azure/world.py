"""What there is in Azure: resources by ARM ID in one file, shared by all processes of a local cloud."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_atomic
from localcloud.azure.rules import type_of


@dataclass
class Record:
    """One resource: its ID as it was made (ARM ignores case), the SDK's token, what the program and what Azure says."""

    id: str
    token: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class Resources:
    """The resources of a world that is held. Nothing outside may keep it."""

    def __init__(self, records: dict[str, Record]) -> None:
        self._records = records

    def get(self, id_: str) -> Record | None:
        return self._records.get(id_.lower())

    def put(self, record: Record) -> None:
        self._records[record.id.lower()] = record

    def remove(self, id_: str) -> list[Record]:
        """Take away the resource and all that belongs to it (children, extensions); returns them, itself first."""
        inside = f"{id_.lower()}/"
        gone = sorted(key for key in self._records if key == id_.lower() or key.startswith(inside))
        return [self._records.pop(key) for key in gone]

    def of(self, token: str) -> list[Record]:
        return [record for record in self._records.values() if record.token == token]

    def exists(self, id_: str) -> bool:
        """Whether something has this ID: a resource, one of a network's own subnets, or a subscription."""
        if self.get(id_) or "/resourcegroups/" not in id_.lower():
            return True
        if type_of(id_).lower() == "microsoft.network/virtualnetworks/subnets":
            network, _, name = id_.rpartition("/subnets/")
            found = self.get(network)
            return found is not None and name in [item.get("name") for item in found.inputs.get("subnets", [])]
        return False

    def users(self, id_: str) -> list[Record]:
        """Those outside of the resource whose inputs name it, or something in it."""
        start = id_.lower()
        return [
            record
            for key, record in self._records.items()
            if key != start
            and not key.startswith(f"{start}/")
            and any(text == start or text.startswith(f"{start}/") for text in _ids(record.inputs))
        ]

    def all(self) -> list[Record]:
        return list(self._records.values())


class World:
    """A folder with the resources of one Azure; `hold` gives them to one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def hold(self) -> Iterator[Resources]:
        """The resources, alone; changes are written at the end unless an error leaves the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "resources.json"
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = path.read_text() if path.exists() else "{}"
            records = {key: Record(**value) for key, value in json.loads(before).items()}
            yield Resources(records)
            after = json.dumps({key: asdict(record) for key, record in records.items()}, indent=1)
            if after != before:
                write_atomic(path, after)

    def all(self) -> list[Record]:
        with self.hold() as resources:
            return resources.all()


def _ids(value: Any) -> Iterator[str]:
    """Every text in `value` that is the ID of something in a resource group, in lower case."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _ids(key)
            yield from _ids(item)
    elif isinstance(value, list):
        for item in value:
            yield from _ids(item)
    elif isinstance(value, str) and value.lower().startswith("/subscriptions/") and "/resourcegroups/" in value.lower():
        yield value.lower()


def references(inputs: Any) -> list[str]:
    """The IDs that `inputs` name, in lower case, each once."""
    return list(dict.fromkeys(_ids(inputs)))
