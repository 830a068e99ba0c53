"""A platform team's own stack: a namespace whose pods may ask the models of a drydock environment.

It knows the environment by its outputs alone (infra/outputs.py describes them), by StackReference.
"""

import pulumi
import pulumi_kubernetes as kubernetes

config = pulumi.Config()
drydock = pulumi.StackReference(config.require("drydock_stack"))
wanted = config.require("model")


def served(models: list[str]) -> str:
    """The model that this application asks for; a typing error is told in the preview, not by a 404 in production."""
    if wanted not in models:
        raise pulumi.RunError(f"chat-app:model: {wanted} is not served there; choose one of {', '.join(models)}")
    return wanted


cluster = kubernetes.Provider(
    "cluster",
    kubeconfig=drydock.require_output("kubeconfig"),  # a secret there, and therefore here
    cluster_identifier=drydock.require_output("cluster_id"),  # or a renewed kubeconfig would replace everything
)
inside = pulumi.ResourceOptions(provider=cluster)

namespace = kubernetes.core.v1.Namespace(
    "chat-app",
    metadata=kubernetes.meta.v1.ObjectMetaArgs(
        name="chat-app",
        labels=drydock.require_output("client_label"),  # the network policy of the models lets such namespaces in
    ),
    opts=inside,
)
kubernetes.core.v1.ConfigMap(
    "models",
    metadata=kubernetes.meta.v1.ObjectMetaArgs(name="models", namespace=namespace.metadata.name),
    data={
        "OPENAI_BASE_URL": drydock.require_output("endpoint"),
        "OPENAI_MODEL": drydock.require_output("models").apply(served),
    },
    opts=inside,
)
kubernetes.core.v1.Secret(
    "models-key",
    metadata=kubernetes.meta.v1.ObjectMetaArgs(name="models-key", namespace=namespace.metadata.name),
    string_data={"OPENAI_API_KEY": config.require_secret("api_key")},
    opts=inside,
)
pulumi.export("base_url", drydock.require_output("endpoint"))
