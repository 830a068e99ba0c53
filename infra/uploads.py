"""What the deployer's machine sends to Azure, by the Entra identity of whoever runs `pulumi up`: a file into Blob,
a build context into the registry, which builds an image of it.

Both are dynamic resources: `storage.Blob` needs shared keys, which are off (pulumi-azure-native #2015), and
`containerregistry.TaskRun` loses sight of a run that takes longer than its first answer (pulumi-azure-native #1713,
azure-rest-api-specs #19159, both open), leaves a failed run in the state, and shows no log. The calls here are those of
`az acr build`. Pulumi runs the providers in a process of their own, which imports this module by its name: they must
stay classes of this module, without state, or the copy that Pulumi keeps of them would change from run to run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pulumi
import requests
from pulumi import dynamic

from common.files import file_digest
from common.hosts import is_loopback
from common.identity import entra_credential, first_line
from common.settings import SettingsError
from infra.context import context_files, context_hash, pack

log = logging.getLogger(__name__)

ROLE_SECONDS = 600.0  # Azure's own promise: a role assignment counts within ten minutes
BUILD_SECONDS = 3600  # the vLLM image: some ten gigabytes are fetched, unpacked and pushed
QUEUE_SECONDS = 1800  # a run may wait for an agent before its own time begins
POLL_SECONDS = 10.0
LINE_SECONDS = 60.0  # between two lines about a run
ATTEMPTS = 6  # of one request, after 1, 2, 4, 8 and 16 s
LOG_LINES = 30
ARM_VERSION = "2019-06-01-preview"  # of runs; the Azure CLI's


class _Provider(dynamic.ResourceProvider):
    """What both have in common: they are replaced when `identity` changes, and deleting them deletes nothing."""

    serialize_as_secret_always = False  # the serialised class holds nothing secret
    identity: tuple[str, ...] = ()

    def configure(self, req: dynamic.ConfigureRequest) -> None:
        """Let Pulumi's user see what goes on: this process's standard error is shown."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for noisy in ("azure", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.WARNING)

    def diff(self, _id: str, _olds: dict[str, Any], _news: dict[str, Any]) -> dynamic.DiffResult:
        changed = [key for key in self.identity if _olds.get(key) != _news.get(key)]
        return dynamic.DiffResult(changes=bool(changed), replaces=changed, delete_before_replace=False)


class FileUploadProvider(_Provider):
    """Puts a file into Blob under a name that holds its digest."""

    identity = ("account", "container", "blob", "sha256")

    def create(self, props: dict[str, Any]) -> dynamic.CreateResult:
        from blobs.store import wait_for  # azure-storage-blob takes half a second to import

        path = Path(props["path"])
        if not path.is_file():
            raise SettingsError([f"{path}: no such file, though it was there at the preview"])
        if file_digest(path) != f"sha256:{props['sha256']}":
            raise SettingsError([f"{path}: changed while pulumi was running; run pulumi up again"])
        url = _address(props)
        wait_for(lambda: _put(path, props), ROLE_SECONDS, f"the right to write {url}")
        return dynamic.CreateResult(url, {key: props[key] for key in (*self.identity, "path")})

    def read(self, id_: str, props: dict[str, Any]) -> dynamic.ReadResult:
        """`pulumi refresh` forgets a file that is gone, so that the next `up` puts it again."""
        from blobs import BlobError
        from blobs.store import Address, BlobFolder, Refused

        try:
            found = BlobFolder(Address(props["account"], props["container"], "")).entry(props["blob"])
        except (BlobError, Refused) as error:  # a preview in CI may not be allowed to look
            log.warning("%s: taken as there, for it cannot be looked at: %s", id_, error)
            return dynamic.ReadResult(id_, dict(props))
        return dynamic.ReadResult(id_, dict(props)) if found else dynamic.ReadResult(None, {})


class FileUpload(dynamic.Resource, module="drydock", name="FileUpload"):
    """A local file as a blob. It is put once, and stays when the resource goes: earlier adapters were made of it."""

    account: pulumi.Output[str]
    container: pulumi.Output[str]
    blob: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        *,
        account: pulumi.Input[str],
        container: str,
        blob: str,
        path: Path,
        sha256: str,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """`sha256`: 64 hex digits of the file's content, which `blob` should hold too."""
        props = {"account": account, "container": container, "blob": blob, "path": str(path), "sha256": sha256}
        super().__init__(FileUploadProvider(), name, props, opts)

    @property
    def url(self) -> pulumi.Output[str]:
        """`az://ACCOUNT/CONTAINER/BLOB`; what uses it waits for the upload."""
        return pulumi.Output.format("az://{0}/{1}/{2}", self.account, self.container, self.blob)


class ImageBuildProvider(_Provider):
    """Has the registry build an image of a context."""

    identity = ("registry", "image", "context")

    def create(self, props: dict[str, Any]) -> dynamic.CreateResult:
        files = context_files(Path(props["root"]), props["dockerfile"], props["arguments"])
        if context_hash(files) != props["context"]:
            raise SettingsError([f"{props['image']}: its files changed while pulumi was running; run pulumi up again"])
        tasks = RegistryTasks(props["subscription_id"], props["resource_group"], props["registry"])
        image = f"{props['image']}:{props['context'][:12]}"
        request: dict[str, Any] = {
            "type": "DockerBuildRequest",
            "sourceLocation": tasks.upload(pack(files)),
            "dockerFilePath": props["dockerfile"],
            "imageNames": [image],
            "isPushEnabled": True,
            "platform": {"os": "Linux", "architecture": "amd64"},
            "arguments": [{"name": key, "value": value} for key, value in sorted(props["arguments"].items())],
            "timeout": BUILD_SECONDS,
        }
        if props.get("agent_pool"):
            request["agentPoolName"] = props["agent_pool"]
        run = tasks.schedule(request)
        digest = _digest(tasks.wait(run, image), props["image"])
        if digest is None:
            raise SettingsError([f"{image}: run {run} tells no digest; {tasks.log_command(run)}"])
        kept = (*self.identity, "root", "dockerfile", "arguments", "agent_pool", "subscription_id", "resource_group")
        outs = {key: props.get(key) for key in kept} | {"digest": digest, "run_id": run}
        return dynamic.CreateResult(f"{props['registry']}/{props['image']}@{digest}", outs)


class ImageBuild(dynamic.Resource, module="drydock", name="ImageBuild"):
    """An image that the registry builds, made anew when its context changes and only then.

    Unknown in a preview where the context changed, known where it did not. Images of earlier contexts stay in the
    registry: pods and Jobs that run from them may have to pull them again.
    """

    digest: pulumi.Output[str]
    run_id: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        *,
        subscription_id: pulumi.Input[str],
        resource_group: pulumi.Input[str],
        registry: pulumi.Input[str],
        image: str,
        root: Path,
        dockerfile: str,
        context: str,
        arguments: Mapping[str, pulumi.Input[str]],
        agent_pool: pulumi.Input[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """`context`: `context_hash` of the files below `root`; `image`: the repository, its tag is made of the hash."""
        props = {
            "subscription_id": subscription_id,
            "resource_group": resource_group,
            "registry": registry,
            "image": image,
            "root": str(root),
            "dockerfile": dockerfile,
            "context": context,
            "arguments": dict(arguments),
            "agent_pool": agent_pool,
            "digest": None,
            "run_id": None,
        }
        super().__init__(ImageBuildProvider(), name, props, opts)


class RegistryTasks:
    """The runs of one registry, by Azure Resource Manager (or DRYDOCK_ARM_ENDPOINT).

    Raises `SettingsError` that says what to do; no message holds a token or a signed address.
    """

    def __init__(self, subscription_id: str, resource_group: str, registry: str) -> None:
        endpoint = os.environ.get("DRYDOCK_ARM_ENDPOINT", "https://management.azure.com").rstrip("/")
        self._audience = f"{endpoint}/.default"
        self._url = (
            f"{endpoint}/subscriptions/{subscription_id}/resourceGroups/{resource_group}"
            f"/providers/Microsoft.ContainerRegistry/registries/{registry}"
        )
        self._resource_group, self._registry = resource_group, registry
        self._session = requests.Session()
        self._credential: Any = None
        self._local = is_loopback(urlsplit(endpoint).hostname or "")  # a stand-in on this machine: no Entra
        self._session.trust_env = not self._local  # a proxy cannot reach this machine's own loopback

    def upload(self, context: bytes) -> str:
        """Put `context` where the registry takes sources from, and return its `sourceLocation`."""
        place = self._ask("POST", "listBuildSourceUploadUrl")
        self._send("PUT", str(place["uploadUrl"]), "upload of the build context", data=context,
                   headers={"x-ms-blob-type": "BlockBlob"})  # fmt: skip
        return str(place["relativePath"])

    def schedule(self, request: Mapping[str, Any]) -> str:
        """Queue a run and return its ID."""
        return str(self._ask("POST", "scheduleRun", request)["properties"]["runId"])

    def wait(self, run: str, what: str) -> dict[str, Any]:
        """The properties of `run` once it succeeded. Raises `SettingsError` with the end of its log otherwise."""
        started = time.monotonic()
        next_line = 0.0
        while True:
            found: dict[str, Any] = self._ask("GET", f"runs/{run}")["properties"]
            status, seconds = str(found.get("status")), time.monotonic() - started
            if status == "Succeeded":
                log.info("%s: built in %.0f s (run %s)", what, seconds, run)
                return found
            if status in ("Failed", "Canceled", "Error", "Timeout"):
                reason = f": {found['runErrorMessage']}" if found.get("runErrorMessage") else ""
                raise SettingsError(
                    [f"{what}: its build ended as {status}{reason}", *self._log_end(run), self.log_command(run)]
                )
            if seconds > BUILD_SECONDS + QUEUE_SECONDS:
                raise SettingsError([f"{what}: run {run} is {status} after {seconds:.0f} s", self.log_command(run)])
            if seconds >= next_line:
                next_line += LINE_SECONDS
                log.info("%s: run %s is %s, %.0f s", what, run, status.lower(), seconds)
            time.sleep(POLL_SECONDS)

    def log_command(self, run: str) -> str:
        """How a person sees the whole log."""
        return f"the whole log: az acr task logs --registry {self._registry} --run-id {run}"

    def _log_end(self, run: str) -> list[str]:
        try:
            link = str(self._ask("POST", f"runs/{run}/listLogSasUrl")["logLink"])
            return self._send("GET", link, "log").text.splitlines()[-LOG_LINES:]
        except (SettingsError, KeyError):
            return ["(its log cannot be read from here)"]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {} if self._local else {"Authorization": f"Bearer {self._token()}"}
        url = f"{self._url}/{path}?api-version={ARM_VERSION}"
        answer = self._send(method, url, path, json=body if method == "GET" else body or {}, headers=headers)
        try:
            found = answer.json()
        except requests.RequestException:
            found = None
        if not isinstance(found, dict):
            raise SettingsError([f"{self._registry}: {path}: the answer is not a JSON object"])
        return found

    def _send(self, method: str, url: str, what: str, **request: Any) -> requests.Response:
        """One request, repeated while the trouble may pass. `url` may be signed, so it is never told."""
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                answer = self._session.request(method, url, timeout=120, **request)
            except requests.RequestException as error:
                trouble = f"no answer from {urlsplit(url).hostname} ({type(error).__name__})"
                continue
            if answer.ok:
                return answer
            trouble = f"{answer.status_code} {_arm_error(answer)}".strip()
            if answer.status_code in (401, 403):
                raise SettingsError(
                    [
                        f"{self._registry}: {what}: refused ({trouble}); whoever runs pulumi up needs the role "
                        f"Contributor or Container Registry Tasks Contributor on group {self._resource_group}; "
                        "a new role takes up to ten minutes"
                    ]
                )
            if answer.status_code not in (408, 429) and answer.status_code < 500:
                break
        raise SettingsError([f"{self._registry}: {what}: {trouble}"])

    def _token(self) -> str:
        from azure.core.exceptions import AzureError

        self._credential = self._credential or entra_credential()
        try:
            return str(self._credential.get_token(self._audience).token)  # kept by azure-identity until it ends
        except AzureError as error:
            raise SettingsError(
                [f"{self._registry}: no Entra token ({first_line(error)[:300]}); run az login"]
            ) from None


def _put(path: Path, props: Mapping[str, Any]) -> bool:
    """Put the file; a refusal that a new role may end is raised as `Refused`, which `wait_for` waits out."""
    from blobs.store import Address, BlobFolder, Refused

    try:
        BlobFolder(Address(props["account"], props["container"], "")).push_file(path, props["blob"])
    except Refused as error:
        cause: Any = error.__cause__
        status, code = getattr(cause, "status_code", None), getattr(cause, "error_code", None)
        code = getattr(code, "value", code)
        # Not signed in, or kept out by the network: waiting changes neither.
        if status is None or code == "AuthorizationFailure":
            raise SettingsError(error.problems) from None
        raise Refused(
            [
                f"{_address(props)}: refused ({status} {code or ''}): whoever runs pulumi up needs the role Storage "
                f"Blob Data Contributor on account {props['account']}; a new role takes up to ten minutes"
            ]
        ) from None
    return True


def _address(props: Mapping[str, Any]) -> str:
    return f"az://{props['account']}/{props['container']}/{props['blob']}"


def _digest(run: Mapping[str, Any], repository: str) -> str | None:
    for image in run.get("outputImages") or ():
        if image.get("repository") == repository and str(image.get("digest", "")).startswith("sha256:"):
            return str(image["digest"])
    return None


def _arm_error(answer: requests.Response) -> str:
    """Azure Resource Manager's own code and message. A data plane's XML is left out: it may repeat a signature."""
    try:
        error = answer.json()["error"]
        return f"{error['code']}: {error['message']}"
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return answer.reason or ""
