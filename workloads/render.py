"""All Kubernetes objects of an environment as YAML files: no cloud, no cluster and no Pulumi CLI is asked.

The program itself runs, `__main__.py` with the settings of `Pulumi.<stack>.yaml`; Pulumi's mocks stand where the engine
would be. What only Azure could tell (IDs, digests of images) is filled with placeholders that say what would be there.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pulumi
import yaml
from pulumi.runtime import mocks, rpc

from common import cli, exits
from common.settings import SettingsError
from infra.settings import SECRETS

ROOT = Path(__file__).parents[1]
INDEX = "index.txt"
EPILOG = """
example:
  python -m workloads.render --stack dev --out out/render
"""

NOBODY = "00000000-0000-0000-0000-000000000000"
SECRET = "<secret>"
NO_DIGEST = "sha256:" + "0" * 64
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: rendered
clusters: [{name: rendered, cluster: {server: "https://rendered.invalid", certificate-authority-data: ""}}]
contexts: [{name: rendered, context: {cluster: rendered, user: rendered}}]
users:
- name: rendered
  user: {exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: kubelogin, args: []}}
"""

# Files sort in an order in which they could be applied. A number stays with its kind, so that one more object does not
# rename the others; kinds that are not named here are custom resources.
ORDER = (
    "Namespace", "PriorityClass", "ResourceQuota", "NetworkPolicy", "ServiceAccount", "Role", "RoleBinding",
    "ConfigMap", "Secret", "PodDisruptionBudget", "DaemonSet", "Job", "Deployment", "Service",
)  # fmt: skip

FIRST = ("apiVersion", "kind", "name")  # of all keys; the others follow by alphabet, since mocks keep no order

NAME_KEYS = {
    "AgentPool": "agentPoolName",
    "AzureMonitorWorkspace": "azureMonitorWorkspaceName",
    "BlobContainer": "containerName",
    "Dashboard": "dashboardName",
    "Grafana": "workspaceName",
    "ManagedCluster": "resourceName",
    "Registry": "registryName",
    "ResourceGroup": "resourceGroupName",
    "StorageAccount": "accountName",
    "UserAssignedIdentity": "resourceName",
    "VirtualNetwork": "virtualNetworkName",
}
"""Kind of Azure resource to the input that becomes its output `name`."""


@dataclass
class Recorder(mocks.Mocks):
    """Keeps the Kubernetes objects that the program declares, and answers for Azure with placeholders."""

    objects: list[dict[str, Any]] = field(default_factory=list)

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        if args.typ.startswith("kubernetes:") and "apiVersion" in args.inputs:
            self.objects.append(plain(args.inputs))
        return f"<id of {args.name}>", {**args.inputs, **_answer(args.typ, args.name, args.inputs)}

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        if args.token.endswith("listManagedClusterUserCredentials"):
            value = base64.b64encode(KUBECONFIG.encode()).decode()
            return {"kubeconfigs": [{"name": "rendered", "value": value}]}, []
        if args.token.endswith("getClientConfig"):
            return dict.fromkeys(("clientId", "objectId", "subscriptionId", "tenantId"), NOBODY), []
        return {}, []


def _answer(kind: str, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What Azure would add to the inputs of a resource, as far as the program reads it."""
    last = kind.rpartition(":")[2]
    own = {"name": inputs.get(NAME_KEYS.get(last, ""), name)}
    if last == "UserAssignedIdentity":
        return own | {"principalId": f"<principal ID of {name}>", "clientId": f"<client ID of {name}>"}
    if last == "ManagedCluster":
        return own | {
            "oidcIssuerProfile": {"issuerURL": "https://oidc.invalid/", "issuerUrl": "https://oidc.invalid/"},
            "identityProfile": {"kubeletidentity": {"objectId": "<object ID of the kubelet>"}},
            # A list on its way in, a map on its way out.
            "identity": {"type": "UserAssigned", "userAssignedIdentities": {}},
            "nodeResourceGroup": "<node resource group>",
            "fqdn": "<API server>",
            "privateFqdn": "<API server>",
        }
    if last == "Registry":
        return own | {"loginServer": f"{own['name']}.azurecr.io"}
    if last == "AzureMonitorWorkspace":
        return own | {"metrics": {"prometheusQueryEndpoint": "https://<query endpoint of managed Prometheus>"}}
    if last == "Grafana":
        return own | {"identity": {"principalId": NOBODY}, "properties": {"endpoint": "<Grafana>"}}
    if last == "ImageBuild":
        return {"digest": NO_DIGEST}
    if last == "FileUpload":
        return {"url": f"az://{inputs['account']}/{inputs['container']}/{inputs['blob']}"}
    return own if kind.startswith("azure-native:") else {}


def plain(value: Any) -> Any:
    """As YAML has it: whole numbers without a point (protobuf knows only floats), and nothing secret."""
    if rpc.is_rpc_secret(value):
        return _hidden(rpc.unwrap_rpc_secret(value))
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value, key=lambda key: (key not in FIRST, key))}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hidden(value: Any) -> Any:
    """The keys of what is secret may be seen, such as the file names in a Secret."""
    return dict.fromkeys(sorted(value), SECRET) if isinstance(value, dict) else SECRET


def stack_config(root: Path, stack: str) -> tuple[str, dict[str, Any], list[str]]:
    """Project name, configuration of `stack` as Pulumi would hand it over, and the places of what is encrypted there.

    What may be secret (`SECRETS`) has a placeholder, so that the objects that come of it are there; what else is
    encrypted is left out.

    Raises `SettingsError` for a stack without a file, with those that have one, and for a file that is no YAML.
    """
    file = root / f"Pulumi.{stack}.yaml"
    if not file.is_file():
        known = sorted(path.name.split(".")[1] for path in root.glob("Pulumi.*.yaml"))
        raise SettingsError([f"{file.name}: no such file; stacks with settings: {', '.join(known) or 'none'}"])
    project = yaml.safe_load((root / "Pulumi.yaml").read_text(encoding="utf-8"))
    name = str(project["name"])
    try:
        given = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("config") or {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError([f"{file.name}{line}: not YAML: {error.problem}"]) from None
    defaults = {
        key if ":" in key else f"{name}:{key}": schema["default"]
        for key, schema in (project.get("config") or {}).items()
        if isinstance(schema, dict) and "default" in schema
    }
    encrypted: list[str] = []
    values = {key: _decrypted(value, key, encrypted) for key, value in {**defaults, **given}.items()}
    return name, {key: value for key, value in values.items() if value is not None}, encrypted


def _decrypted(value: Any, place: str, encrypted: list[str]) -> Any:
    """`value` without what is encrypted (`secure: ...`), see `stack_config`; None: nothing is left."""
    if not isinstance(value, dict):
        return value
    if set(value) == {"secure"}:
        encrypted.append(place)
        return SECRET if place.partition(":")[2].partition(".")[0] in SECRETS else None
    kept = {key: _decrypted(item, f"{place}.{key}", encrypted) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None} if value else value


def declared(root: Path, project: str, stack: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The Kubernetes objects that the program in `root` declares, in no certain order."""
    recorder = Recorder()
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    with _event_loop():
        # As a preview: the program is lenient then with what only `pulumi up` needs, such as kubelogin.
        pulumi.runtime.set_mocks(recorder, project=project, stack=stack, preview=True, organization="organization")
        pulumi.runtime.set_all_config(texts, [f"{project}:{key}" for key in SECRETS])
        program = str(root / "__main__.py")
        try:
            run = mocks.test(lambda: (runpy.run_path(program), None)[1])  # type: ignore[no-untyped-call]
            run()
        except pulumi.RunError as error:  # the program's own words about settings that cannot work
            raise SettingsError([str(error)]) from None
    return recorder.objects


@contextlib.contextmanager
def _event_loop() -> Iterator[None]:
    """One for Pulumi, which from Python 3.12 on makes none by itself; closed afterwards."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def file_of(item: Mapping[str, Any]) -> str:
    """`NAMESPACE/NN-kind-name.yaml`; `_cluster` for what is in no namespace."""
    kind, metadata = item["kind"], item["metadata"]
    number = ORDER.index(kind) + 1 if kind in ORDER else len(ORDER) + 1
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", metadata["name"])
    return f"{metadata.get('namespace', '_cluster')}/{number:02d}-{kind.lower()}-{name}.yaml"


def without_secrets(item: dict[str, Any]) -> dict[str, Any]:
    """A Secret keeps its keys and loses its values."""
    if item["kind"] != "Secret":
        return item
    return {key: _hidden(value) if key in ("data", "stringData") else value for key, value in item.items()}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines, such as the containers' settings, as they are instead of on one line with escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(item: Mapping[str, Any]) -> str:
    return yaml.dump(dict(item), Dumper=_Dumper, sort_keys=False, width=1000)


def write(objects: list[dict[str, Any]], out: Path) -> list[str]:
    """One file an object, and `index.txt` with their names; files of an earlier run, and no others, go first."""
    index = out / INDEX
    if index.is_file():
        for name in index.read_text(encoding="utf-8").splitlines():
            (out / name).unlink(missing_ok=True)
    by_file = {file_of(item): item for item in objects}
    if len(by_file) != len(objects):
        raise ValueError("two objects have the same kind, namespace and name: one of them would be lost")
    for name, item in by_file.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_yaml(without_secrets(item)), encoding="utf-8")
    names = sorted(by_file)
    out.mkdir(parents=True, exist_ok=True)
    index.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return names


def main(argv: list[str] | None = None) -> int:
    """Render one stack and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m workloads.render",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stack", required=True, help="whose settings: Pulumi.STACK.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return cli.run(_render, parser.parse_args(argv), failures=(OSError,))


def _render(arguments: argparse.Namespace) -> int:
    project, config, encrypted = stack_config(ROOT, arguments.stack)
    for place in encrypted:
        print(f"{place}: encrypted, and not read here", file=sys.stderr)
    logging.getLogger("pulumi").setLevel(logging.ERROR)
    names = write(declared(ROOT, project, arguments.stack, config), arguments.out)
    for name in names:
        namespace, _, file = name.partition("/")
        print(f"{namespace:<18} {file}")
    print(f"{len(names)} objects in {arguments.out}")
    return exits.OK


if __name__ == "__main__":
    raise SystemExit(main())
