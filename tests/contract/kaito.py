"""The commands by which KAITO v0.12.0 takes an adapter out of an image, and pushes one (pkg/workspace/image, *.sh)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

MISSING = [name for name in ("docker-registry", "skopeo") if shutil.which(name) is None]
needs_images = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} on PATH: install the Debian packages of these names"
)
# puller.sh without its loop over sign-ins: an init container runs it, and vLLM reads what it leaves in VOLUME.
PULL = """
set -e
skopeo copy --dest-decompress "docker://${IMAGE}" "dir:${WORK}/layout"
mkdir -p "${WORK}/rootfs"
for layer in $(skopeo inspect --format '{{ range .Layers }}{{ slice . 7 }} {{ end }}' "dir:${WORK}/layout")
do
    tar x -f "${WORK}/layout/${layer}" -C "${WORK}/rootfs"
done
mv -f "${WORK}/rootfs/data" "${VOLUME}"
"""
# pusher.sh up to where `oras push --oci-layout` writes what `layout` writes here.
PACK = """
set -e
mkdir -p "${WORK}/data"
cp -R "${VOLUME}/adapter_config.json" "${VOLUME}/adapter_model.safetensors" "${WORK}/data"
tar c -f "${WORK}/layer.tar" -C "${WORK}" data
printf '{"rootfs":{"diff_ids":["sha256:%s"]}}' "$(sha256sum "${WORK}/layer.tar" | cut -d ' ' -f 1)" > "${WORK}/config.json"
gzip -9 "${WORK}/layer.tar"
"""


def run(script: str, work: Path, **variables: str) -> None:
    """Run a script in the new folder `work`; skopeo speaks HTTP to HOST, as a registry with TLS is not at hand."""
    settings = work / ".config" / "containers"
    settings.mkdir(parents=True)
    insecure = f'[[registry]]\nlocation = "{variables["HOST"]}"\ninsecure = true\n'
    (settings / "registries.conf").write_text(insecure)
    own = {"WORK": str(work), "HOME": str(work)}
    done = subprocess.run(
        ["sh", "-c", script], env=os.environ | own | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def pulled(image: str, work: Path) -> Path:
    """The adapter's folder as a pod of KAITO's has it."""
    run(PULL, work, IMAGE=image, VOLUME=str(work / "mnt"), HOST=image.partition("/")[0])
    return work / "mnt"


def pushed(adapter: Path, image: str, work: Path, preset: str) -> None:
    """Push the folder `adapter` as KAITO's tuning does (HOST/REPOSITORY:TAG)."""
    host = image.partition("/")[0]
    run(PACK, work, VOLUME=str(adapter), HOST=host)
    layout(work, preset)
    copy = 'skopeo copy "oci:${FROM}/layout:latest" "docker://${IMAGE}"'
    run(copy, work / "push", FROM=str(work), IMAGE=image, HOST=host)


def layout(work: Path, preset: str) -> None:
    """An OCI layout of config and layer, in the words of oras 1.2 (oras-go v2, PackManifestV1_0)."""
    blobs = work / "layout" / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    layer = blob((work / "layer.tar.gz").read_bytes(), "application/vnd.oci.image.layer.v1.tar+gzip")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob((work / "config.json").read_bytes(), "application/vnd.oci.image.config.v1+json"),
        "layers": [layer | {"annotations": {"org.opencontainers.image.title": "layer.tar.gz"}}],
        "annotations": {"org.opencontainers.image.created": "2026-11-27T00:00:00Z", "sh.kaito.model.name": preset},
    }
    found = blob(json.dumps(manifest).encode(), str(manifest["mediaType"]))
    (work / "layout" / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    named = found | {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    (work / "layout" / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
