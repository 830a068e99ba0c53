"""Serving as a whole: the replicas, how many there are, and the router that clients reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pulumi

from infra.settings import Environment
from workloads.compiled import Compiled, CompiledArgs, compiled_address
from workloads.engine import Engine, EngineArgs
from workloads.kaito import KaitoServing, KaitoServingArgs
from workloads.namespaces import SERVING
from workloads.router import Router, RouterArgs
from workloads.scaling import Scaling, ScalingArgs
from workloads.switching import OURS, tell


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
    account: pulumi.Input[str]  # the storage account's name
    namespace: pulumi.Input[str] = SERVING
    service_account: pulumi.Input[str] = "serving"
    compiler: pulumi.Input[str] = "compiler"  # service account of the Job that compiles


class Serving(pulumi.ComponentResource):
    """Engine, Compiled and Scaling of one environment, or by its settings what KAITO runs in their place; and Router.

    The router and its Service are the same for both, so that clients have one address whoever runs the replicas.
    """

    url: pulumi.Output[str]
    """Base of the OpenAI API, without /v1."""
    watch: str
    """Command that waits until all replicas answer."""
    replicas: str
    """What the router leads to, as kubectl names it."""

    def __init__(self, name: str, args: ServingArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Serving", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        env, others = args.env, None
        after: list[pulumi.Resource] = []
        if env.serving.runtime == "kaito":
            by_kaito = KaitoServing(f"{name}-kaito", KaitoServingArgs(env, args.namespace), child)
            self.watch, self.replicas, others = by_kaito.watch, by_kaito.named, by_kaito.replicas
            after = [by_kaito]
        else:
            engine = self._direct(name, args, child)
            self.watch, self.replicas = engine.watch, OURS
            after = [engine] if env.serving.new_first else []
        router = Router(
            f"{name}-router",
            RouterArgs(
                image=args.router_image,
                expose=env.serving.expose,
                vnet_ranges=(env.network.address_space,),
                nodes=env.cluster.apps_max_nodes,
                namespace=args.namespace,
                replicas=others,
                after=after,
            ),
            opts=child,
        )
        tell(env, self.replicas)
        self.url = router.url
        self.register_outputs({"url": self.url, "watch": self.watch})

    def _direct(self, name: str, args: ServingArgs, child: pulumi.ResourceOptions) -> Engine:
        env = args.env
        replicas = EngineArgs(
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
            others=env.others_places,
            namespace=args.namespace,
            service_account=args.service_account,
        )
        if env.finds_compiled:
            address = compiled_address(replicas, args.account)
            replicas = replace(replicas, compiled=address)
            if env.compiles:
                Compiled(f"{name}-compiled", CompiledArgs(replicas, address, args.compiler), child)
        engine = Engine(f"{name}-engine", replicas, opts=child)
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
        return engine
