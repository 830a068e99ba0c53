"""The container images, built by the registry from this repository and referred to by digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pulumi
from pulumi_azure_native import containerregistry

from common.settings import SettingsError
from infra.context import base_images, context_files, context_hash
from infra.place import Place
from infra.registry import CACHE, Registry
from infra.uploads import ImageBuild

IMAGES = {
    "training": "training/Dockerfile",
    "serving": "serving/Dockerfile",
    "router": "serving/router.Dockerfile",
    "stress": "stress/Dockerfile",
}

CPU_ARGUMENTS = {"REQUIREMENTS": "requirements/serving-cpu.lock"}  # of serving/Dockerfile

# A preview: learn.microsoft.com/azure/container-registry/tasks-agent-pools, read in 2026-08; public cloud only.
_AGENT_POOL_REGIONS = (
    "canadacentral", "centralus", "eastasia", "eastus", "eastus2", "northeurope", "southcentralus", "switzerlandnorth",
    "westeurope", "westus2",
)  # fmt: skip


@dataclass(frozen=True)
class ImagesArgs:
    """`root`: this repository; `build_subnet_id`: where a private registry's build agents run, required then.

    `device`: cpu takes the CPU build of vLLM into the serving image. `ways`: what must be there before the registry can
    be reached, such as its private endpoint.
    """

    place: Place
    registry: Registry
    root: Path
    build_subnet_id: pulumi.Input[str] | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    ways: Sequence[pulumi.Resource] = ()


class Images(pulumi.ComponentResource):
    """`SERVER/drydock/NAME@sha256:...` of each image; in a preview unknown only where its context changed."""

    training: pulumi.Output[str]
    serving: pulumi.Output[str]
    router: pulumi.Output[str]
    stress: pulumi.Output[str]
    contexts: dict[str, str]
    """The hash of each image's context, by name: what its digest follows from, known before it is built."""

    def __init__(self, name: str, args: ImagesArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Images", name, None, opts)
        place = args.place
        given = {"serving": CPU_ARGUMENTS} if args.device == "cpu" else {}
        contexts, problems = {}, []
        for image, dockerfile in IMAGES.items():
            try:
                contexts[image] = context_hash(context_files(args.root, dockerfile, given.get(image)))
            except SettingsError as error:
                problems += error.problems
        if place.private and args.build_subnet_id is None:
            problems.append("images: the builder of a private registry must run inside of the network: give its subnet")
        if problems:
            raise SettingsError(problems)
        self.contexts = contexts
        agents = self._agents(name, args) if place.private else None
        references = {
            image: pulumi.Output.concat(
                args.registry.login_server,
                f"/drydock/{image}@",
                ImageBuild(
                    f"{name}-{image}",
                    subscription_id=place.subscription_id,
                    resource_group=place.group,
                    registry=args.registry.name,
                    image=f"drydock/{image}",
                    root=args.root,
                    dockerfile=IMAGES[image],
                    context=context,
                    arguments=base_arguments(args.root / IMAGES[image], args.registry) | given.get(image, {}),
                    agent_pool=agents.name if agents else None,
                    # The base image comes through a cache rule.
                    opts=pulumi.ResourceOptions(parent=self, depends_on=[args.registry, *args.ways]),
                ).digest,
            )
            for image, context in contexts.items()
        }
        self.training, self.serving, self.router, self.stress = (references[image] for image in IMAGES)
        self.register_outputs(references)

    def _agents(self, name: str, args: ImagesArgs) -> containerregistry.AgentPool:
        """Build agents inside of the network: Azure's shared ones cannot push into a private registry.

        The way around the network rules that tasks used to have was closed on 2025-06-01.
        """
        if args.place.location not in _AGENT_POOL_REGIONS:
            pulumi.log.warn(
                "images: build agents for a private registry are a preview, which Azure's documentation offers in "
                f"{', '.join(_AGENT_POOL_REGIONS)}, not in {args.place.location}: if it refuses, choose one of those",
                self,
            )
        return containerregistry.AgentPool(
            f"{name}-agents",
            agent_pool_name="builds",
            registry_name=args.registry.name,
            resource_group_name=args.place.group,
            location=args.place.location,
            os="Linux",
            tier="S3",  # 8 vCPU, 16 GB: unpacking torch and vLLM wants memory; the default quota is 16 vCPU
            count=1,  # paid by the hour while it stands; a run waits for ever on a pool of none
            virtual_network_subnet_resource_id=args.build_subnet_id,
            opts=pulumi.ResourceOptions(parent=self),
        )


def base_arguments(dockerfile: Path, registry: Registry) -> dict[str, pulumi.Input[str]]:
    """Build arguments that take the base image from the registry's own cache, by the same digest."""
    found: dict[str, pulumi.Input[str]] = {}
    for argument, image in base_images(dockerfile).items():
        for source, target in CACHE.items():
            if image.startswith((f"{source}:", f"{source}@")):
                version = image.removeprefix(source)
                found[argument] = pulumi.Output.concat(registry.login_server, f"/{target}{version}")
    return found
