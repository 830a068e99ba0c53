"""Serving as a whole: the replicas, how many there are, and the router that clients reach."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from infra.settings import Environment
from workloads.engine import Engine, EngineArgs
from workloads.kaito import KaitoServing, KaitoServingArgs
from workloads.namespaces import SERVING
from workloads.router import Router, RouterArgs
from workloads.scaling import Scaling, ScalingArgs


@dataclass(frozen=True)
class ServingArgs:
    """The settings, and what other components have made for it."""

    env: Environment
    image: pulumi.Input[str]  # the serving image, by digest
    router_image: pulumi.Input[str]
    base_address: pulumi.Input[str]  # az://ACCOUNT/models/OWNER/NAME/REVISION
    store: pulumi.Input[str]  # oci://REGISTRY/adapters
    query_endpoint: pulumi.Input[str]  # of the managed Prometheus
    keda_client_id: pulumi.Input[str]
    namespace: pulumi.Input[str] = SERVING
    service_account: pulumi.Input[str] = "serving"


class Serving(pulumi.ComponentResource):
    """Engine, Scaling and Router of one environment; or, by its settings, what KAITO runs in their place."""

    url: pulumi.Output[str]
    """Base of the OpenAI API, without /v1."""
    watch: str
    """Command that waits until all replicas answer."""

    def __init__(self, name: str, args: ServingArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Serving", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        if args.env.serving.runtime == "kaito":
            by_kaito = KaitoServing(f"{name}-kaito", KaitoServingArgs(args.env), child)
            self.url, self.watch = by_kaito.url, by_kaito.watch
        else:
            self.url, self.watch = self._direct(name, args, child)
        self.register_outputs({"url": self.url, "watch": self.watch})

    def _direct(self, name: str, args: ServingArgs, child: pulumi.ResourceOptions) -> tuple[pulumi.Output[str], str]:
        env = args.env
        engine = Engine(
            f"{name}-engine",
            EngineArgs(
                settings=env.serving,
                pool=env.pools[env.serving.pool],
                base=env.base,
                base_address=args.base_address,
                image=args.image,
                store=args.store,
                adapters=tuple(env.adapters),
                max_lora_rank=env.max_lora_rank,
                api_keys=env.api_keys,
                tiers=env.tiers,
                other_gpus=env.other_gpus,
                namespace=args.namespace,
                service_account=args.service_account,
            ),
            opts=child,
        )
        Scaling(
            f"{name}-scaling",
            ScalingArgs(
                settings=env.serving,
                parameters=env.base.figures.parameters,
                query_endpoint=args.query_endpoint,
                keda_client_id=args.keda_client_id,
                deployment=engine.deployment,
                namespace=args.namespace,
            ),
            opts=child,
        )
        router = Router(
            f"{name}-router",
            RouterArgs(
                image=args.router_image,
                expose=env.serving.expose,
                vnet_ranges=(env.network.address_space,),
                nodes=env.cluster.apps_max_nodes,
                namespace=args.namespace,
            ),
            opts=child,
        )
        return router.url, engine.watch
