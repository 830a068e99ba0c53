"""The adapter sidecar of one replica: follows the `promoted` tags, loads versions into vLLM, proves them, switches.

    promoted tag -> fetch (digests verified) -> load under a name never used before -> canaries -> alias switches
                                                                                   -> refused: alias stays

It is level-triggered: every look compares what is with what should be, so it makes no difference whether a tag moved, a
fetch failed before, or the engine died and came back without its adapters. While the store is out of reach, what is
served stays served, and an engine that starts gets from this disk what was served when the store last answered.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import ValidationError

from artifacts.adapter import AdapterError, promoted_digest
from artifacts.adapter import version as version_of
from artifacts.store import OutOfReach, Store, StoreError, Unusable
from common.files import read_json
from serving import canaries
from serving.cache import Cache
from serving.client import Engine, EngineError
from serving.spec import ServingSpec
from serving.state import Aliases, Served, loaded_name, read_aliases, read_boot, write_aliases

log = logging.getLogger(__name__)


class Refused(Exception):
    """This version cannot be served here, and trying again will not change it."""


@dataclass
class Metrics:
    """What Prometheus sees of the sidecar."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        labels = ["adapter", "version"]
        self.serving = Gauge(
            "drydock_adapter_serving", "1 for the version that answers.", labels, registry=self.registry
        )
        self.parity = Gauge(
            "drydock_adapter_parity_difference_nats",
            "Largest mean log-probability difference of a canary.",
            labels,
            registry=self.registry,
        )
        self.seconds = Gauge(
            "drydock_adapter_switch_seconds",
            "Seconds from seeing the tag to answering, by phase.",
            [*labels, "phase"],
            registry=self.registry,
        )
        self.refused = Counter("drydock_adapter_refused", "Versions refused for good.", labels, registry=self.registry)
        self.errors = Counter(
            "drydock_sidecar_errors", "Looks that failed and will be repeated.", ["adapter"], registry=self.registry
        )
        self.unreachable = Gauge(
            "drydock_registry_unreachable_seconds",
            "Since a look at all `promoted` tags last succeeded; 0 while each does.",
            registry=self.registry,
        )


class Sidecar:
    """Keeps one engine in step with the store. `look()` is one pass; the caller repeats it."""

    def __init__(self, spec: ServingSpec, store: Store, engine: Engine, state: Path, cache: Path) -> None:
        self.spec, self.store, self.engine, self.state, self.cache = spec, store, engine, state, Cache(cache)
        self.metrics = Metrics()
        self._boot: str | None = None
        self._aliases: dict[str, Served] = {}
        self._refused: dict[str, dict[str, str]] = {}  # adapter -> digest -> reason
        self._settled: set[str] = set()  # adapters that were served, refused or found not promoted since the boot
        self._replaced: dict[str, float] = {}  # loaded name -> when it stopped answering (monotonic)
        self._told: Aliases | None = None
        self._reachable = True  # whether the last look saw all tags
        self._reached = time.monotonic()  # when one last did
        self.metrics.unreachable.set_function(lambda: 0 if self._reachable else time.monotonic() - self._reached)

    def look(self) -> bool:
        """Bring the engine in step; True when every promoted adapter is served or refused for good.

        Never raises for a store or engine that is out of reach: what is served stays served.
        """
        boot = read_boot(self.state)
        if boot is None:
            return False
        if boot != self._boot:
            self._meet(boot)
        try:
            loaded = self.engine.models()
        except httpx.HTTPError:
            return False  # still starting, or gone: its next boot is noticed above
        self._note_strays(loaded)
        if not self._reachable:
            self._follow_kept(loaded)
        reachable, kept_tried = True, not self._reachable
        for adapter in self.spec.adapters:
            asked = False
            try:
                digest = promoted_digest(self.store, adapter)
                asked = True
                self._follow(adapter, digest, loaded)
                kept = self.cache.served.get(adapter)
                if digest and kept and adapter not in self._aliases:  # refused, on an engine that was started anew
                    self._follow(adapter, kept, loaded)
                self._settled.add(adapter)
                self._remember(adapter, digest)
            except (StoreError, EngineError, httpx.HTTPError, OSError) as error:
                self.metrics.errors.labels(adapter).inc()
                if asked or self._reachable:  # an outage is told once, not each second
                    log.warning("%s: %s; trying again", adapter, error)
                reachable = reachable and asked
                if not kept_tried and (not asked or isinstance(error, StoreError)):
                    kept_tried = True  # now, for all adapters: to be told of the others' failure may take minutes
                    self._follow_kept(loaded)
                if isinstance(error, OutOfReach):
                    break  # to hear the same for each of the others takes most of a minute each
            except Exception:
                # What nobody foresaw in one adapter keeps neither the others nor the base from being served.
                self.metrics.errors.labels(adapter).inc()
                log.exception("%s: a fault of the sidecar; trying again", adapter)
        self._note_reach(reachable)
        self._unload_replaced(loaded)
        self._tell(ready=self._all_settled())
        return self._all_settled()

    def _meet(self, boot: str) -> None:
        """Begin anew with an engine process that was not seen before."""
        if self._boot is not None:
            log.info("the engine was started anew: loading its adapters again")
        for gauge in (self.metrics.serving, self.metrics.parity, self.metrics.seconds):
            gauge.clear()
        self._boot, self._replaced, self._refused, self._settled = boot, {}, {}, set()
        # What an earlier sidecar proved on this very engine process goes on answering.
        said = read_aliases(self.state)
        self._told = said if said and said.boot == boot else None
        known = self._told.aliases if self._told else {}
        self._aliases = {name: served for name, served in known.items() if name in self.spec.adapters}
        self._settled = set(self.spec.adapters) if self._told and self._told.ready else set(self._aliases)
        for name, served in self._aliases.items():
            self.metrics.serving.labels(name, served.version).set(1)
            self.metrics.parity.labels(name, served.version).set(served.parity_difference)
        self.cache.prune(self._answering())

    def _answering(self) -> set[str]:
        """The loaded names that answer for an alias."""
        return {loaded_name(adapter, served.version) for adapter, served in self._aliases.items()}

    def _all_settled(self) -> bool:
        return self._settled.issuperset(self.spec.adapters)

    def _note_strays(self, loaded: set[str]) -> None:
        """Versions that are loaded but answer for nothing: a sidecar died before it unloaded or proved them."""
        for name in loaded - self._answering() - {self.spec.base_name}:
            if name.rpartition(".")[0] in self.spec.adapters:
                self._replaced.setdefault(name, time.monotonic())

    def _note_reach(self, reachable: bool) -> None:
        """Tell the log and the metric how long the store has been out of reach."""
        now = time.monotonic()
        if not reachable and self._reachable:
            log.warning("the store is out of reach: what is served stays served, and new promotions are not seen")
        elif reachable and not self._reachable:
            log.warning("the store answers again, after %.0f s", now - self._reached)
        if reachable:
            self._reached = now
        self._reachable = reachable

    def _follow_kept(self, loaded: set[str]) -> None:
        """Serve what this replica served when the store last answered, where nothing is settled since the boot."""
        for adapter, digest in self.cache.served.items():
            if adapter not in self.spec.adapters or adapter in self._settled:
                continue
            try:
                self._follow(adapter, digest, loaded)
            except Exception as error:  # as in `look`
                log.warning("%s: not served from this disk either: %s; trying again", adapter, error)
                continue
            self._settled.add(adapter)
            what = f"version {version_of(digest)}" if digest else "no version"
            log.warning("%s: %s was promoted when the store last answered; that holds until it does", adapter, what)
        self._tell(ready=self._all_settled())

    def _remember(self, adapter: str, promoted: str | None) -> None:
        """For a start without the store: the version that answers, or that there is none to wait for."""
        if adapter in self._aliases:
            self.cache.remember(adapter, self._aliases[adapter].digest)
        elif promoted is None or adapter not in self.cache.served:
            self.cache.remember(adapter, None)

    def _follow(self, adapter: str, digest: str | None, loaded: set[str]) -> None:
        """Serve the version `digest` of `adapter`, if it is not served already; None: serve no version."""
        now = self._aliases.get(adapter)
        if digest is None:
            if now:
                log.info("%s: no version is promoted any more", adapter)
                self._retire(adapter)
            return
        if (now and now.digest == digest) or digest in self._refused.get(adapter, {}):
            return
        version = version_of(digest)
        name = loaded_name(adapter, version)
        started = time.monotonic()
        try:
            folder = self._fetch(adapter, digest)
            fetched = time.monotonic()
            if name not in loaded:
                self._load(name, folder)
                loaded.add(name)
            ready = time.monotonic()
            difference = self._prove(name, folder)
            said = origin(folder)
        except Refused as refusal:
            reason = str(refusal)
            self._refused.setdefault(adapter, {})[digest] = reason
            self.metrics.refused.labels(adapter, version).inc()
            keeps = f"stays on {now.version}" if now else "is not served"
            log.error("%s %s REFUSED: %s; %s %s", adapter, version, reason, adapter, keeps)
            self.cache.drop(name)
            return
        proven = time.monotonic()
        if now:
            self._retire(adapter)
        self._replaced.pop(name, None)  # rolled back to, or left by an earlier sidecar: it must not be unloaded
        self._aliases[adapter] = Served(
            version=version,
            digest=digest,
            parity_difference=difference,
            since=time.time(),
            **said,
        )
        self._tell(ready=self._told.ready if self._told and self._told.boot == self._boot else False)
        phases = {"fetch": fetched - started, "load": ready - fetched, "parity": proven - ready}
        for phase, seconds in phases.items():
            self.metrics.seconds.labels(adapter, version, phase).set(seconds)
        self.metrics.serving.labels(adapter, version).set(1)
        self.metrics.parity.labels(adapter, version).set(difference)
        took = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items())
        log.info("%s answers from %s now (%s; canaries within %.4f nats)", adapter, version, took, difference)

    def _fetch(self, adapter: str, digest: str) -> Path:
        """The folder with the version's files, fetched once and then kept on the node."""
        try:
            return self.cache.fetch(self.store, adapter, digest)
        except (Unusable, AdapterError) as error:
            raise Refused(str(error)) from error

    def _load(self, name: str, folder: Path) -> None:
        try:
            self.engine.load(name, folder)
        except EngineError as error:
            # Final even as 500: vLLM does not tell weights that it cannot use from trouble of its own.
            raise Refused(f"vLLM did not load it: {error}") from error

    def _prove(self, name: str, folder: Path) -> float:
        """Largest canary difference in nats. Raises `Refused`, after unloading it, when it is no proof."""
        try:
            recorded = canaries.load(folder / "canaries.json")
            difference = canaries.largest_difference(self.engine, name, recorded)
            if difference > recorded.tolerance:
                raise Refused(
                    f"its canaries differ by {difference:.4f} nats a token from what was recorded, allowed are "
                    f"{recorded.tolerance}: this replica does not compute what was evaluated (other base, or keys that "
                    "match no layer)"
                )
        except (Refused, OSError, ValidationError, EngineError) as error:
            if isinstance(error, EngineError) and not error.final:
                raise
            self.engine.unload(name)
            raise Refused(str(error) if isinstance(error, Refused) else f"no usable canaries.json: {error}") from error
        return difference

    def _retire(self, adapter: str) -> None:
        served = self._aliases.pop(adapter)
        self._replaced[loaded_name(adapter, served.version)] = time.monotonic()
        for gauge in (self.metrics.serving, self.metrics.parity):
            gauge.remove(adapter, served.version)
        self.metrics.seconds.remove_by_labels({"adapter": adapter, "version": served.version})

    def _unload_replaced(self, loaded: set[str]) -> None:
        """Unload what stopped answering a while ago: a request that read the old alias has reached vLLM by then."""
        for name, since in list(self._replaced.items()):
            if time.monotonic() - since >= self.spec.old_version_seconds:
                try:
                    if name in loaded:
                        self.engine.unload(name)
                except (EngineError, httpx.HTTPError) as error:
                    log.warning("%s was not unloaded: %s", name, error)
                    continue
                del self._replaced[name]
                self.cache.drop(name)
                log.info("%s is unloaded", name)

    def _tell(self, *, ready: bool) -> None:
        """Tell the request layer, if anything changed."""
        assert self._boot is not None
        current = {adapter: reasons for adapter, reasons in self._refused.items() if adapter in self.spec.adapters}
        said = Aliases(
            boot=self._boot,
            ready=ready,
            aliases=dict(self._aliases),
            refused={adapter: list(reasons.values())[-1] for adapter, reasons in current.items()},
        )
        if said != self._told:
            write_aliases(self.state, said)
            self._told = said


MOST_SCORE = 1e9
"""Beyond it, a score is none: not a number of any metric of ours, nor one that every reader of JSON takes."""


def origin(folder: Path) -> dict[str, Any]:
    """What the files of a version say about its base and its evaluation, as fields of `Served`; what is absent is not.

    An adapter is served as well where they are odd: they are told to people, nothing hangs on them.
    """
    spec, tuning, evaluation = (_object(folder / name) for name in ("spec.json", "tuning.json", "evaluation.json"))
    model, revision = spec.get("base_model"), tuning.get("base_revision")
    base = [Path(model).name] if isinstance(model, str) else []  # no path of the machine that tuned it
    base += [revision] if isinstance(revision, str) else []
    told = {"base": "@".join(base) or None, "metric": evaluation.get("metric")}
    scores = {"score": evaluation.get("adapter"), "base_score": evaluation.get("base")}
    return {name: value for name, value in told.items() if isinstance(value, str)} | {
        name: value for name, value in scores.items() if isinstance(value, int | float) and abs(value) <= MOST_SCORE
    }


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
