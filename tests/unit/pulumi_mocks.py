"""Pulumi's mocks for the stack: every registered resource is kept, and what only Azure could compute is made up."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pulumi
from pulumi.runtime import mocks as runtime_mocks

from infra.names import Names
from infra.place import Place
from workloads.render import NAME_KEYS

SUBSCRIPTION = "00000000-0000-0000-0000-000000000001"
TENANT = "00000000-0000-0000-0000-000000000002"
ADMIN = "00000000-0000-0000-0000-000000000003"
PREFIX = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/drydock-test/providers"
DIGEST = "sha256:" + "d" * 64
LOAD_BALANCER = "10.64.7.250"

KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: drydock-test-aks
clusters: [{name: drydock-test-aks, cluster: {server: "https://drydock-test.example:443", certificate-authority-data: Q0E=}}]
contexts: [{name: drydock-test-aks, context: {cluster: drydock-test-aks, user: clusterUser}}]
users:
- name: clusterUser
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1beta1
      command: kubelogin
      args: [get-token, --environment, AzurePublicCloud, --server-id, 6dae42f8-4368-4678-94ff-3960e28e3630,
        --client-id, 80faf920-1908-4b52-b5ef-a8e7bedfc67a, --tenant-id, "00000000-0000-0000-0000-000000000002", --login, devicecode]
      env: null
"""


@dataclass(frozen=True)
class Resource:
    """One registered resource as it reached the engine: camelCase inputs; numbers may be floats."""

    type: str
    name: str
    inputs: dict[str, Any]
    custom: bool


@dataclass
class Recorder(runtime_mocks.Mocks):
    """Keeps resources in the order of their registration."""

    resources: list[Resource] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def new_resource(self, args: runtime_mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        self.resources.append(Resource(args.typ, args.name, args.inputs, bool(args.custom)))
        state = {**args.inputs, **computed(args.typ, args.name, args.inputs)}
        return f"{PREFIX}/{args.typ.replace(':', '/')}/{args.name}", state

    def call(self, args: runtime_mocks.MockCallArgs) -> dict[str, Any]:  # type: ignore[override]  # a dict is right too
        self.calls.append((args.token, args.args))
        if args.token.endswith("listManagedClusterUserCredentials"):
            return {"kubeconfigs": [{"name": "clusterUser", "value": base64.b64encode(KUBECONFIG.encode()).decode()}]}
        if args.token.endswith("getClientConfig"):
            return {"clientId": ADMIN, "objectId": ADMIN, "subscriptionId": SUBSCRIPTION, "tenantId": TENANT}
        return {}

    def of(self, suffix: str) -> list[Resource]:
        """The resources whose type ends in `suffix`, such as `:AgentPool`."""
        return [resource for resource in self.resources if resource.type.endswith(suffix)]

    def one(self, suffix: str, name: str | None = None) -> Resource:
        """The only resource of that type (and name)."""
        found = [item for item in self.of(suffix) if name is None or item.name == name]
        assert len(found) == 1, f"{suffix} {name or ''}: found {[item.name for item in found]}"
        return found[0]


def computed(kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What Azure would answer beyond the inputs."""
    last = kind.rpartition(":")[2]
    own = {"name": inputs.get(NAME_KEYS.get(last, ""), name)}
    if last == "UserAssignedIdentity":
        return own | {
            "principalId": _guid(f"principal-{name}"),
            "clientId": _guid(f"client-{name}"),
            "tenantId": TENANT,
        }
    if last == "ManagedCluster":
        return own | {
            "oidcIssuerProfile": {
                "enabled": True,
                "issuerURL": "https://oidc.example/1/",
                "issuerUrl": "https://oidc.example/1/",
            },
            "identityProfile": {"kubeletidentity": {"objectId": _guid("kubelet")}},
            # A list on its way in, a map on its way out.
            "identity": {
                "type": "UserAssigned",
                "userAssignedIdentities": {i: {} for i in inputs.get("identity", {}).get("userAssignedIdentities", [])},
            },
            "nodeResourceGroup": "MC_drydock-test",
            "fqdn": "drydock-test.example",
            "privateFqdn": "drydock-test.private.example",
        }
    if last == "Registry":
        return own | {"loginServer": f"{own['name']}.azurecr.io"}
    if last == "AzureMonitorWorkspace":
        return own | {"metrics": {"prometheusQueryEndpoint": "https://prometheus.example", "internalId": "1"}}
    if last == "Grafana":
        return own | {
            "identity": {"principalId": _guid(name), "tenantId": TENANT, "type": "SystemAssigned"},
            "properties": {**inputs.get("properties", {}), "endpoint": "https://grafana.example"},
        }
    if last == "ImageBuild":
        return {"digest": DIGEST}
    if last == "Service" and inputs["spec"].get("type") == "LoadBalancer":
        return {"status": {"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}}}
    if last == "FileUpload":
        return {"url": f"az://{inputs['account']}/{inputs['container']}/{inputs['blob']}"}
    return own if kind.startswith("azure-native:") else {}


def _guid(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


@contextmanager
def mocked(
    *, preview: bool = False, project: str = "drydock", stack: str = "test", config: dict[str, Any] | None = None
) -> Iterator[Recorder]:
    """Mocks for the resources made inside the block; see `deploy`, which also waits for them."""
    recorder = Recorder()
    try:
        asyncio.get_event_loop()
    except RuntimeError:
        asyncio.set_event_loop(asyncio.new_event_loop())
    pulumi.runtime.set_mocks(recorder, project=project, stack=stack, preview=preview, organization="example")
    if (root := pulumi.runtime.get_root_resource()) is not None:
        root._transformations = []  # what a program before this one, in the same process, left for all of the stack
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (config or {}).items()}
    pulumi.runtime.set_all_config(texts, [])
    yield recorder


def deploy(program: Callable[[], Any], **options: Any) -> Recorder:
    """Run `program` under mocks until nothing is outstanding; an error in it, or in an `apply`, is raised here."""
    with mocked(**options) as seen:
        pulumi.runtime.test(program)()  # type: ignore[no-untyped-call]
    return seen


def place(*, private: bool = False, protect: bool = True) -> Place:
    """A place to put one component under test."""
    return Place(
        names=Names("example", SUBSCRIPTION, "drydock-test"),
        location="swedencentral",
        group="drydock-test",
        group_id=f"/subscriptions/{SUBSCRIPTION}/resourceGroups/drydock-test",
        subscription_id=SUBSCRIPTION,
        tenant_id=TENANT,
        admin_id=ADMIN,
        admin_type="User",
        protect=protect,
        private=private,
    )
