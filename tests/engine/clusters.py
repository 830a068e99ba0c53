"""A control plane by itself, for what needs no Pulumi."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localcloud.api import Api
from localcloud.control_plane import ControlPlane
from localcloud.nodes import nodes_of, sync
from localcloud.tools import Tools
from tests.engine.objects import namespace


@contextmanager
def cluster(tools: Tools, folder: Path, pool: dict[str, Any], place: str, account: str | None = None) -> Iterator[Api]:
    """A client of a cluster with the nodes of one pool, the namespace `place` and in it a service account.

    Its Jobs' pods run until a test ends them.
    """
    with ControlPlane(folder, tools, complete_jobs=False) as plane, plane.client() as api:
        sync(api, "pool", nodes_of(pool, cluster="test-aks", location="westeurope"))
        api.apply(namespace(place))
        if account:
            metadata = {"name": account, "namespace": place}
            api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        yield api
