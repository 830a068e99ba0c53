"""What a preview says when other replicas replace those that answer: for how long nobody will, and the way out."""

from __future__ import annotations

import math

import pulumi

from infra.settings import Environment, replicas_a_node
from workloads.engine import NODE_SECONDS, READ_BYTES_PER_SECOND, startup_seconds
from workloads.mirror import BYTES_PER_PARAMETER

# At best: a GPU node takes 3 to 8 minutes, an image 1 to 2, the start of an 8B model 5 (Tensorfuse, L40S). KAITO itself
# measured 16 minutes for a 27B model on an A100 (its issue #2325).
LEAST_SECONDS = 600
OURS = "deployment/engine"
OUTPUT = "replicas"  # of infra.outputs.Outputs


def tell(env: Environment, after: str) -> None:
    """In a preview, say what becomes of the endpoint when the replicas of the last update are others than `after`.

    The stack's own outputs tell which they were. A preview alone reads them, so that nothing of it stays in the state.
    """
    if not pulumi.runtime.is_dry_run():
        return
    names = (pulumi.get_organization(), pulumi.get_project(), pulumi.get_stack())
    before = pulumi.StackReference("before", stack_name="/".join(names))

    def say(outputs: dict[str, object] | None) -> None:
        found = (outputs or {}).get(OUTPUT)
        if not isinstance(found, str) or found == after:
            return
        for line in lost(env, found):
            pulumi.log.error(line)
        if env.serving.new_first:
            pulumi.log.info(stays(env, found, after))
        else:
            pulumi.log.warn(gap(env, found, after))

    before.outputs.apply(say)


def lost(env: Environment, before: str) -> list[str]:
    """What would keep the replicas of `before` from being removed."""
    if before == OURS or env.kaito:
        return []
    return [
        f"cluster.kaito: {before} is still KAITO's, which has to remove its pods and nodes: set it to true, and remove "
        "it once kubectl --namespace drydock-kaito get workspaces,inferencesets finds nothing"
    ]


def minutes(env: Environment, after: str) -> tuple[int, int]:
    """From the wish for the replicas `after` to their first answer: at best and at worst."""
    seconds = NODE_SECONDS + startup_seconds(env.base.figures.parameters)
    if after != OURS:  # weights come from the hub, at a pace that nobody knows: counted as a disk's
        seconds += math.ceil(env.base.figures.parameters * BYTES_PER_PARAMETER / READ_BYTES_PER_SECOND)
    return LEAST_SECONDS // 60, math.ceil(seconds / 60)


def stays(env: Environment, before: str, after: str) -> str:
    """With `serving.new_first`."""
    least, most = minutes(env, after)
    return (
        f"serving: {before} answers until {after} does, {least} to {most} minutes; pulumi up waits for that. The "
        "address stays, and running requests end where they are"
    )


def gap(env: Environment, before: str, after: str) -> str:
    """Without it."""
    least, most = minutes(env, after)
    pool, replicas = env.pools[env.serving.pool], env.serving.max_replicas
    room = f"pools.{env.serving.pool}.max_nodes = {pool.max_nodes}"
    way = f"{room} has room for both at once: serving.new_first: true keeps the old ones until then"
    if not env.room_for_both:
        needed = math.ceil(2 * replicas / replicas_a_node(env.serving, pool.sku))
        way = f"{room} has no room for both: with {needed}, and quota for them, serving.new_first: true keeps the old"
    return (
        f"serving: {before} goes at once, and {after} takes its place: nobody is answered for {least} to {most} "
        f"minutes, in which the address stays and says 503; {way}"
    )
