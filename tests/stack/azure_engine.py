"""Asks the stand-in for Azure as the engine does, by direct calls of its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from pulumi.runtime.proto import provider_pb2

from localcloud.azure.provider import Provider
from localcloud.azure.rules import SUBSCRIPTION
from localcloud.azure.values import plain, struct

GROUP = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/g"


class Refused(Exception):
    """What the engine would print."""


class Context:
    """Of one call: an abort is raised; `metadata` is what went with it."""

    metadata: tuple[tuple[str, bytes], ...] = ()

    def abort(self, code: Any, details: str) -> NoReturn:
        raise Refused(details)

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.metadata = tuple(metadata)


class Engine:
    """One provider process over the world below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world = folder, folder / "azure"
        self.provider = Provider(folder, self.world)
        self.context = Context()

    def configure(self, variables: dict[str, str]) -> None:
        self.provider.Configure(provider_pb2.ConfigureRequest(variables=variables), self.context)

    def check(self, token: str, inputs: dict[str, Any], olds: dict[str, Any] | None = None) -> Any:
        request = provider_pb2.CheckRequest(
            urn=urn(token), news=struct(inputs), olds=struct(olds or {}), randomSeed=b"seed"
        )
        return self.provider.Check(request, self.context)

    def failures(self, token: str, inputs: dict[str, Any]) -> list[tuple[str, str]]:
        return [(each.property, each.reason) for each in self.check(token, inputs).failures]

    def make(self, token: str, inputs: dict[str, Any], name: str = "thing") -> tuple[str, dict[str, Any]]:
        """ID and outputs of a new resource."""
        request = provider_pb2.CreateRequest(urn=urn(token, name), properties=struct(inputs))
        made = self.provider.Create(request, self.context)
        return made.id, plain(made.properties)

    def preview(self, token: str, inputs: dict[str, Any]) -> dict[str, Any]:
        request = provider_pb2.CreateRequest(urn=urn(token), properties=struct(inputs), preview=True)
        made = self.provider.Create(request, self.context)
        assert made.id == ""
        return plain(made.properties)

    def update(self, token: str, id_: str, inputs: dict[str, Any], *, preview: bool = False) -> dict[str, Any]:
        olds = self.read(token, id_)[1]
        request = provider_pb2.UpdateRequest(
            urn=urn(token), id=id_, news=struct(inputs), olds=struct(olds), preview=preview
        )
        return plain(self.provider.Update(request, self.context).properties)

    def read(self, token: str, id_: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """ID (empty where it is gone), outputs, inputs."""
        found = self.provider.Read(provider_pb2.ReadRequest(urn=urn(token), id=id_), self.context)
        return found.id, plain(found.properties), plain(found.inputs)

    def delete(self, token: str, id_: str) -> None:
        self.provider.Delete(provider_pb2.DeleteRequest(urn=urn(token), id=id_), self.context)

    def diff(self, token: str, old: dict[str, Any], new: dict[str, Any]) -> Any:
        request = provider_pb2.DiffRequest(urn=urn(token), old_inputs=struct(old), news=struct(new))
        return self.provider.Diff(request, self.context)

    def invoke(self, token: str, arguments: dict[str, Any]) -> dict[str, Any]:
        request = provider_pb2.InvokeRequest(tok=f"azure-native:{token}", args=struct(arguments))
        return plain(getattr(self.provider.Invoke(request, self.context), "return"))


def urn(token: str, name: str = "thing") -> str:
    return f"urn:pulumi:dev::drydock::drydock:infra:Any$azure-native:{token}::{name}"
