"""Default tags: azure-native has none of its own, so one transformation of the stack adds them to what takes tags."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pulumi


def takes_tags(kind: type[Any]) -> bool:
    """Whether resources of this class have tags that a program can set, by the signature of the class itself."""
    constructor = getattr(kind, "_internal_init", None)  # azure-native's own, behind its overloads
    return constructor is not None and "tags" in inspect.signature(constructor).parameters


def with_tags(own: Mapping[str, Any] | None, tags: Mapping[str, str]) -> dict[str, Any]:
    """A resource's `own` tags and those of `tags` that it does not have: its own value stays.

    Azure tells tag names apart without regard to case, so `Owner` of a resource keeps `owner` away.
    """
    own = own or {}
    taken = {name.lower() for name in own}
    return {**{name: value for name, value in tags.items() if name.lower() not in taken}, **own}


def tag_everything(tags: Mapping[str, str]) -> None:
    """From here on, give `tags` to every Azure resource of the stack that takes tags, whichever component makes it.

    A transformation and not one of the newer transforms: those run in the engine, which mocks do not have, and cost a
    call to and fro for each resource. They would also reach the children of remote components, of which there are none.
    """

    def transformation(args: pulumi.ResourceTransformationArgs) -> pulumi.ResourceTransformationResult | None:
        if not args.type_.startswith("azure-native:") or not takes_tags(type(args.resource)):
            return None
        own: pulumi.Output[Any] = pulumi.Output.from_input(args.props.get("tags"))
        merged = own.apply(lambda known: with_tags(known, tags))
        return pulumi.ResourceTransformationResult(props={**args.props, "tags": merged}, opts=args.opts)

    pulumi.runtime.register_stack_transformation(transformation)
