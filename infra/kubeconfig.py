"""The way into the cluster: AKS's user kubeconfig, signing in by kubelogin, never by an administrator's certificate."""

from __future__ import annotations

import itertools
import shutil
from typing import Any, Literal, get_args

import pulumi
import yaml

from common.settings import SettingsError

SERVER_ID = (
    "6dae42f8-4368-4678-94ff-3960e28e3630"  # Entra's application of all AKS API servers, the same in every tenant
)
Login = Literal["azurecli", "workloadidentity", "spn"]

# What each way takes over from AKS's own line, as `kubelogin convert-kubeconfig` does it; client IDs, secrets and token
# files come from AZURE_* variables. Not for azurecli: with a tenant it refuses a CLI that runs as a managed identity
# (kubelogin #123). Never --client-id: that is kubectl's own application, which only a browser can sign in.
_KEPT: dict[str, tuple[str, ...]] = {
    "azurecli": (),
    "workloadidentity": (),
    "spn": ("--environment", "--tenant-id"),
}
_INSTALL = "az aks install-cli, or https://azure.github.io/kubelogin/install.html"


def for_kubelogin(kubeconfig: str, *, server_id: str = SERVER_ID, login: Login = "azurecli") -> str:
    """`kubeconfig` (YAML) with every user that signs in by kubelogin made to do it as `login` says, without a browser.

    AKS writes `--login devicecode`, which waits for a person (pulumi-azure-native #2399). Clusters, their certificate
    authorities and contexts stay. Raises `SettingsError` when the text is not that of a cluster with Entra sign-in.
    """
    if login not in get_args(Login):
        raise SettingsError([f"login = {login}: kubelogin is used with one of {', '.join(get_args(Login))}"])
    try:
        document = yaml.safe_load(kubeconfig)
    except yaml.YAMLError as error:
        raise SettingsError([f"the cluster's kubeconfig is no YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(document, dict) or not document.get("clusters"):
        raise SettingsError(["the cluster's kubeconfig names no cluster: is the cluster running?"])

    converted = 0
    for entry in document.get("users") or []:
        command = (entry.get("user") or {}).get("exec")
        if command and "kubelogin" in str(command.get("command", "")):
            entry["user"] = {"exec": _exec(command, server_id, login)}
            converted += 1
    if not converted:
        raise SettingsError(
            ["the cluster's kubeconfig has no user that signs in by kubelogin: these are the credentials of an "
             "administrator, or of a cluster without Entra: enable aad_profile and ask for the user credentials"]
        )  # fmt: skip
    return yaml.safe_dump(document, sort_keys=False)


def _exec(command: dict[str, Any], server_id: str, login: Login) -> dict[str, Any]:
    given = [str(item) for item in command.get("args") or []]
    values = dict(itertools.pairwise(given))
    kept = [part for flag in _KEPT[login] if flag in values for part in (flag, values[flag])]
    return {
        "apiVersion": command.get("apiVersion", "client.authentication.k8s.io/v1beta1"),
        "command": "kubelogin",
        "args": ["get-token", "--login", login, "--server-id", server_id, *kept],
        "env": command.get("env"),
        "installHint": f"kubelogin is not on PATH: {_INSTALL}",
        "provideClusterInfo": False,
    }


def check_kubelogin() -> str | None:
    """What to do where `kubelogin`, which signs in to the API server, is missing; None where it is there.

    A preview is let through: the first one has no API server to ask.
    """
    if pulumi.runtime.is_dry_run() or shutil.which("kubelogin"):
        return None
    return f"kubelogin is not on PATH, and without it nobody signs in to the cluster's API server: {_INSTALL}"
