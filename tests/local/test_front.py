"""Azure's hosts as pods meet them: our own clients and Azure's SDK, unchanged, before Azurite and a real registry."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import stat
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jwt
import numpy as np
import pytest
import requests
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError
from azure.identity import WorkloadIdentityCredential
from azure.storage.blob import BlobServiceClient, ContainerClient
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from huggingface_hub import close_session
from safetensors.numpy import save_file

import infra.roles
from artifacts.adapter import AdapterCard, fetch_adapter, publish_adapter
from artifacts.store import StoreError, open_store
from blobs.__main__ import main as blobs
from common import exits
from common.files import file_digest
from common.processes import Processes, free_ports
from localcloud import azurite, registry
from localcloud.azure.rules import SUBSCRIPTION, TENANT
from localcloud.azure.world import World
from localcloud.front import Front, directory, hosts
from localcloud.front.authority import private_key
from localcloud.hub import revision_of
from tests.stack.azure_engine import GROUP, Engine

pytestmark = [
    pytest.mark.skipif(not azurite.AZURITE.exists(), reason="needs npm: make azurite"),
    pytest.mark.skipif(
        shutil.which("docker-registry") is None, reason="docker-registry: install the Debian package of that name"
    ),
]

BASE = Path(__file__).parents[2] / "rehearsal" / "base"
IN_GROUP = {"resourceGroupName": "g", "location": "swedencentral"}
AUDIENCE = "api://AzureADTokenExchange"
STORAGE, REGISTRY = "https://storage.azure.com/.default", "https://containerregistry.azure.net/.default"
BLOB, ACR = "https://drydock1.blob.core.windows.net", "https://reg01.azurecr.io"


@dataclass
class Azure:
    """An environment of Azure with its front. `client_ids` and `principals` of its identities are by name."""

    engine: Engine
    front: Front
    registry: str
    issuer_key: RSAPrivateKey
    issuer: str
    client_ids: dict[str, str] = field(default_factory=dict)
    principals: dict[str, str] = field(default_factory=dict)

    def identity(self, name: str, *roles: tuple[str, str], federated: bool = True) -> list[str]:
        """Make an identity for the service account drydock/`name`; IDs of its role assignments."""
        _, made = self.engine.make("managedidentity:UserAssignedIdentity", IN_GROUP | {"resourceName": name})
        self.client_ids[name], self.principals[name] = made["clientId"], made["principalId"]
        if federated:
            self.engine.make(
                "managedidentity:FederatedIdentityCredential",
                {
                    "resourceGroupName": "g", "resourceName": name, "issuer": self.issuer,
                    "federatedIdentityCredentialResourceName": "kubernetes",
                    "subject": f"system:serviceaccount:drydock:{name}", "audiences": [AUDIENCE],
                },
            )  # fmt: skip
        return [self.grant(made["principalId"], role, scope) for role, scope in roles]

    def grant(self, principal: str, role: str, scope: str) -> str:
        return self.engine.make(
            "authorization:RoleAssignment",
            {
                "roleAssignmentName": f"{principal}-{role[:8]}", "principalId": principal, "scope": scope,
                "roleDefinitionId": f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Authorization/roleDefinitions/{role}",
            },
        )[0]  # fmt: skip

    def assertion(self, account: str = "reader", key: RSAPrivateKey | None = None, **claims: Any) -> str:
        """A token of the service account drydock/`account`, as the API server makes it."""
        now = int(time.time())
        content = {
            "aud": [AUDIENCE], "exp": now + 3600, "iat": now, "nbf": now, "iss": "https://kubernetes.default.svc",
            "kubernetes.io": {"namespace": "drydock", "serviceaccount": {"name": account, "uid": "1"}},
            "sub": f"system:serviceaccount:drydock:{account}",
        }  # fmt: skip
        return jwt.encode(content | claims, key or self.issuer_key, "RS256")


def account_id(name: str) -> str:
    return f"{GROUP}/providers/Microsoft.Storage/storageAccounts/{name}"


MODELS = f"{account_id('drydock1')}/blobServices/default/containers/models"
REGISTRY_ID = f"{GROUP}/providers/Microsoft.ContainerRegistry/registries/reg01"


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    folder = tmp_path_factory.mktemp("cloud")
    engine, issuer_key = Engine(folder), folder / "service-accounts.key"
    with contextlib.ExitStack() as opened:
        processes = opened.enter_context(Processes())
        endpoint = azurite.start(processes, folder / "blobs", folder / "logs" / "azurite.log")
        host = opened.enter_context(registry.serve(folder / "registry"))
        front = opened.enter_context(
            contextlib.closing(
                Front(
                    folder, World(engine.world), issuer_key=issuer_key, blobs=endpoint, account_key=azurite.KEY,
                    registry=host, models={"drydock/tiny": BASE},
                )
            )
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DRYDOCK_BLOB_ENDPOINT", endpoint)
            patch.setenv("AZURE_STORAGE_KEY", azurite.KEY)
            issuer = make_azure(engine)
        azure = Azure(engine, front, host, private_key(issuer_key), issuer)
        azure.identity("reader", (directory.BLOB_DATA_READER, MODELS), (directory.ACR_PULL, REGISTRY_ID))
        azure.identity("writer", (directory.BLOB_DATA_CONTRIBUTOR, MODELS), (directory.ACR_PUSH, REGISTRY_ID))
        azure.identity("elsewhere", (directory.BLOB_DATA_CONTRIBUTOR, account_id("drydock2")))
        azure.identity("nobody")
        azure.identity("stranger", federated=False)
        yield azure


def make_azure(engine: Engine) -> str:
    """All but the identities; the issuer of the cluster."""
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": "swedencentral"})
    for account, container in (("drydock1", "models"), ("drydock1", "checkpoints"), ("drydock2", "others")):
        where = IN_GROUP | {"accountName": account}
        if container != "checkpoints":
            engine.make("storage:StorageAccount", where | {"kind": "StorageV2", "sku": {"name": "Standard_LRS"}})
        engine.make(
            "storage:BlobContainer", {"resourceGroupName": "g", "accountName": account, "containerName": container}
        )
    engine.make("containerregistry:Registry", IN_GROUP | {"registryName": "reg01", "sku": {"name": "Standard"}})
    subnet = {"name": "nodes", "addressPrefix": "10.64.0.0/21"}
    engine.make("network:VirtualNetwork", IN_GROUP | {"virtualNetworkName": "vnet", "subnets": [subnet]})
    pool = {"name": "system", "mode": "System", "count": 1, "vmSize": "Standard_D4s_v5"}
    pool["vnetSubnetID"] = f"{GROUP}/providers/Microsoft.Network/virtualNetworks/vnet/subnets/nodes"
    _, cluster = engine.make(
        "containerservice:ManagedCluster",
        IN_GROUP | {
            "resourceName": "aks", "dnsPrefix": "drydock", "kubernetesVersion": "1.35", "agentPoolProfiles": [pool],
            "oidcIssuerProfile": {"enabled": True},
        },
    )  # fmt: skip
    return str(cluster["oidcIssuerProfile"]["issuerURL"])


@pytest.fixture(autouse=True)
def pod(azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This process sees what a pod sees. Call it with the name of an identity, and of a service account if not its."""
    names, resolve = set(hosts(World(azure.engine.world))), socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host in names and int(port) == 443:
            return resolve("127.0.0.1", azure.front.server_port, *arguments, **options)
        if host == "127.0.0.1":
            return resolve(host, port, *arguments, **options)
        raise socket.gaierror(socket.EAI_NONAME, f"{host}: no pod asks for this")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in os.environ:
        if name.startswith(("AZURE_", "DRYDOCK_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(azure.front.ca_bundle))

    def be(identity: str, account: str | None = None) -> None:
        token = tmp_path / "token"
        token.write_text(azure.assertion(account or identity))
        monkeypatch.setenv("AZURE_CLIENT_ID", azure.client_ids[identity])
        monkeypatch.setenv("AZURE_TENANT_ID", TENANT)
        monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(token))
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", "https://login.microsoftonline.com/")

    return be


def bearer(scope: str = STORAGE) -> dict[str, str]:
    """The header of whoever the process is; with the version that a storage account wants of it."""
    token = WorkloadIdentityCredential().get_token(scope).token
    return {"Authorization": f"Bearer {token}", "x-ms-version": "2023-11-03"}


def of_size(path: Path, megabytes: int) -> Path:
    path.write_bytes(os.urandom(2**20) * megabytes)
    return path


# Blob Storage


def test_a_writer_s_file_comes_to_a_reader_who_may_not_write(
    pod: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = of_size(tmp_path / "source", 50), tmp_path / "target"
    address, sha256 = "az://drydock1/models/big/file", file_digest(source)
    pod("writer")
    assert blobs(["push", str(source), address]) == exits.OK
    pod("reader")
    assert blobs(["fetch", address, str(target), "--sha256", sha256]) == exits.OK
    assert file_digest(target) == sha256
    assert blobs(["push", str(target), "az://drydock1/models/mine"]) == exits.INPUT
    told = capsys.readouterr().err
    assert (
        "az://drydock1/models/mine: refused (403 AuthorizationPermissionMismatch): this identity needs the role "
        "Storage Blob Data Contributor on account drydock1"
    ) in told


@pytest.mark.parametrize(
    "who, address, told",
    [
        ("nobody", "az://drydock1/models/x", "403 AuthorizationPermissionMismatch"),
        ("reader", "az://drydock1/checkpoints/x", "403 AuthorizationPermissionMismatch"),
        ("elsewhere", "az://drydock1/models/x", "403 AuthorizationPermissionMismatch"),
        ("elsewhere", "az://drydock2/models/x", "account drydock2 has no container models"),
        ("reader", "az://drydock1/models/x", "az://drydock1/models/x/.complete.json: absent"),
    ],
)
def test_roles_reach_as_far_as_their_scope(
    pod: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], who: str, address: str, told: str
) -> None:
    pod(who)
    assert blobs(["fetch", address, str(tmp_path / "out")]) == exits.INPUT
    assert told in capsys.readouterr().err


def test_a_role_that_is_taken_away_counts_no_more(azure: Azure, pod: Callable[..., None]) -> None:
    (assignment,) = azure.identity("leaver", (directory.BLOB_DATA_READER, GROUP))
    pod("leaver")
    container = ContainerClient(BLOB, "models", WorkloadIdentityCredential(), retry_total=0)
    assert [*container.list_blob_names(name_starts_with="none/")] == []
    azure.engine.delete("authorization:RoleAssignment", assignment)
    with pytest.raises(HttpResponseError) as caught:
        list(container.list_blob_names())
    assert caught.value.status_code == 403 and "ErrorCode:AuthorizationPermissionMismatch" in str(caught.value)


@pytest.mark.parametrize("scope", [MODELS, account_id("drydock1"), GROUP, f"/subscriptions/{SUBSCRIPTION}", "/"])
def test_a_role_covers_what_is_in_its_scope(azure: Azure, scope: str) -> None:
    looked_up = directory.Directory(World(azure.engine.world))
    principal, roles = str(hash(scope)), {directory.BLOB_DATA_READER}
    assert not looked_up.allowed(principal, roles, MODELS)
    assignment = azure.grant(principal, directory.BLOB_DATA_READER, scope)
    assert looked_up.allowed(principal, roles, MODELS.upper())
    assert not looked_up.allowed(principal, {directory.BLOB_DATA_CONTRIBUTOR}, MODELS)
    if scope == MODELS:
        assert not looked_up.allowed(principal, roles, f"{MODELS}2")
        assert not looked_up.allowed(principal, roles, account_id("drydock1"))
    azure.engine.delete("authorization:RoleAssignment", assignment)


def test_roles_are_those_that_the_stack_gives() -> None:
    for name in ("ACR_PULL", "ACR_PUSH", "BLOB_DATA_CONTRIBUTOR", "BLOB_DATA_READER"):
        assert getattr(directory, name) == getattr(infra.roles, name)


def test_the_sdk_s_requests_pass_as_they_are(pod: Callable[..., None]) -> None:
    pod("writer")
    container = ContainerClient(BLOB, "models", WorkloadIdentityCredential(), retry_total=0)
    for name in ("odd/a b+c%41.json", "odd/Blåhaj/ü", "odd/plain"):
        container.upload_blob(name, name.encode(), metadata={"sha256": "1", "with_1": "ä".encode().hex(), "With2": "x"})
        assert container.download_blob(name).readall() == name.encode()
    found = container.get_blob_client("odd/plain").get_blob_properties()
    assert found.size == 9 and found.metadata == {"sha256": "1", "with_1": "c3a4", "With2": "x"}
    assert container.download_blob("odd/plain", offset=4, length=3).readall() == b"pla"
    pages = [[blob.name for blob in page] for page in container.list_blobs("odd/", results_per_page=2).by_page()]
    assert pages == [["odd/Blåhaj/ü", "odd/a b+c%41.json"], ["odd/plain"]]
    assert [item.name for item in container.walk_blobs("odd/", delimiter="/")] == [
        "odd/Blåhaj/", "odd/a b+c%41.json", "odd/plain"]  # fmt: skip
    with pytest.raises(HttpResponseError, match="ConditionNotMet"):
        container.upload_blob("odd/plain", b"", overwrite=True, etag='"no"', match_condition=_if_match())
    with pytest.raises(ResourceNotFoundError, match="BlobNotFound"):
        container.download_blob("odd/absent")
    container.delete_blob("odd/plain", delete_snapshots="include")
    assert not container.get_blob_client("odd/plain").exists()
    with pytest.raises(HttpResponseError, match="AuthorizationPermissionMismatch"):
        list(BlobServiceClient(BLOB, WorkloadIdentityCredential(), retry_total=0).list_containers())


def _if_match() -> Any:
    from azure.core import MatchConditions

    return MatchConditions.IfNotModified


def test_a_connection_is_kept_whatever_is_answered(pod: Callable[..., None]) -> None:
    pod("writer")
    signed = bearer()
    with requests.Session() as session:
        ports, etag = set(), ""
        put = signed | {"x-ms-blob-type": "BlockBlob", "Content-Type": "text/plain"}
        for method, path, headers, data, status in (
            ("PUT", "kept", put, b"0123456789", 201),
            ("GET", "kept", signed | {"Range": "bytes=2-4"}, None, 206),
            ("HEAD", "kept", signed, None, 200),
            ("HEAD", "absent", signed, None, 404),
            ("GET", "absent", signed, None, 404),
            ("PUT", "kept", {}, b"x" * 3_000_000, 401),
            ("PUT", "kept", put, iter([b"in ", b"chunks"]), 411),
            ("GET", "kept", signed, None, 304),
            ("GET", "?restype=container&comp=list&prefix=kept", signed, None, 200),
        ):
            if status == 304:
                headers = signed | {"If-None-Match": etag}
            answer = session.request(method, f"{BLOB}/models/{path}", headers=headers, data=data, stream=True)
            etag = answer.headers.get("ETag", etag)
            ports.add(answer.raw.connection.sock.getsockname()[1])  # type: ignore[union-attr]
            body = answer.content
            assert answer.status_code == status, answer.text
            if status == 206:
                assert (body, answer.headers["Content-Range"]) == (b"234", "bytes 2-4/10")
            if method == "HEAD":
                assert not body
        assert len(ports) == 1


def test_a_sign_in_that_is_wrong_is_refused_as_azure_does(azure: Azure, pod: Callable[..., None]) -> None:
    pod("reader")
    ours, acr = bearer(), bearer(REGISTRY)
    other = jwt.encode(
        jwt.decode(ours["Authorization"][7:], options={"verify_signature": False}), azure.issuer_key, "RS256"
    )
    for headers, status, code, detail in (
        ({}, 401, "NoAuthenticationInformation", ""),
        ({"Authorization": "SharedKey drydock1:eA=="}, 403, "KeyBasedAuthenticationNotPermitted", ""),
        (acr, 401, "InvalidAuthenticationInfo", "Audience validation failed. Audience did not match."),
        ({"Authorization": f"Bearer {other}"}, 401, "InvalidAuthenticationInfo", "Signature validation failed."),
        (ours | {"x-ms-copy-source": f"{BLOB}/checkpoints/x"}, 501, "NotImplemented", ""),
    ):  # fmt: skip
        answer = requests.get(f"{BLOB}/models/x", headers=headers)
        assert (answer.status_code, answer.headers["x-ms-error-code"]) == (status, code)
        assert f"<Code>{code}</Code>" in answer.text and detail in answer.text
        if status == 401:
            challenge = f"Bearer authorization_uri=https://login.microsoftonline.com/{TENANT}/oauth2/authorize"
            assert answer.headers["WWW-Authenticate"].startswith(challenge)


class Stream:
    """A body that is nowhere whole."""

    def __init__(self, size: int) -> None:
        self.left = size

    def __len__(self) -> int:
        return self.left

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(2**14):
            yield piece

    def read(self, size: int) -> bytes:
        piece = b"x" * min(size, self.left)
        self.left -= len(piece)
        return piece


def test_bodies_are_not_kept_in_memory(pod: Callable[..., None]) -> None:
    pod("writer")
    size = 50 * 2**20
    tracemalloc.start()
    try:
        put = bearer() | {"x-ms-blob-type": "BlockBlob"}
        assert requests.put(f"{BLOB}/models/stream", headers=put, data=Stream(size)).status_code == 201
        with requests.get(f"{BLOB}/models/stream", headers=bearer(), stream=True) as answer:
            assert sum(len(each) for each in answer.iter_content(2**18)) == size
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 2**20


@pytest.mark.parametrize("who, first", [("reader", b"HTTP/1.1 403"), ("writer", b"HTTP/1.1 100")])
def test_a_client_that_waits_sends_its_body_only_where_it_is_wanted(
    azure: Azure, pod: Callable[..., None], who: str, first: bytes
) -> None:
    pod(who)
    headers = bearer() | {"x-ms-blob-type": "BlockBlob", "Expect": "100-continue", "Content-Length": "4",
                          "Host": "drydock1.blob.core.windows.net"}  # fmt: skip
    head = "PUT /models/waited HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    trust = ssl.create_default_context(cafile=str(azure.front.ca_bundle))
    with socket.create_connection(("127.0.0.1", azure.front.server_port), 10) as plain:
        connection = trust.wrap_socket(plain, server_hostname="drydock1.blob.core.windows.net")
        connection.sendall(f"{head}\r\n".encode())
        answer = connection.recv(2**16)
        assert answer.startswith(first)
        if who == "writer":
            connection.sendall(b"body")
            assert connection.recv(2**16).startswith(b"HTTP/1.1 201")
        else:
            assert b"\r\nConnection: close\r\n" in answer
        connection.close()


# Entra


def test_the_account_of_another_pod_gets_no_token(
    pod: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pod("reader", account="writer")
    assert blobs(["fetch", "az://drydock1/models/x", str(tmp_path / "out")]) == exits.INPUT
    told = capsys.readouterr().err
    assert "no Entra token" in told and "(invalid_client) AADSTS700213: No matching federated identity record" in told
    assert "presented assertion subject 'system:serviceaccount:drydock:writer'" in told


@pytest.mark.parametrize(
    "fields, claims, error, code",
    [
        ({"client_id": "0"}, {}, "unauthorized_client", 700016),
        ({"client_id": "stranger"}, {}, "invalid_client", 70025),
        ({"client_assertion": "x"}, {}, "invalid_request", 50027),
        ({"client_assertion_type": ""}, {}, "invalid_client", 7000218),
        ({"grant_type": "password"}, {}, "unsupported_grant_type", 70003),
        ({"scope": "https://storage.azure.com"}, {}, "invalid_scope", 1002012),
        ({}, {"exp": 1}, "invalid_client", 700024),
        ({}, {"iss": "https://elsewhere.example"}, "invalid_client", 700211),
        ({}, {"aud": ["https://kubernetes.default.svc"]}, "invalid_client", 700212),
        ({}, {"sub": "system:serviceaccount:other:reader"}, "invalid_client", 700213),
        ({}, {"forged": True}, "invalid_client", 50013),
    ],
)
def test_what_entra_refuses(
    azure: Azure, tmp_path: Path, fields: dict[str, str], claims: dict[str, Any], error: str, code: int
) -> None:
    key = private_key(tmp_path / "other.key") if claims.pop("forged", False) else None
    form = {
        "client_id": azure.client_ids.get(fields.get("client_id", "reader"), "0"), "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer", "scope": STORAGE,
        "client_assertion": azure.assertion(key=key, **claims),
    }  # fmt: skip
    form |= {name: value for name, value in fields.items() if name != "client_id"}
    answer = requests.post(f"https://login.microsoftonline.com/{TENANT}/oauth2/v2.0/token", data=form)
    told = answer.json()
    assert (told["error"], told["error_codes"]) == (error, [code])
    assert told["error_description"].startswith(f"AADSTS{code}: ") and answer.status_code in (400, 401)


def test_a_tenant_or_a_cluster_that_is_not_there_is_told(azure: Azure, pod: Callable[..., None]) -> None:
    pod("reader")
    with pytest.raises(ClientAuthenticationError, match=r"AADSTS90002: Tenant 'other' not found"):
        WorkloadIdentityCredential(tenant_id="other").get_token(STORAGE)
    with pytest.raises(ClientAuthenticationError, match="AADSTS700211"):
        azure_token = azure.assertion(iss="https://another.example/")
        Path(os.environ["AZURE_FEDERATED_TOKEN_FILE"]).write_text(azure_token)
        WorkloadIdentityCredential().get_token(STORAGE)
    Path(os.environ["AZURE_FEDERATED_TOKEN_FILE"]).write_text(azure.assertion(iss=azure.issuer))
    assert WorkloadIdentityCredential().get_token(STORAGE).token


def test_msal_finds_its_way_by_discovery(azure: Azure) -> None:
    import msal

    app = msal.ConfidentialClientApplication(
        azure.client_ids["reader"], authority=f"https://login.microsoftonline.com/{TENANT}",
        client_credential={"client_assertion": azure.assertion},
    )  # fmt: skip
    found = app.acquire_token_for_client([REGISTRY])
    configuration = f"https://login.microsoftonline.com/{TENANT}/v2.0/.well-known/openid-configuration"
    keys = jwt.PyJWKClient(requests.get(configuration).json()["jwks_uri"], ssl_context=_trust(azure))
    key = keys.get_signing_key_from_jwt(found["access_token"])
    claims = jwt.decode(found["access_token"], key, ["RS256"], audience="https://containerregistry.azure.net")
    assert claims["oid"] == azure.principals["reader"] and 3500 < claims["exp"] - time.time() <= 3600


def _trust(azure: Azure) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(azure.front.ca_bundle))


# The registry


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "target_modules": ["q_proj"]})
    )
    (folder / "canaries.json").write_text("[]")
    prefix, random = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng()
    shapes = {"lora_A": (16, 400_000), "lora_B": (400_000, 16)}  # 51 MB
    tensors = {f"{prefix}.{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


CARD = AdapterCard(
    name="kubectl", base_model="tiny", base_revision="sha256:b", dataset_digest="sha256:d",
    evaluation={"metric": "exact_match", "base": 0.2, "adapter": 0.8, "gain": 0.6, "passed": True},
)  # fmt: skip


def test_who_may_push_pushes_and_who_may_pull_pulls(
    azure: Azure, pod: Callable[..., None], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    url = "oci://reg01.azurecr.io/adapters"
    pod("writer")
    digest = publish_adapter(open_store(url), "kubectl", adapter, CARD)
    pod("reader")
    store = open_store(url)
    fetched = fetch_adapter(store, "kubectl", digest, tmp_path / "out")
    assert file_digest(fetched.folder / "adapter_model.safetensors") == file_digest(
        adapter / "adapter_model.safetensors"
    )
    assert "adapters/kubectl" in store.repositories()
    role = f"the Entra identity with client id {azure.client_ids['reader']} needs the role AcrPush on reg01.azurecr.io"
    with pytest.raises(StoreError, match=role):
        store.tag("adapters/kubectl", digest, "mine")
    pod("nobody")
    with pytest.raises(
        StoreError, match=r"refused the Entra token \(401 Unauthorized UNAUTHORIZED\).*needs the role AcrPull"
    ):
        open_store(url).tags("adapters/kubectl")


def test_a_role_on_the_registry_that_is_taken_away_counts_no_more(
    azure: Azure, pod: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (assignment,) = azure.identity("quitter", (directory.ACR_PULL, REGISTRY_ID))
    pod("quitter")
    store = open_store("oci://reg01.azurecr.io/adapters")
    assert store.tags("adapters/nothing") == {}
    azure.engine.delete("authorization:RoleAssignment", assignment)
    with pytest.raises(StoreError, match=r"401 Unauthorized: UNAUTHORIZED.*needs the role AcrPull"):
        store.tags("adapters/nothing")
    with pytest.raises(StoreError, match="refused the Entra token"):
        store.tags("adapters/nothing")


def registry_token(scope: str, **more: str) -> requests.Response:
    entra = bearer(REGISTRY)["Authorization"].removeprefix("Bearer ")
    given = {"grant_type": "access_token", "service": "reg01.azurecr.io", "access_token": entra}
    refresh = requests.post(f"{ACR}/oauth2/exchange", data=given).json()["refresh_token"]
    asked = {"grant_type": "refresh_token", "service": "reg01.azurecr.io", "scope": scope, "refresh_token": refresh}
    return requests.post(f"{ACR}/oauth2/token", data=asked | more)


def test_tokens_are_for_what_was_asked_and_no_more(pod: Callable[..., None]) -> None:
    pod("writer")
    asked = requests.get(f"{ACR}/v2/thing/tags/list")
    assert asked.status_code == 401 and asked.json()["errors"][0]["code"] == "UNAUTHORIZED"
    assert asked.headers["WWW-Authenticate"] == (
        'Bearer realm="https://reg01.azurecr.io/oauth2/token",service="reg01.azurecr.io",scope="repository:thing:pull"'
    )
    token = registry_token("repository:thing:pull,push,delete").json()["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["access"] == [{"type": "repository", "name": "thing", "actions": ["pull", "push"]}]
    signed = {"Authorization": f"Bearer {token}"}
    for method, path, status, error in (
        ("GET", "/v2/", 200, None),
        ("GET", "/v2/thing/tags/list", 404, None),
        ("GET", "/v2/other/tags/list", 401, "insufficient_scope"),
        ("GET", "/v2/_catalog", 401, "insufficient_scope"),
        ("DELETE", f"/v2/thing/manifests/sha256:{'0' * 64}", 401, "insufficient_scope"),
        ("GET", "/v2/thing/manifests/..%2f..%2f..%2fother/tags/list", 404, None),
        ("GET", "/v2/thing", 404, None),
        ("GET", "/elsewhere", 404, None),
    ):
        answer = requests.request(method, ACR + path, headers=signed)
        assert answer.status_code == status, (path, answer.text)
        assert error is None or f'error="{error}"' in answer.headers["WWW-Authenticate"]
    for wrong in ("x", bearer(REGISTRY)["Authorization"].removeprefix("Bearer "), token):
        assert registry_token("repository:thing:pull", refresh_token=wrong).status_code == 401
    refused = requests.get(f"{ACR}/v2/", headers=bearer(REGISTRY))
    assert 'error="invalid_token"' in refused.headers["WWW-Authenticate"]


def test_a_layer_in_chunks_streams_through(azure: Azure, pod: Callable[..., None]) -> None:
    pod("writer")
    signed = {"Authorization": f"Bearer {registry_token('repository:chunks:pull,push').json()['access_token']}"}
    piece, count = os.urandom(2**18), 200
    digest = "sha256:" + hashlib.sha256(piece * count).hexdigest()
    opened = requests.post(f"{ACR}/v2/chunks/blobs/uploads/", headers=signed)
    assert opened.status_code == 202 and opened.headers["Location"].startswith("/v2/chunks/blobs/uploads/")
    sent = requests.patch(ACR + opened.headers["Location"], data=(piece for _ in range(count)), headers=signed)
    assert sent.status_code == 202 and sent.headers["Range"] == f"0-{len(piece) * count - 1}"
    done = requests.put(f"{ACR}{sent.headers['Location']}&digest={digest}", headers=signed)
    assert done.status_code == 201 and done.headers["Location"] == f"/v2/chunks/blobs/{digest}"
    found = requests.get(f"{ACR}/v2/chunks/blobs/{digest}", headers=signed)
    assert "sha256:" + hashlib.sha256(found.content).hexdigest() == digest
    assert requests.head(f"{ACR}/v2/chunks/blobs/{digest}", headers=signed).headers["Content-Length"] == str(
        len(piece) * count
    )


# The hub, and the whole


def test_a_model_is_mirrored_from_the_hub(
    pod: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read when imported, by whom ever
    close_session()  # one that trusts others
    pod("writer")
    mirror = ["mirror", "drydock/tiny", "--revision", revision_of(BASE), "az://drydock1/models/tiny"]
    try:
        assert blobs(mirror) == exits.OK
        assert blobs(["mirror", "drydock/other", "--revision", "0" * 40, "az://drydock1/models/other"]) == exits.INPUT
        assert "drydock/other: no such model" in capsys.readouterr().err
    finally:
        close_session()
    pod("reader")
    assert blobs(["fetch", "az://drydock1/models/tiny", str(tmp_path / "base")]) == exits.OK
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (BASE / "model.safetensors").read_bytes()


def test_what_is_behind_may_be_away(azure: Azure, pod: Callable[..., None], tmp_path: Path) -> None:
    pod("writer")
    (port,) = free_ports(1)
    front = Front(
        azure.engine.folder, World(azure.engine.world), issuer_key=tmp_path / "none", models={},
        blobs=f"http://127.0.0.1:{port}/devstoreaccount1", account_key=azurite.KEY, registry=f"127.0.0.1:{port}",
    )  # fmt: skip
    token = registry_token("repository:thing:pull").json()["access_token"]
    here = front.url.replace("localhost", "127.0.0.1")
    try:
        with requests.Session() as session:
            for host, path, headers in (
                ("drydock1.blob.core.windows.net", "/models/x", bearer() | {"x-ms-blob-type": "BlockBlob"}),
                ("reg01.azurecr.io", "/v2/thing/tags/list", {"Authorization": f"Bearer {token}"}),
            ):
                method, data = ("PUT", b"x" * 2**20) if "blob" in host else ("GET", None)
                answer = session.request(method, here + path, headers=headers | {"Host": host}, data=data, timeout=10)
                assert answer.status_code == 503, answer.text
            for host, status in (("elsewhere.example", 421), ("reg02.azurecr.io", 404)):
                assert session.get(f"{here}/v2/", headers={"Host": host}, timeout=10).status_code == status
            login = f"{here}/{TENANT}/oauth2/v2.0/token"
            form = {"grant_type": "client_credentials", "client_id": azure.client_ids["reader"], "client_assertion": "x",
                    "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}  # fmt: skip
            answer = session.post(login, headers={"Host": "login.microsoftonline.com"}, data=form, timeout=10)
            assert (answer.status_code, answer.json()["error_codes"]) == (503, [90033])
    finally:
        front.close()


@pytest.mark.parametrize(
    "said, told",
    [
        (b"", "503"),
        (b"no HTTP\r\n\r\n", "503"),
        (None, "503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "IncompleteRead|Response ended"),
    ],
)
def test_what_breaks_behind_leaves_nobody_waiting(
    azure: Azure,
    pod: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: bytes | None,
    told: str,
) -> None:
    """`said`: all that the registry behind says before it closes; with None it says nothing for long."""
    monkeypatch.setattr("localcloud.front.exchange.UPSTREAM_SECONDS", 0.5)
    pod("writer")
    token = registry_token("repository:thing:pull").json()["access_token"]
    over = threading.Event()

    def behind(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(2**16)
            connection.sendall(said or b"")
            over.wait(5 if said is None else 0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=behind, args=(listener,), daemon=True).start()
        front = Front(
            azure.engine.folder, World(azure.engine.world), issuer_key=tmp_path / "none", models={},
            blobs="http://127.0.0.1:1/a", account_key=azurite.KEY, registry=f"127.0.0.1:{listener.getsockname()[1]}",
        )  # fmt: skip
        headers = {"Host": "reg01.azurecr.io", "Authorization": f"Bearer {token}"}
        try:
            address = f"https://127.0.0.1:{front.server_port}/v2/thing/tags/list"
            found = str(requests.get(address, headers=headers, timeout=4).status_code)
        except requests.RequestException as error:
            found = str(error)
        finally:
            over.set()
            front.close()
    assert re.search(told, found)


def test_a_client_that_leaves_half_way_leaves_nothing(azure: Azure, pod: Callable[..., None]) -> None:
    pod("writer")
    signed = bearer()
    headers = signed | {
        "x-ms-blob-type": "BlockBlob",
        "Content-Length": "1000000",
        "Host": "drydock1.blob.core.windows.net",
    }
    head = "PUT /models/half HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", azure.front.server_port), 10) as plain:
        connection = _trust(azure).wrap_socket(plain, server_hostname="drydock1.blob.core.windows.net")
        connection.sendall(f"{head}\r\n".encode() + b"x" * 500_000)
        connection.close()
    assert requests.get(f"{BLOB}/models/half", headers=signed).status_code == 404


def test_keys_are_for_one_s_own_eyes_and_last(azure: Azure, tmp_path: Path) -> None:
    def start() -> dict[str, bytes]:
        Front(
            tmp_path, World(azure.engine.world), issuer_key=tmp_path / "none", models={},
            blobs="http://127.0.0.1:1/a", account_key=azurite.KEY, registry="127.0.0.1:1",
        ).close()  # fmt: skip
        return {path.name: path.read_bytes() for path in (tmp_path / "front").iterdir()}

    first = start()
    assert first == start()
    assert sorted(first) == ["ca-bundle.crt", "ca.crt", "ca.key", "tls.crt", "tls.key", "tokens.key"]
    modes = {name: stat.S_IMODE((tmp_path / "front" / name).stat().st_mode) for name in first if name.endswith(".key")}
    assert modes == dict.fromkeys(("ca.key", "tls.key", "tokens.key"), 0o600)
    assert first["ca-bundle.crt"].endswith(first["ca.crt"]) and first["ca-bundle.crt"].count(b"BEGIN CERT") > 2
    assert serialization.load_pem_private_key(first["ca.key"], None)


@pytest.mark.parametrize(
    "name, known",
    [
        ("login.microsoftonline.com", True),
        ("huggingface.co", True),
        ("any.blob.core.windows.net", True),
        ("any.azurecr.io", True),
        ("localhost", True),
        ("elsewhere.example", False),
    ],
)
def test_the_certificate_is_for_azure_s_names(azure: Azure, name: str, known: bool) -> None:
    trust = _trust(azure)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 does
    with socket.create_connection(("127.0.0.1", azure.front.server_port), 10) as plain:
        if known:
            trust.wrap_socket(plain, server_hostname=name).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
                trust.wrap_socket(plain, server_hostname=name)


def test_hosts_are_those_of_the_world(azure: Azure) -> None:
    assert hosts(World(azure.engine.world)) == [
        "login.microsoftonline.com", "huggingface.co", "drydock1.blob.core.windows.net",
        "drydock2.blob.core.windows.net", "reg01.azurecr.io",
    ]  # fmt: skip
