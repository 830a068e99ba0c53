"""What KEDA and the HorizontalPodAutoscaler do with a ScaledObject, as plain code: to try a policy before it acts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SYNC_SECONDS = 15
"""Between two looks of the HPA: kube-controller-manager's `--horizontal-pod-autoscaler-sync-period`, AKS's as well."""
TOLERANCE = 0.1
"""How far from its target a metric may be without effect: `--horizontal-pod-autoscaler-tolerance`."""


@dataclass
class Autoscaler:
    """One ScaledObject at work. `spec` is the declared one, `replicas` what its target has, times are in seconds.

    KEDA's part follows pkg/scaling/executor/scale_scaledobjects.go (2.17 and later), the HPA's part
    pkg/controller/podautoscaler/horizontal.go and replica_calculator.go of Kubernetes, in words:
    https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details and KEP-853.
    Triggers have the default metricType, AverageValue, in which all of KEDA's are one kind of external metric.
    """

    spec: Mapping[str, Any]
    replicas: int
    _wanted: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)
    _last_active: float | None = None

    def __post_init__(self) -> None:
        other = [
            item["name"] for item in self.spec["triggers"] if item.get("metricType", "AverageValue") != "AverageValue"
        ]
        if other:
            raise ValueError(f"triggers {', '.join(other)}: only metricType AverageValue is known here")

    def poll(self, now: float, values: Mapping[str, float | None]) -> int:
        """KEDA, every `pollingInterval`: it alone wakes the target from zero and puts it to sleep.

        `values` are the queries' results by the trigger's name, None where there is none.
        """
        seen = self._seen(values)
        least = self.spec["minReplicaCount"]
        failed = None in seen.values()
        if any(value is not None and value > 0 for value in seen.values()):  # activationThreshold is 0
            if self.replicas == 0:
                self.replicas, self._last_active = max(least, 1), now
            elif not failed:
                self._last_active = now
        elif failed:
            pass  # "Triggers defined in ScaledObject are not working correctly"
        elif self.replicas and least == 0:
            if self._last_active is None or now - self._last_active > self.spec["cooldownPeriod"]:
                self.replicas = 0
        elif self.replicas < least:
            self.replicas = least
        return self.replicas

    def sync(self, now: float, values: Mapping[str, float | None]) -> int:
        """The HPA, every SYNC_SECONDS: between one (or the minimum) and the maximum, at the pace of `behavior`."""
        least, most, current = max(self.spec["minReplicaCount"], 1), self.spec["maxReplicaCount"], self.replicas
        if current == 0:
            return 0  # "scaling is disabled since the replica count of the target is zero"
        if not least <= current <= most:
            self._scale(now, min(max(current, least), most))
            return self.replicas
        wanted = self._desired(values)
        if wanted is None:
            return current
        stable = self._stabilised(now, wanted)
        if stable > current:
            stable = min(stable, most, max(_most(now, current, self._changes, self._rules("scaleUp")), current))
        elif stable < current:
            stable = max(stable, least, min(_least(now, current, self._changes, self._rules("scaleDown")), current))
        self._scale(now, stable)
        return self.replicas

    def _seen(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """What the Prometheus scaler makes of the results: an empty one is 0, or None (ignoreNullValues: false)."""
        return {
            trigger["name"]: 0.0
            if values[trigger["name"]] is None and trigger["metadata"].get("ignoreNullValues", "true") == "true"
            else values[trigger["name"]]
            for trigger in self.spec["triggers"]
        }

    def _desired(self, values: Mapping[str, float | None]) -> int | None:
        """The most that a metric wants. None where none is known, or where those known would take replicas away.

        GetExternalPerPodMetricReplicas: all pods count, ready or not.
        """
        seen, proposals = self._seen(values), []
        for trigger in self.spec["triggers"]:
            value, target = seen[trigger["name"]], int(float(trigger["metadata"]["threshold"]) * 1000)
            if value is not None:
                ratio = int(value * 1000) / (target * self.replicas)
                changed = abs(1 - ratio) > TOLERANCE
                proposals.append(math.ceil(int(value * 1000) / target) if changed else self.replicas)
        if not proposals or (len(proposals) < len(seen) and max(proposals) < self.replicas):
            return None
        return max(proposals)

    def _stabilised(self, now: float, wanted: int) -> int:
        """stabilizeRecommendationWithBehaviors: up to no more than the least that was wanted within scaleUp's window,
        down to no less than the most that was wanted within scaleDown's.
        """
        up, down = (self._rules(way)["stabilizationWindowSeconds"] for way in ("scaleUp", "scaleDown"))
        self._wanted = [item for item in self._wanted if item[0] > now - max(up, down)] + [(now, wanted)]
        least = min(each for then, each in self._wanted if then > now - up or then == now)
        most = max(each for then, each in self._wanted if then > now - down or then == now)
        return min(max(self.replicas, least), most)

    def _rules(self, way: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"][way]
        return found

    def _scale(self, now: float, replicas: int) -> None:
        if replicas != self.replicas:
            self._changes.append((now, replicas - self.replicas))
        self.replicas = replicas


def _limits(
    now: float, current: int, changes: list[tuple[float, int]], rules: Mapping[str, Any]
) -> Iterator[tuple[int, str, int]]:
    """Of each policy: what there was when its period began, its type and its value."""
    for policy in rules["policies"]:
        since = sum(by for then, by in changes if then > now - policy["periodSeconds"])
        yield current - since, policy["type"], policy["value"]


def _most(now: float, current: int, changes: list[tuple[float, int]], rules: Mapping[str, Any]) -> int:
    """calculateScaleUpLimitWithScalingRules, with selectPolicy Max, the default."""
    return max(
        before + value if kind == "Pods" else math.ceil(before * (1 + value / 100))
        for before, kind, value in _limits(now, current, changes, rules)
    )


def _least(now: float, current: int, changes: list[tuple[float, int]], rules: Mapping[str, Any]) -> int:
    """calculateScaleDownLimitWithBehaviors, with selectPolicy Max, the default: the policy that allows most."""
    return min(
        before - value if kind == "Pods" else int(before * (1 - value / 100))
        for before, kind, value in _limits(now, current, changes, rules)
    )
