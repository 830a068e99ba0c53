"""The Job that copies the base model from the Hugging Face hub into Blob, once: no other pod ever asks the hub."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from urllib.parse import urlsplit

import pulumi
from pulumi_kubernetes import core, meta
from pydantic import SecretStr

from infra.settings import Base
from workloads.jobs import REPLACE_ON_CHANGES, ROLE_WAIT_SECONDS, digest_of, inputs_hash, job, job_pod, variables
from workloads.placement import apps_node_selector
from workloads.pods import container_security, mount, resources, scratch
from workloads.policies import egress_https, network_policy

LABELS = {"app": "mirror"}
DEADLINE_HOURS = 4  # 140 GB (70B) at 10 MB/s
RETRIES = 6  # the hub's bad minutes; files that are there are not copied again
BASE_WAIT_SECONDS = 7200  # what a pod waits for a model that this Job is still copying: the first `pulumi up`

# One file at a time passes over the node's disk. Large models lie on the hub in files of 5 to 10 GB, small ones in one.
# More than this would not fit beside the images on the 64 GiB of a node of the apps pool.
LARGEST_FILE_GIB = 30
SLACK_GIB = 2  # tokenizer, the hub client's own files
BYTES_PER_PARAMETER = 2  # bfloat16 or float16, as the hub's files have them


@dataclass(frozen=True)
class MirrorArgs:
    """What is copied where: `account` is the storage account's name, `image` the training image by digest.

    `namespace` and `service_account` as outputs of their component make the Job wait for them.
    """

    base: Base
    image: pulumi.Input[str]
    account: pulumi.Input[str]
    namespace: pulumi.Input[str]
    service_account: pulumi.Input[str]
    token: SecretStr | None = None  # of the hub, for a gated or private model


class Mirror(pulumi.ComponentResource):
    """Job `mirror-<hash>` on the apps pool; who needs the model waits for it by `blobs fetch --wait-seconds`.

    Its name follows from hub, model, revision, image and token: a new token starts a new Job, for a gated model that
    the old one could not read.
    """

    address: pulumi.Output[str]
    """az://ACCOUNT/models/OWNER/NAME/REVISION, which holds the model once the Job is complete."""
    job_name: pulumi.Output[str]

    def __init__(self, name: str, args: MirrorArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Mirror", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        base = args.base
        self.address = pulumi.Output.concat("az://", args.account, f"/models/{base.model}/{base.revision}")

        secret = None
        if args.token is not None:
            secret = core.v1.Secret(
                f"{name}-token",
                metadata=meta.v1.ObjectMetaArgs(name="huggingface", namespace=args.namespace),
                string_data={"token": pulumi.Output.secret(args.token.get_secret_value())},
                opts=child,
            )
        network_policy(
            "mirror",
            args.namespace,
            labels=LABELS,
            egress=[egress_https(*_own_port(base.hub))],  # the hub, Entra, Blob
            resource_name=f"{name}-network",
            opts=child,
        )
        started = job(
            pulumi.Output.from_input(args.image).apply(lambda image: job_name(base, image, args.token)),
            args.namespace,
            job_pod(
                args.service_account,
                [_container(args, self.address, secret)],
                [scratch("work")],
                node_selector=apps_node_selector(),
            ),
            labels=LABELS,
            retries=RETRIES,
            deadline_seconds=DEADLINE_HOURS * 3600,
            resource_name=f"{name}-job",
            opts=pulumi.ResourceOptions(parent=self, replace_on_changes=REPLACE_ON_CHANGES),
        )
        self.job_name = started.metadata.name
        self.register_outputs({"address": self.address, "job_name": self.job_name})


def job_name(base: Base, image: str, token: SecretStr | None) -> str:
    """`mirror-1a2b3c4d`. Of the token only 32 bits of a hash go in, from which nobody gets back to it."""
    key = hashlib.sha256(token.get_secret_value().encode()).hexdigest() if token else ""
    return f"mirror-{inputs_hash(base.hub, base.model, base.revision, digest_of(image), key, length=8)}"


def _own_port(hub: str) -> tuple[int, ...]:
    """The port of a hub that is not asked by HTTPS on 443."""
    address = urlsplit(hub)
    port = address.port or (443 if address.scheme == "https" else 80)
    return () if port == 443 else (port,)


def disk_gib(base: Base) -> int:
    """GiB of node disk that the Job needs: room for the largest file, at most that of all weights together."""
    weights = base.figures.parameters * BYTES_PER_PARAMETER / 2**30
    return math.ceil(min(weights, LARGEST_FILE_GIB)) + SLACK_GIB


def _container(args: MirrorArgs, address: pulumi.Output[str], secret: core.v1.Secret | None) -> core.v1.ContainerArgs:
    env = variables({"HOME": "/work", "TMPDIR": "/work", "HF_HOME": "/work/hf", "HF_ENDPOINT": args.base.hub})
    if secret is not None:
        source = core.v1.EnvVarSourceArgs(
            secret_key_ref=core.v1.SecretKeySelectorArgs(name=secret.metadata.name, key="token")
        )
        env.append(core.v1.EnvVarArgs(name="HF_TOKEN", value_from=source))
    return core.v1.ContainerArgs(
        name="mirror",
        image=args.image,
        command=[
            *("python", "-m", "blobs", "mirror", args.base.model, "--revision", args.base.revision),
            address,
            *("--wait-seconds", str(ROLE_WAIT_SECONDS)),
        ],
        env=env,
        # The hub's client holds parts of several downloads in memory.
        resources=resources(cpu="500m", cpu_limit="2", memory="4Gi", storage=f"{disk_gib(args.base)}Gi"),
        security_context=container_security(),
        volume_mounts=[mount("work", "/work")],
    )
