"""What resources do outside of the world's folder: nodes in the control plane, containers in the Blob emulator."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from localcloud.azure.errors import AzureError, ProviderError
from localcloud.azure.rules import parent_of
from localcloud.azure.world import Record, Resources

CLUSTER, POOL = "azure-native:containerservice:ManagedCluster", "azure-native:containerservice:AgentPool"
EMPTY_SECONDS = 60.0  # for namespaces to be gone; Azure takes minutes for a cluster


class Pool(NamedTuple):
    """An agent pool: its ID, what the program says of it, the managed cluster's name and its region."""

    id: str
    inputs: Mapping[str, Any]
    cluster: str
    location: str


def pools_of(resources: Resources, record: Record) -> list[Pool]:
    """Those that `record` makes: a cluster's own profiles, or the agent pool that it is; of other resources none."""
    cluster = record if record.token == CLUSTER else resources.get(parent_of(record.id))
    if record.token not in (CLUSTER, POOL) or cluster is None:
        return []
    made = {record.id: record.inputs}
    if record.token == CLUSTER:
        profiles = record.inputs.get("agentPoolProfiles", [])
        made = {f"{record.id}/agentPools/{profile['name']}": profile for profile in profiles}
    name, location = cluster.id.rpartition("/")[2], str(cluster.inputs.get("location"))
    return [Pool(id_, inputs, name, location) for id_, inputs in made.items()]


class Hands:
    """`folder`: of the local cloud. Without a control plane there (previews alone), nodes are not made.

    Its `cluster.json` may say `"kubelet": "runner"` (who keeps the nodes; else KWOK) and `"autoscaler": true`.
    """

    def __init__(self, folder: Path) -> None:
        self._cluster = folder / "cluster.json"

    def kubeconfig(self) -> str:
        """Raises `ProviderError` where no control plane ever ran here."""
        if not self._cluster.exists():
            raise ProviderError(f"{self._cluster}: no control plane: it is written when one starts (localcloud)")
        return str(json.loads(self._cluster.read_text())["kubeconfig"])

    def check(self, pool: Pool) -> None:
        """Raises `AzureError` where nobody knows the size of its machines."""
        self._manifests(pool, None)

    def nodes(self, pool: Pool) -> None:
        """Give the control plane the nodes of the pool. Raises `AzureError` where it does not take them.

        Where an autoscaler runs and the pool is autoscaled: those that it has been given meanwhile, within its limits.
        """
        try:
            with self._api() as api:
                if api:
                    _sync(api, pool.id, self._manifests(pool, api))
        except OSError as error:  # every exception of requests is one
            raise _no_answer(pool.id, error) from None

    def no_nodes(self, pool_id: str) -> None:
        """Take the pool's nodes away; a control plane that does not answer has none any more."""
        with contextlib.suppress(OSError), self._api() as api:
            if api:
                _sync(api, pool_id, [])

    def _manifests(self, pool: Pool, api: Any) -> list[dict[str, Any]]:
        from localcloud.nodes import (
            nodes_of,
            sized,
            taken_indices,
        )  # the catalogue and requests: not before they are needed

        access = self._access()
        chosen = None
        if api and access.get("autoscaler") and pool.inputs.get("enableAutoScaling"):
            chosen = sized(pool.inputs, taken_indices(api, pool.id))
        kubelet = access.get("kubelet", "kwok")
        try:
            return nodes_of(pool.inputs, cluster=pool.cluster, location=pool.location, kubelet=kubelet, indices=chosen)
        except ValueError as error:
            raise AzureError(400, "InvalidParameter", f"The agent pool is not valid: {error}") from None

    def _access(self) -> dict[str, Any]:
        """What the control plane tells of itself; nothing where none ever ran here."""
        return dict(json.loads(self._cluster.read_text())) if self._cluster.exists() else {}

    def no_cluster(self) -> None:
        """Take away what programs put into the cluster, for it goes with it: Pulumi does not (`deleted_with`)."""
        with contextlib.suppress(OSError), self._api() as api:
            _empty(api)

    @contextlib.contextmanager
    def _api(self) -> Iterator[Any]:
        """None where no control plane ever ran here."""
        found = self._access()
        if not found:
            yield None
            return
        from localcloud.api import Api, ApiError  # requests: not before it is needed

        try:
            with Api(found["server"], found["token"], Path(found["ca_file"])) as api:
                yield api
        except ApiError as error:
            raise _no_answer(found["server"], error) from None

    def container(self, name: str) -> None:
        """Make the container in the Blob emulator, where one runs; it may be there."""
        client = _container_client(name)
        if client is None:
            return
        from azure.core.exceptions import AzureError as SdkError
        from azure.core.exceptions import ResourceExistsError

        with client:
            try:
                client.create_container()
            except ResourceExistsError:
                return
            except SdkError as error:
                raise AzureError(500, "InternalError", f"{name}: the Blob emulator does not make it: {error}") from None

    def no_container(self, name: str) -> None:
        client = _container_client(name)
        if client is None:
            return
        from azure.core.exceptions import AzureError as SdkError

        with client:
            try:
                client.delete_container()
            except SdkError:  # gone, or the emulator is: what is wanted is the case
                return


def _sync(api: Any, pool_id: str, manifests: list[dict[str, Any]]) -> None:
    from localcloud.nodes import sync

    sync(api, pool_id, manifests)


def _empty(api: Any) -> None:
    """Delete every object that Pulumi manages, of whatever kind, and wait for its namespaces to be gone."""
    if not api:
        return
    namespaces = {item["metadata"]["name"] for item in api.list("/api/v1/namespaces") if _by_pulumi(item)}
    for path, kind in _kinds(api):
        for item in api.list(f"{path}/{kind}"):
            space, name = item["metadata"].get("namespace"), item["metadata"]["name"]
            if _by_pulumi(item) and space not in namespaces:
                api.delete(f"{path}/namespaces/{space}/{kind}/{name}" if space else f"{path}/{kind}/{name}")
    deadline = time.monotonic() + EMPTY_SECONDS
    while time.monotonic() < deadline:
        if not namespaces & {item["metadata"]["name"] for item in api.list("/api/v1/namespaces")}:
            return
        time.sleep(0.2)


def _kinds(api: Any) -> Iterator[tuple[str, str]]:
    """(path of the group, plural name) of every kind that can be listed and deleted."""
    groups = [group["preferredVersion"]["groupVersion"] for group in api.get("/apis")["groups"]]
    for path in ("/api/v1", *(f"/apis/{group}" for group in groups)):
        for resource in api.get(path)["resources"]:
            if "/" not in resource["name"] and {"list", "delete"} <= set(resource["verbs"]):
                yield path, resource["name"]


def _by_pulumi(item: Mapping[str, Any]) -> bool:
    fields = item["metadata"].get("managedFields", [])
    return any(field.get("manager", "").startswith("pulumi") for field in fields)


def _no_answer(what: str, error: Exception) -> AzureError:
    return AzureError(500, "InternalOperationError", f"{what}: the control plane does not take it: {error}")


def _container_client(name: str) -> Any:
    endpoint, key = os.environ.get("DRYDOCK_BLOB_ENDPOINT"), os.environ.get("AZURE_STORAGE_KEY")
    if not endpoint or not key:
        return None
    from azure.core.credentials import AzureNamedKeyCredential
    from azure.storage.blob import ContainerClient

    account = urlsplit(endpoint).path.strip("/")
    return ContainerClient(
        endpoint.rstrip("/"), name, credential=AzureNamedKeyCredential(account, key), use_env_settings=False,
        connection_timeout=5, read_timeout=10, retry_total=2,
    )  # fmt: skip
