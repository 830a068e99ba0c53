"""Has KAITO tune: makes its Workspace, waits for the adapter, takes Workspace and node away, lets the evaluation go on.

It is what the Job `kaito-<adapter>-<hash>` runs, on no GPU, with the rights for this alone. Whatever of it is lost may
begin again: all that it knows is in the cluster and in Blob.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from blobs import BlobError
from blobs.store import Address, BlobFolder, wait_for
from common import cli, exits, kube
from common.files import read_json
from common.kube import Api, ApiError, Object
from common.settings import SettingsError
from common.sigterm import Sigterm

log = logging.getLogger(__name__)

WORKSPACES, JOBS = "/apis/kaito.sh/v1beta1/namespaces/{}/workspaces", "/apis/batch/v1/namespaces/{}/jobs"
MERGE = "application/merge-patch+json"
RESULT = "fine_tuning_completed.txt"  # written last, after the adapter (presets/workspace/tuning/.../fine_tuning.py)
POLL_SECONDS = 15.0
RESULT_SECONDS = 600.0  # from KAITO's success until its files are in Blob: they are put as each one is closed
REFUSED = (400, 403, 422)  # by the API server or by KAITO's webhook: asking again changes nothing


@dataclass
class Conductor:
    """`workspace` as the API server takes it. `job` is this Job, of the same namespace; `then` is NAMESPACE/JOB.

    `finished` says whether KAITO's result is in Blob. `seconds` from this Job's start are all that it may take, and
    `retries` all pods of KAITO's that may fail but one. KAITO's own Job tells of them, which has the Workspace's name:
    of the Workspace's conditions, releases before v0.9 say that it failed at every hitch.
    """

    api: Api
    workspace: Object
    job: str
    then: str
    seconds: float
    retries: int
    finished: Callable[[], bool]
    poll_seconds: float = POLL_SECONDS
    result_seconds: float = RESULT_SECONDS
    now: Callable[[], float] = time.time
    _told: str = ""
    _succeeded_at: float | None = field(default=None, init=False)

    def run(self, stop: Sigterm) -> int:
        """Until it is done; returns the exit code. Raises `SettingsError` for what another try cannot mend."""
        if there := self.finished():  # of an earlier Job, with another gate
            self._tell("KAITO's adapter is there already")
        while not stop.came:
            try:
                if (code := self._done() if there else self._step()) is not None:
                    return code
            except ApiError as error:
                if error.status in REFUSED:
                    raise SettingsError([str(error)]) from None
                # 404 among them: the add-on puts its CRDs there some minutes after it was switched on.
                self._tell(f"waiting: {error}")
            time.sleep(self.poll_seconds)
        return exits.TERMINATED

    def _step(self) -> int | None:
        """One look; an exit code once there is nothing left to wait for."""
        mine = self.api.ask("GET", self._path(JOBS, self.job))
        if not self._evaluation()["spec"].get("suspend"):
            self._tell("the evaluation goes on already")
            return self._done()
        found = self._get(self._path(WORKSPACES, self._name))
        if found and "deletionTimestamp" in found["metadata"]:
            self._tell("waiting: an earlier Workspace of this name is on its way out")
            return None
        if self.now() > _unix(mine["status"].get("startTime") or mine["metadata"]["creationTimestamp"]) + self.seconds:
            self._remove()
            raise SettingsError(
                [f"tuning.deadline_hours: KAITO did not end within {self.seconds / 3600:g} hours: {_state(found)}"]
            )
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": self.job, "uid": mine["metadata"]["uid"]}
        if found is None:
            owned = self.workspace["metadata"] | {"ownerReferences": [owner]}  # it goes with this Job
            self.api.ask("POST", self._path(WORKSPACES), self.workspace | {"metadata": owned})
            self._tell("the Workspace is made")
            return None
        owners = found["metadata"].get("ownerReferences", [])
        if owner["uid"] not in [each["uid"] for each in owners]:  # that of a Job before, with another gate
            change = {"metadata": {"ownerReferences": [*owners, owner]}}
            self.api.ask("PATCH", self._path(WORKSPACES, self._name), change, MERGE)
        training = self._training(found["metadata"]["uid"])
        if training.get("failed", 0) > self.retries or _holds(training, "Failed"):
            self._remove()
            raise SettingsError(
                [f"KAITO's training failed {training.get('failed', 0)} times; the logs of its pods {self._name}-... in "
                 "the cluster's log workspace tell why"]
            )  # fmt: skip
        if not training.get("succeeded"):
            self._tell("KAITO trains" if training.get("active") else _state(found))
            return None
        if self.finished():
            self._tell("KAITO has tuned")
            return self._done()
        self._succeeded_at = self._succeeded_at or self.now()
        if self.now() > self._succeeded_at + self.result_seconds:
            self._remove()
            raise SettingsError([f"KAITO says that it succeeded, but {RESULT} is not in Blob: look at its volumes"])
        return None

    def _done(self) -> int:
        """First the evaluation, then the Workspace: whoever comes after a crash in between finds what is left to do."""
        if self._evaluation()["spec"].get("suspend"):
            self.api.ask("PATCH", self._then(), {"spec": {"suspend": False}}, MERGE)
        self._remove()
        return exits.OK

    def _remove(self) -> None:
        """Delete the Workspace, and with it KAITO's Job and node."""
        try:
            self.api.ask("DELETE", self._path(WORKSPACES, self._name))
        except ApiError as error:
            if error.status != 404:
                raise

    def _get(self, path: str) -> Object | None:
        try:
            return self.api.ask("GET", path)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def _training(self, workspace: str) -> Object:
        """The status of KAITO's Job; not of one that is left of an earlier Workspace of this name."""
        found = self._get(self._path(JOBS, self._name)) or {"metadata": {}}
        owners = found["metadata"].get("ownerReferences", [])
        return dict(found["status"]) if workspace in [each["uid"] for each in owners] else {}

    def _evaluation(self) -> Object:
        return self.api.ask("GET", self._then())

    @property
    def _name(self) -> str:
        return str(self.workspace["metadata"]["name"])

    def _path(self, of: str, name: str = "") -> str:
        place = of.format(self.workspace["metadata"]["namespace"])
        return f"{place}/{name}" if name else place

    def _then(self) -> str:
        namespace, _, name = self.then.partition("/")
        return f"{JOBS.format(namespace)}/{name}"

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            log.info("%s: %s", self._name, text)


def _holds(status: Object, condition: str) -> bool:
    return any(each["type"] == condition and each["status"] == "True" for each in status.get("conditions", []))


def _state(workspace: Object | None) -> str:
    """What KAITO says of it, shortly: the conditions that do not hold."""
    if workspace is None:
        return "there is no Workspace"
    conditions = workspace.get("status", {}).get("conditions", [])
    lacking = [f"{each['type']}: {each.get('message', '')}" for each in conditions if each["status"] != "True"]
    return "; ".join(lacking) or "KAITO has said nothing yet"


def _unix(timestamp: str) -> float:
    return datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def main(argv: list[str] | None = None) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser("python -m training.kaito", description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True, help="file with the Workspace, as JSON")
    parser.add_argument("--job", required=True, help="name of this Job, which the Workspace goes with")
    parser.add_argument("--then", required=True, metavar="NAMESPACE/JOB", help="a suspended Job that may then run")
    parser.add_argument("--result", required=True, metavar="az://ACCOUNT/CONTAINER/PATH", help="where KAITO writes")
    parser.add_argument("--hours", type=float, required=True, help="the most that it may take, from this Job's start")
    parser.add_argument("--retries", type=int, default=0, help="new pods of KAITO's after a failure [0]")
    parser.add_argument("--wait-seconds", type=float, default=0.0, help="for a role just granted to count [0]")
    parser.add_argument("--api-server", default=kube.SERVER, help=argparse.SUPPRESS)  # another one in tests
    parser.add_argument("--account", type=Path, default=kube.ACCOUNT, help=argparse.SUPPRESS)
    parser.add_argument("--poll-seconds", type=float, default=POLL_SECONDS, help=argparse.SUPPRESS)
    return cli.run(_run, parser.parse_args(argv), failures=(BlobError, ApiError, OSError), machines_read=True)


def _run(arguments: argparse.Namespace) -> int:
    logging.getLogger("azure").setLevel(logging.WARNING)
    folder = BlobFolder(Address.parse(arguments.result))

    def finished() -> bool:
        found = wait_for(lambda: folder.entry(RESULT) is not None, arguments.wait_seconds, arguments.result)
        return bool(found)

    with Sigterm() as stop:
        return Conductor(
            Api(arguments.api_server, arguments.account),
            read_json(arguments.workspace),
            arguments.job,
            arguments.then,
            arguments.hours * 3600,
            arguments.retries,
            finished,
            arguments.poll_seconds,
        ).run(stop)


if __name__ == "__main__":
    sys.exit(main())
