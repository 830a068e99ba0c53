"""Kubernetes objects end with their cluster: `pulumi destroy` does not ask an API server that is going away."""

from __future__ import annotations

import pulumi


def ending_with(cluster: pulumi.Resource) -> pulumi.ResourceTransform:
    """A transform that marks every Kubernetes object as deleted with `cluster`.

    Without it, destroy and refresh hang on each object once the cluster is gone (pulumi-kubernetes #2463, #2675).
    """

    def transform(args: pulumi.ResourceTransformArgs) -> pulumi.ResourceTransformResult | None:
        if not args.type_.startswith("kubernetes:"):
            return None
        opts = pulumi.ResourceOptions.merge(args.opts, pulumi.ResourceOptions(deleted_with=cluster))
        return pulumi.ResourceTransformResult(args.props, opts)

    return transform


def end_with(cluster: pulumi.Resource) -> None:
    """Apply it to everything that the program makes from here on."""
    pulumi.runtime.register_resource_transform(ending_with(cluster))
