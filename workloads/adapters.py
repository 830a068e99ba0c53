"""All adapters of an environment: for each one the Job that tunes, evaluates and promotes it."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from infra.datasets import Datasets
from infra.identities import Identities
from infra.images import Images
from infra.place import Place
from infra.settings import Environment
from workloads.kaito_tuning import KaitoTuning, KaitoTuningArgs
from workloads.namespaces import Namespace
from workloads.tuning import TuningJob, TuningJobArgs


@dataclass(frozen=True)
class AdaptersArgs:
    """The settings, and what other components have made for the Jobs."""

    env: Environment
    place: Place
    identities: Identities
    base_address: pulumi.Input[str]  # az://ACCOUNT/models/OWNER/NAME/REVISION
    datasets: Datasets
    images: Images
    store: pulumi.Input[str]  # oci://REGISTRY/adapters
    account: pulumi.Input[str]  # the storage account's name
    namespace: Namespace


class Adapters(pulumi.ComponentResource):
    """The tuning Jobs, or those that have KAITO tune; `job_names` by adapter."""

    job_names: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: AdaptersArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Adapters", name, None, opts)
        env = args.env
        if args.identities.kaito:
            self.job_names = KaitoTuning(
                "kaito-tuning",
                KaitoTuningArgs(
                    env=env,
                    place=args.place,
                    base_address=args.base_address,
                    datasets=args.datasets,
                    images=args.images,
                    store=args.store,
                    account=args.account,
                    namespace=args.namespace,
                    identity=args.identities.kaito,
                ),
                pulumi.ResourceOptions(parent=self),
            ).job_names
            self.register_outputs({"job_names": self.job_names})
            return
        self.job_names = {
            adapter: TuningJob(
                f"tune-{adapter}",
                TuningJobArgs(
                    adapter=adapter,
                    settings=settings,
                    tuning=env.tuning,
                    serving=env.serving,
                    pool=env.pools[env.tuning.pool],
                    base=env.base,
                    base_address=args.base_address,
                    dataset_address=args.datasets.blobs[adapter],
                    dataset_digest=args.datasets.digests[adapter],
                    training_code=args.images.contexts["training"],
                    training_image=args.images.training,
                    serving_image=args.images.serving,
                    store=args.store,
                    account=args.account,
                    namespace=args.namespace.name,
                    service_account=args.namespace.service_accounts["tuning"],
                ),
                pulumi.ResourceOptions(parent=self),
            ).job_name
            for adapter, settings in env.adapters.items()
        }
        self.register_outputs({"job_names": self.job_names})
