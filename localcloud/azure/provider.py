"""The resource provider `azure-native` over a world of its own, as the Pulumi engine asks it.

It answers as pulumi-azure-native 3 does: it takes no secrets (the engine keeps track of them itself), whatever is
replaced is deleted first unless the program says otherwise, and a preview knows of outputs what the inputs say.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf import empty_pb2, struct_pb2
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc, status_pb2

from localcloud.azure import faults, refusals, rules, types
from localcloud.azure.changes import changes, refuse_frozen
from localcloud.azure.errors import AzureError, HalfMade, ProviderError
from localcloud.azure.hands import CLUSTER, POOL, Hands, Pool, pools_of
from localcloud.azure.outputs import outputs
from localcloud.azure.rules import DEPLOYER, SUBSCRIPTION, TENANT, Rule
from localcloud.azure.values import UNKNOWN, has_unknown, plain, struct
from localcloud.azure.world import Record, Resources, World

THROTTLE_SECONDS = 0.2  # the provider waits 20, 60 and 120 s
RETRIES = 3
IDENTITY = "azure-native:managedidentity:UserAssignedIdentity"
CONTAINER = "azure-native:storage:BlobContainer"

Result = TypeVar("Result")


def _answers(method: Callable[..., Result]) -> Callable[..., Result]:
    """Errors as the engine prints them: the text alone, of this resource."""

    @functools.wraps(method)
    def asked(self: Provider, request: Any, context: grpc.ServicerContext) -> Result:
        try:
            return method(self, request, context)
        except HalfMade as half:
            status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=str(half))
            status.details.add().Pack(
                provider_pb2.ErrorResourceInitFailed(
                    id=half.id, properties=struct(half.outputs), inputs=struct(half.inputs), reasons=[str(half)]
                )
            )
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.UNKNOWN, str(half))
        except (AzureError, ProviderError) as error:
            context.abort(grpc.StatusCode.UNKNOWN, str(error))
        raise AssertionError("abort raises")

    return asked


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    """`folder`: of the local cloud (its control plane, its faults); `world`: where the resources are kept."""

    def __init__(self, folder: Path, world: Path) -> None:
        self._folder, self._world = folder, World(world)
        self._hands = Hands(folder)
        self._config: dict[str, str] = {}

    @property
    def _subscription(self) -> str:
        return self._config.get("subscriptionId", SUBSCRIPTION)

    def Handshake(self, request: Any, context: Any) -> Any:
        return provider_pb2.ProviderHandshakeResponse(supports_autonaming_configuration=True)

    def Attach(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def Cancel(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version=version("pulumi-azure-native"))

    def CheckConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.DiffResponse()

    def Configure(self, request: Any, context: Any) -> Any:
        self._config = {key.rpartition(":")[2]: value for key, value in request.variables.items()}
        return provider_pb2.ConfigureResponse(supportsPreview=True, supports_autonaming_configuration=True)

    @_answers
    def Check(self, request: Any, context: Any) -> Any:
        token = _token(request.urn)
        rule = _rule(token)
        inputs = struct_pb2.Struct()
        inputs.CopyFrom(request.news)
        for key in [key for key, value in inputs.fields.items() if value.HasField("null_value")]:
            del inputs.fields[key]
        inputs.update(self._defaults(token, rule, request))
        values = plain(inputs)
        failures = types.check(token, values) or list(rules.check(token, values))  # the rules rely on the types
        return provider_pb2.CheckResponse(
            inputs=inputs,
            # The path is part of each reason, for the engine shows the first name of a path alone.
            failures=[provider_pb2.CheckFailure(property=each.property, reason=each.reason) for each in failures],
        )

    def _defaults(self, token: str, rule: Rule, request: Any) -> dict[str, Any]:
        """What the provider puts in by itself: a name, a location, the version of the API."""
        kind, news, olds = types.ResourceType(token), plain(request.news), plain(request.olds)
        found: dict[str, Any] = {}
        name = rule.own_name
        if name not in news and not kind.inputs[name].required:
            if name in olds:
                found = {key: olds[key] for key in (name, "__createBeforeDelete") if key in olds}
            else:
                random = hashlib.sha256(request.randomSeed).hexdigest()
                guid = name in rule.names and rule.names[name].words == "a GUID"
                made = str(uuid.UUID(random[:32])) if guid else f"{request.urn.rpartition('::')[2]}{random[:8]}"
                found = {name: made, "__createBeforeDelete": True}
        if "location" in kind.inputs and "location" not in news:
            location = olds.get("location") or self._config.get("location") or self._group_location(news)
            found |= {"location": location} if location else {}
        if "azureApiVersion" not in news:
            found["azureApiVersion"] = kind.api_version
        return found

    def _group_location(self, news: Mapping[str, Any]) -> Any:
        group = news.get("resourceGroupName")
        if has_unknown(group):
            return UNKNOWN
        with self._world.hold() as resources:
            record = resources.get(f"/subscriptions/{self._subscription}/resourceGroups/{group}")
            return record.inputs.get("location") if record else None

    @_answers
    def Diff(self, request: Any, context: Any) -> Any:
        rule = _rule(_token(request.urn))
        old, new = plain(request.old_inputs), plain(request.news)
        found = changes(rule, old, new)
        replaces = [each.path for each in found if each.replaces]
        return provider_pb2.DiffResponse(
            changes=provider_pb2.DiffResponse.DIFF_SOME if found else provider_pb2.DiffResponse.DIFF_NONE,
            replaces=replaces,
            # Explicitly named: the new one could not be made while the old one is there.
            deleteBeforeReplace=bool(replaces) and not old.get("__createBeforeDelete", False),
            diffs=list(dict.fromkeys(each.path.partition(".")[0].partition("[")[0] for each in found)),
            detailedDiff={
                each.path: provider_pb2.PropertyDiff(
                    kind=getattr(provider_pb2.PropertyDiff, f"{each.kind}_REPLACE" if each.replaces else each.kind),
                    inputDiff=True,
                )
                for each in found
            },
            hasDetailedDiff=bool(found),
        )

    @_answers
    def Create(self, request: Any, context: Any) -> Any:
        token, inputs = _token(request.urn), plain(request.properties)
        if request.preview:
            return provider_pb2.CreateResponse(properties=struct(types.shaped(token, inputs, UNKNOWN)))
        rule = _rule(token)
        id_ = rule.id(inputs, self._subscription)
        fault = self._faults("create", token, id_, request.urn, inputs)
        with self._world.hold() as resources:
            if resources.get(id_) and not rule.singleton:
                raise ProviderError(f"cannot create already existing resource '{id_}'")
            refusals.put(resources, token, id_, inputs)
            made, pools = self._put(resources, token, id_, inputs)
        self._finish(made, pools, fault)
        return provider_pb2.CreateResponse(id=id_, properties=struct(made.outputs))

    @_answers
    def Read(self, request: Any, context: Any) -> Any:
        token = _token(request.urn)
        self._faults("read", token, request.id, request.urn, {})
        with self._world.hold() as resources:
            record = resources.get(request.id)
        if record is None:
            return provider_pb2.ReadResponse()
        return provider_pb2.ReadResponse(id=record.id, properties=struct(record.outputs), inputs=struct(record.inputs))

    @_answers
    def Update(self, request: Any, context: Any) -> Any:
        token, inputs = _token(request.urn), plain(request.news)
        if request.preview:
            found = types.shaped(token, inputs, UNKNOWN)
            old = plain(request.olds)
            found |= {key: old[key] for key in ("name", "location") if key in old}  # what no update changes
            return provider_pb2.UpdateResponse(properties=struct(found))
        rule = _rule(token)
        fault = self._faults("update", token, request.id, request.urn, inputs)
        with self._world.hold() as resources:
            record = resources.get(request.id)
            if record is not None:
                refuse_frozen(rule, record.inputs, inputs)
            # A PUT: what somebody deleted in the meantime is made again, if what it belongs to is there.
            refusals.put(resources, token, request.id, inputs)
            made, pools = self._put(resources, token, request.id, inputs)
        self._finish(made, pools, fault)
        return provider_pb2.UpdateResponse(properties=struct(made.outputs))

    @_answers
    def Delete(self, request: Any, context: Any) -> Any:
        token = _token(request.urn)
        self._faults("delete", token, request.id, request.urn, {})
        with self._world.hold() as resources:
            record = resources.get(request.id)
            if record is None:
                return empty_pb2.Empty()  # gone already: what is wanted is the case
            refusals.delete(resources, record)
            gone = resources.remove(request.id)
        self._clear(gone)
        return empty_pb2.Empty()

    @_answers
    def Invoke(self, request: Any, context: Any) -> Any:
        arguments = plain(request.args)
        if request.tok == "azure-native:authorization:getClientConfig":
            answer: dict[str, Any] = {
                "clientId": DEPLOYER, "objectId": DEPLOYER, "subscriptionId": self._subscription, "tenantId": TENANT,
            }  # fmt: skip
        elif request.tok == "azure-native:containerservice:listManagedClusterUserCredentials":
            kubeconfig = self._kubeconfig(arguments).encode()
            answer = {"kubeconfigs": [{"name": "clusterUser", "value": base64.b64encode(kubeconfig).decode()}]}
        else:
            raise ProviderError(f"{request.tok}: localcloud.azure does not answer this function")
        return provider_pb2.InvokeResponse(**{"return": struct(answer)})

    def _kubeconfig(self, arguments: Mapping[str, Any]) -> str:
        group, name = arguments.get("resourceGroupName"), arguments.get("resourceName")
        with self._world.hold() as resources:
            if not resources.get(_rule(CLUSTER).id(arguments, self._subscription)):
                raise refusals.not_found("Microsoft.ContainerService/managedClusters", str(name), str(group))
        return self._hands.kubeconfig()

    def _faults(self, action: str, token: str, id_: str, urn: str, inputs: Mapping[str, Any]) -> faults.Fault | None:
        """What an injected fault does before the request is done; the fault itself where it has more to do."""
        names = (id_.rpartition("/")[2], urn.rpartition("::")[2])
        throttled = 0
        while fault := faults.take(self._folder, action, token.partition(":")[2], *names):
            if fault.kind == "throttled":
                throttled += 1
                if throttled > RETRIES:
                    raise AzureError(429, "TooManyRequests", f"The request to {id_} was throttled; try again later.")
                time.sleep(THROTTLE_SECONDS)
            elif fault.kind == "slow":
                time.sleep(fault.seconds)
            elif fault.kind == "vanished":
                with self._world.hold() as resources:
                    gone = resources.remove(id_)
                self._clear(gone)
            elif fault.kind == "quota":
                raise refusals.quota(token, id_, inputs)
            elif fault.kind == "conflict":
                raise refusals.conflict(id_)
            else:
                return fault
        return None

    def _put(self, resources: Resources, token: str, id_: str, inputs: dict[str, Any]) -> tuple[Record, list[Pool]]:
        """The resource as it now is, and the pools of nodes that belong to it."""
        identities = {record.id.lower(): record.outputs for record in resources.of(IDENTITY)}
        record = Record(id_, token, inputs, outputs(token, id_, inputs, identities))
        pools = pools_of(resources, record)
        for pool in pools:
            self._hands.check(pool)
        resources.put(record)
        return record, pools

    def _finish(self, made: Record, pools: list[Pool], fault: faults.Fault | None) -> None:
        """What stands outside of the world: nodes, blob containers. What fails here is there nevertheless."""
        try:
            for pool in pools:
                self._hands.nodes(pool)
            if made.token == CONTAINER:
                self._hands.container(made.id.rpartition("/")[2])
            if fault and fault.kind == "half_made":
                raise refusals.conflict(made.id)
            if fault and fault.kind == "unanswered":
                time.sleep(fault.seconds)
        except AzureError as error:
            raise HalfMade(made.id, made.outputs, made.inputs, str(error)) from None

    def _clear(self, gone: list[Record]) -> None:
        names = {record.id.rpartition("/")[2] for record in gone if record.token == CONTAINER}
        # One emulator stands for all accounts: a container that another account has too stays.
        kept = (
            {record.id.rpartition("/")[2] for record in self._world.all() if record.token == CONTAINER}
            if names
            else set()
        )
        for name in names - kept:
            self._hands.no_container(name)
        for record in gone:
            if record.token == CLUSTER:
                self._hands.no_cluster()
                for pool in record.inputs.get("agentPoolProfiles", []):
                    self._hands.no_nodes(f"{record.id}/agentPools/{pool['name']}")
            elif record.token == POOL:
                self._hands.no_nodes(record.id)


def _token(urn: str) -> str:
    """The resource's own type: a URN lists those of its parents before it."""
    return urn.split("::")[2].rpartition("$")[2]


def _rule(token: str) -> Rule:
    try:
        return rules.rule(token)
    except KeyError:
        raise ProviderError(
            f"{token}: localcloud.azure does not know this type: add it to localcloud/azure/rules.py"
        ) from None
