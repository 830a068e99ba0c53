"""A Kubernetes control plane on this machine: the real etcd, API server, controllers and scheduler; KWOK as kubelet."""

from __future__ import annotations

import base64
import json
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from common.files import private, read_json, write_atomic
from common.processes import Processes, free_ports, wait_for
from localcloud.api import Api
from localcloud.azure.rules import TENANT
from localcloud.nodes import KWOK_ANNOTATION
from localcloud.tools import Tools

ETCD = "etcd"
CLUSTER_FILE = "cluster.json"
STAGES = Path(__file__).parent / "stages"
READY_SECONDS = 60.0  # some 4 on an idle machine
TAIL_BYTES = 3000  # of the log of a process that ended

# The server's port is kept between starts. Below the ephemeral ports (from 32768), of which an outgoing connection may
# take any meanwhile.
PORTS = range(20000, 30000)

# As `infra.network` gives them to AKS (a test holds them together).
POD_CIDR, SERVICE_CIDR = "192.168.0.0/16", "10.0.0.0/16"

# What AKS calls its user, and how it has him sign in: infra.kubeconfig turns that into what needs no person.
USER = "clusterUser"
SERVER_ID = "6dae42f8-4368-4678-94ff-3960e28e3630"  # Entra's application of all AKS API servers
CLIENT_ID = "80faf920-1908-4b52-b5ef-a8e7bedfc67a"  # kubectl's own application

KUBELOGIN = """\
#!/bin/sh
# Stands where kubelogin would be: hands out the token of the local cluster, if asked as the real one must be.
case " $* " in
  *" get-token "*" --server-id {server_id} "*) ;;
  *) echo "kubelogin: expected get-token --server-id {server_id}, found: $*" >&2; exit 1 ;;
esac
case " $* " in
  *" --login devicecode "*|*" --login interactive "*)
    echo "kubelogin: this way of signing in waits for a person at a browser: $*" >&2; exit 1 ;;
esac
case "$KUBERNETES_EXEC_INFO" in
  *client.authentication.k8s.io/v1\\"*) version=v1 ;;
  *) version=v1beta1 ;;
esac
printf '{{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/%s","status":{{"token":"%s"}}}}\\n' \\
  "$version" "{token}"
"""


class ControlPlaneError(RuntimeError):
    """It did not start; the text names the process and ends with the end of its log."""


class ControlPlane:
    """A context manager. All that is in the cluster stays in `folder`, and is there when it is entered again.

    Jobs' pods succeed a second after their start; with `complete_jobs=False` they run until `localcloud.pods` ends
    them. `folder` also gets what others need: `cluster.json` (server, token, ca_file, kubeconfig), `kubeconfig` for a
    person with kubectl, `bin/kubelogin` (a stand-in, for the PATH of Pulumi), `logs/`. One at a time may use a folder.
    The processes die with the thread that enters it, so enter it in one that lasts. `address`: where pods reach the API
    server, behind the Service `kubernetes`; without one they do not. `runner`: the nodes that Azure makes are for the
    pod runner, not for KWOK. `autoscaler`: one runs, so agent pools begin with their least nodes. `port`: of the API
    server, if it may not choose (`choose_port`).
    Raises `ControlPlaneError` when a process ends during the start, and TimeoutError.
    """

    server: str
    """`https://127.0.0.1:PORT`, the same at every start as long as nobody else took the port meanwhile."""
    token: str
    ca_file: Path
    kubeconfig: str
    """As AKS gives it to users: its exec stanza asks kubelogin."""

    def __init__(
        self,
        folder: Path,
        tools: Tools,
        *,
        complete_jobs: bool = True,
        address: str = "",
        port: int | None = None,
        runner: bool = False,
        autoscaler: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self._tools = tools
        self._complete_jobs = complete_jobs
        self._address, self._given_port, self._runner, self._autoscaler = address, port, runner, autoscaler
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> ControlPlane:
        self._processes = Processes()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """All processes are gone when it returns. etcd ends last and in order: it has all that is to be kept."""
        for name, process in self._running.items():
            if name != ETCD:
                process.kill()
                process.wait()
        self._processes.stop_all()
        self._running.clear()

    def client(self) -> Api:
        return Api(self.server, self.token, self.ca_file)

    def _start(self) -> None:
        private(self.folder)
        self.token = self._token()
        self.ca_file = self.folder / "ca.crt"
        port = self._given_port or choose_port(self.folder)
        self.server = f"https://127.0.0.1:{port}"
        self._run_api_server(port)
        self._write_access()
        with self.client() as api:
            self._wait(api.ready, "the API server")
            crds = self._crds()
            for crd in crds:
                api.apply(crd)
            self._run_controllers(api)
            self._wait(lambda: _usable(api), "namespace default with its service account")
            self._wait(lambda: all(_served(api, crd) for crd in crds), "the custom resources")

    def _run_api_server(self, port: int) -> None:
        clients, peers = (f"http://127.0.0.1:{number}" for number in free_ports(2))
        self._run(
            ETCD,
            self._tools.etcd,
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            "--unsafe-no-fsync",  # a crash of a process loses nothing, only one of the machine would
            "--log-level=warn",
        )
        key = self._service_account_key()
        certificates = self.folder / "certificates"
        self._run(
            "kube-apiserver",
            self._tools.kube_apiserver,
            f"--etcd-servers={clients}",
            "--bind-address=127.0.0.1",
            # Or it looks for the machine's own, which may have none. It goes into the certificate.
            f"--advertise-address={self._address or '127.0.0.1'}",
            f"--secure-port={port}",
            f"--cert-dir={certificates}",  # where it makes its certificate, and finds it again
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            "--allow-privileged=true",  # as AKS: system pods need it, and Pod Security decides for the others
            # It may not advertise a loopback address.
            f"--endpoint-reconciler-type={'lease' if self._address else 'none'}",
            "--kubelet-preferred-address-types=InternalIP",  # for logs: nobody resolves the names of nodes
        )
        made = certificates / "apiserver.crt"  # its own certificate, then that of the authority that signed it
        self._wait(lambda: made.exists() and made.read_text().count("END CERTIFICATE") == 2, "the server's certificate")
        write_atomic(self.ca_file, "-----BEGIN" + made.read_text().rpartition("-----BEGIN")[2])

    def _run_controllers(self, api: Api) -> None:
        access = f"--kubeconfig={self.folder / 'kubeconfig'}"
        alone = ("--leader-elect=false", "--secure-port=0")
        self._run(
            "kube-controller-manager",
            self._tools.kube_controller_manager,
            access,
            *alone,
            f"--service-account-private-key-file={self._service_account_key()}",
            f"--root-ca-file={self.ca_file}",
        )
        self._run("kube-scheduler", self._tools.kube_scheduler, access, *alone)
        if self._runner:
            return
        # Those of an earlier start: KWOK would wait until they expire before it takes the nodes over.
        api.delete("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")
        stages = [path for path in sorted(STAGES.glob("*.yaml")) if self._complete_jobs or path.stem != "pod-complete"]
        self._run(
            "kwok",
            self._tools.kwok,
            access,
            f"--manage-nodes-with-annotation-selector={KWOK_ANNOTATION}=fake",
            "--node-lease-duration-seconds=40",  # a kubelet's; renewed every quarter of it
            f"--cidr={POD_CIDR}",
            *(f"--config={path}" for path in stages),
        )

    def _run(self, name: str, binary: Path, *flags: str) -> None:
        log = self._log(name)
        log.unlink(missing_ok=True)
        # When we are killed outright, etcd gets SIGTERM, the others SIGKILL, as in `stop`: an API server asked to end
        # while its etcd is gone holds its port for ten seconds more, or for ever.
        at_our_death = signal.SIGTERM if name == ETCD else signal.SIGKILL
        self._running[name] = self._processes.start([str(binary), *flags], log=log, at_our_death=at_our_death)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(condition, READY_SECONDS, what, self._check)

    def _check(self) -> None:
        for name, process in self._running.items():
            if process.poll() is not None:
                log = self._log(name)
                end = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
                raise ControlPlaneError(f"{name} ended with {process.returncode}; the end of {log}:\n{end}")

    def _crds(self) -> list[dict[str, Any]]:
        return [
            dict(document)
            for path in sorted(self._tools.crds.glob("*.yaml"))
            for document in yaml.safe_load_all(path.read_text())
            if document
        ]

    def _token(self) -> str:
        """The administrator's, made at the first start."""
        path = self.folder / "tokens.csv"
        if not path.exists():
            _write_secret(path, f"{secrets.token_urlsafe(32)},local-admin,local-admin,system:masters\n")
        return path.read_text().partition(",")[0]

    def _service_account_key(self) -> Path:
        path = self.folder / "service-accounts.key"
        if not path.exists():
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            text = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
            _write_secret(path, text.decode())
        return path

    def _write_access(self) -> None:
        authority = base64.b64encode(self.ca_file.read_bytes()).decode()
        cluster = {"server": self.server, "certificate-authority-data": authority}
        sign_in = {
            "apiVersion": "client.authentication.k8s.io/v1beta1",
            "command": "kubelogin",
            "args": [
                "get-token", "--environment", "AzurePublicCloud", "--server-id", SERVER_ID,
                "--client-id", CLIENT_ID, "--tenant-id", TENANT, "--login", "devicecode",
            ],
            "env": None,
        }  # fmt: skip
        self.kubeconfig = _kubeconfig(cluster, {"exec": sign_in})
        _write_secret(self.folder / "kubeconfig", _kubeconfig(cluster, {"token": self.token}))
        kubelogin = self.folder / "bin" / "kubelogin"
        _write_secret(kubelogin, KUBELOGIN.format(server_id=SERVER_ID, token=self.token))
        kubelogin.chmod(0o700)
        access = {
            "server": self.server,
            "token": self.token,
            "ca_file": str(self.ca_file),
            "kubeconfig": self.kubeconfig,
            "kubelet": "runner" if self._runner else "kwok",
            "autoscaler": self._autoscaler,
        }
        _write_secret(self.folder / CLUSTER_FILE, json.dumps(access, indent=2))


def choose_port(folder: Path) -> int:
    """That of the start before, so that the kubeconfig in Pulumi's state goes on to lead here; else a free one."""
    file = folder / CLUSTER_FILE
    before = int(read_json(file)["server"].rpartition(":")[2]) if file.exists() else None
    if before is not None and _free(before):
        return before
    port = next(port for port in secrets.SystemRandom().sample(PORTS, len(PORTS)) if _free(port))
    if before is not None:
        print(f"port {before} is taken meanwhile: the cluster's address is now https://127.0.0.1:{port}", flush=True)
    return port


def _usable(api: Api) -> bool:
    """Whether pods can be made: the controllers have given the first namespace its account."""
    return api.find("/api/v1/namespaces/default/serviceaccounts/default") is not None


def _served(api: Api, crd: dict[str, Any]) -> bool:
    group, names = crd["spec"]["group"], crd["spec"]["names"]
    versions = [version["name"] for version in crd["spec"]["versions"] if version["served"]]
    return all(
        names["plural"] in [item["name"] for item in (api.find(f"/apis/{group}/{version}") or {}).get("resources", [])]
        for version in versions
    )


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the start before may linger
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _kubeconfig(cluster: dict[str, Any], user: dict[str, Any]) -> str:
    name = "drydock-local"
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": cluster}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": USER}}],
            "users": [{"name": USER, "user": user}],
        },
        sort_keys=False,
    )


def _write_secret(path: Path, text: str) -> None:
    """`text` for this user's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.new")
    written.unlink(missing_ok=True)
    written.touch(mode=0o600)
    written.write_text(text)
    written.replace(path)  # whole, for whoever reads it just now
