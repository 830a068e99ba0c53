"""The stack, read top to bottom: what one environment is made of. Settings: Pulumi.<stack>.yaml, infra/settings.py."""

import pulumi

from infra.cluster import Cluster, ClusterArgs
from infra.cost import tell
from infra.datasets import Datasets, DatasetsArgs
from infra.endpoints import Endpoints, EndpointsArgs
from infra.group import prepare
from infra.identities import Identities, IdentitiesArgs
from infra.images import Images, ImagesArgs
from infra.network import Network, NetworkArgs
from infra.observability import ClusterMonitoring, ClusterMonitoringArgs, Observability, ObservabilityArgs
from infra.outputs import export, of_environment
from infra.pools import Pools, PoolsArgs
from infra.preflight import load
from infra.registry import Registry, RegistryArgs
from infra.settings import ROOT
from infra.storage import Storage, StorageArgs
from workloads.adapters import Adapters, AdaptersArgs
from workloads.drills import Drills, DrillsArgs
from workloads.mirror import Mirror, MirrorArgs
from workloads.platform import Platform, PlatformArgs
from workloads.serving import Serving, ServingArgs
from workloads.stress import StressTest, StressTestArgs
from workloads.watch import Watch, WatchArgs

stack, location = pulumi.get_stack(), pulumi.Config("azure-native").require("location")
env = load(pulumi.get_project(), stack)  # every problem that can be known before Azure is asked, told together
place = prepare(env, organization=pulumi.get_organization(), stack=stack, location=location)
zones = bool(env.cluster.zones)
network = Network("network", NetworkArgs(place, env.network))
eyes = Observability("observability", ObservabilityArgs(place, env.retention.log_days, env.grafana))
cluster = Cluster("cluster", ClusterArgs(place, env.cluster, env.network, network, eyes.log_workspace_id))
ClusterMonitoring("monitoring", ClusterMonitoringArgs(place, cluster.id, eyes))
pools = Pools("pools", PoolsArgs(place, cluster, network.nodes_subnet_id, env.cluster, env.pools))
registry = Registry("registry", RegistryArgs(place, cluster.kubelet_object_id, zones))
storage = Storage("storage", StorageArgs(place, env.retention, zones))
ways = [Endpoints("endpoints", EndpointsArgs(place, network, registry, storage))] if place.private else []
who = Identities("identities", IdentitiesArgs(place, cluster.oidc_issuer_url, registry, storage, eyes.workspace_id))
images = Images("images", ImagesArgs(place, registry, ROOT, network.builds_subnet_id, env.serving.device, ways))
files = {name: ROOT / adapter.dataset for name, adapter in env.adapters.items()}
data = Datasets("datasets", DatasetsArgs(place, storage, files, env.adapters, ways))

platform = Platform("platform", PlatformArgs(place, env, cluster, pools, registry, who))
tuning, serving, inside = platform.tuning, platform.serving, platform.inside
tuner, server = tuning.service_accounts, serving.service_accounts
account, store = storage.name, pulumi.Output.format("oci://{0}/adapters", registry.login_server)
mirrored = MirrorArgs(env.base, images.training, account, tuning.name, tuner["mirror"], env.huggingface_token)
mirror = Mirror("mirror", mirrored, inside)
tuned_by = AdaptersArgs(env, place, who, mirror.address, data, images, store, account, tuning)
jobs = Adapters("adapters", tuned_by, inside).job_names
fed_by = (images.serving, images.router, mirror.address, store, eyes.query_endpoint, who.keda.client_id, account)
served_by = ServingArgs(env, *fed_by, serving.name, server["serving"], server["compiler"])
pool = Serving("serving", served_by, inside)
loaded_by = (images.stress, data, account, serving.name)
stress = StressTest("stress", StressTestArgs(env, *loaded_by, server["stress"]), inside) if env.stress.run else None
broken = DrillsArgs(place, env, cluster, who, *loaded_by, tuning.name)
drills = Drills("drills", broken, inside) if env.drills.run else None
Watch("watch", WatchArgs(place, env, eyes.workspace_id), pulumi.ResourceOptions(depends_on=[pool]))
parts = (cluster, registry, storage, images, pool.url, store, jobs, pool.watch, pool.replicas, eyes, stress, drills)
export(of_environment(env, place, *parts, tell(env, location)))
