"""The page of a local run, `local.html`, and its verdicts: made from `local.json` alone, however far the run came.

Nothing here measures, and nothing is assumed to be there: a step that was not reached is said to be not run, one that
failed shows its error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.files import write_atomic
from stress.report import duration, figure, get, number, pairs, percent

Json = Mapping[str, Any]
# Whether a promise held, and what was seen. None: nothing was measured, so neither.
Seen = tuple[bool | None, str]
UNMEASURED: Seen = (None, "not measured")
# Terminal control sequences (ECMA-48, 5.4), which a build's output may have.
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


@dataclass(frozen=True)
class Promise:
    """What the local cloud promises, and what came of it in this run."""

    key: str
    name: str
    held: bool | None
    text: str


def verdicts(record: Json) -> list[tuple[bool, str]]:
    """Each promise with whether it held. One that was not put to the test did not: its text says why."""
    return [(promise.held is True, f"{promise.name}: {promise.text}") for promise in promises(record)]


def promises(record: Json) -> list[Promise]:
    """All promises in the order of the steps that put them to the test; `record` is the content of `local.json`."""
    drilled: list[tuple[str, str, str, Callable[[Json], Seen]]] = [
        (f"job_{name}", f"drills Job, {name.replace('_', ' ')}", "job", partial(_drilled, name))
        for name, _ in pairs(get(record, "job.drills"))
    ]
    checks: list[tuple[str, str, str, Callable[[Json], Seen]]] = [
        ("serving", "serving", "serving", _serving),
        ("stress", "stress test", "stress", _unharmed),
        ("build", "broken build", "build", _build),
        *(drilled or [("job", "drills Job", "job", lambda _: UNMEASURED)]),
        ("switch", "switch under load", "retune", _switch),
        ("eviction", "eviction in mid-run", "retune", _eviction),
        ("rollout", "rolling update", "rollout", _rollout),
        ("gate", "failed gate", "rollout", _gate),
        ("replica_kill", "replica killed", "replica_kill", _replica_kill),
        ("registry", "registry out of reach", "replica_kill", _registry),
        ("node_loss", "node deleted", "node_loss", _node_loss),
        ("outage", "outage", "outage", _outage),
    ]
    found = [Promise("up", "pulumi up", *_step(record, "up", _up))]
    adapters = _adapters(record)
    found += [Promise("adapters", f"adapter {item.get('adapter')}", *_adapter(item)) for item in adapters]
    if not adapters:
        found.append(Promise("adapters", "adapters", *_step(record, "tuning", lambda _: UNMEASURED)))
    return found + [Promise(key, name, *_step(record, step, check)) for key, name, step, check in checks]


def _step(record: Json, name: str, check: Callable[[Json], Seen]) -> Seen:
    """What `check` sees in the step's figures, or why there are none."""
    figures = record.get(name)
    if isinstance(figures, Mapping) and figures:
        return check(figures)
    entry = next((step for step in _steps(record) if step.get("name") == name), None)
    if entry is None:
        return None, "not run"
    if entry.get("status") == "failed":
        return False, f"step {name} failed: {brief(entry.get('error'))}"
    return None, "interrupted" if entry.get("status") == "interrupted" else UNMEASURED[1]


def _up(figures: Json) -> Seen:
    running = figures.get("tuning_when_it_returned")
    if not isinstance(running, list):
        return UNMEASURED
    some = f"while {len(running)} tuning Job{'s' * (len(running) > 1)} still ran"
    jobs = some if running else "when no tuning Job ran any more"
    return bool(running), f"returned after {duration(figures.get('seconds'))}, {jobs}"


def _adapter(item: Json) -> Seen:
    if not item.get("promoted_digest"):
        return False, f"not promoted; its Job: {item.get('state', 'state unknown')}"
    interval = item.get("gain_ci95")
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(number, interval))):
        return None, "promoted; its gain was not measured"
    low, high = interval
    score = f"{percent(item.get('base'))} → {percent(item.get('score'))} %"
    points = f"gain between {percent(low, '%+.1f')} and {percent(high, '%+.1f')} points (95 %)"
    return low > 0, f"promoted, {score}, {points}"


def _serving(figures: Json) -> Seen:
    replicas, asked = figures.get("replicas"), figures.get("asked")
    if not isinstance(replicas, Mapping) or not isinstance(asked, Mapping):
        return UNMEASURED
    served = sum(isinstance(versions, Mapping) and set(asked) <= {*versions} for versions in replicas.values())
    text = f"{served} of {len(replicas)} replicas answer for {' and '.join(asked) or 'no adapter'}"
    return bool(asked) and 0 < len(replicas) == served, f"{text}, after {duration(figures.get('seconds'))}"


def _unharmed(figures: Json) -> Seen:
    """No request failed, of more than none."""
    counts = _numbers(figures, "requests", "failed")
    if counts is None:
        return UNMEASURED
    requests, failed = counts
    return requests > 0 and failed == 0, f"{requests:,} requests, {failed or 'none'} failed"


def _switch(figures: Json) -> Seen:
    held, text = _unharmed(figures)
    seconds, back = figures.get("switch_seconds"), figures.get("rollback_seconds")
    return held, f"{text}; on every replica in {duration(seconds)}, rolled back in {duration(back)}"


def _eviction(figures: Json) -> Seen:
    evicted, resumed = get(figures, "eviction.evicted_at_step"), get(figures, "eviction.resumed_at_step")
    if not number(resumed):
        return UNMEASURED
    return resumed > 0, f"evicted at step {figure(evicted)}, resumed at step {resumed:,}"


def _rollout(figures: Json) -> Seen:
    held, text = _unharmed(figures)
    return held, f"{text}; all replicas replaced in {duration(figures.get('seconds'))}"


def _gate(figures: Json) -> Seen:
    """The drill ends with an error where a useless adapter is promoted; with figures, it was not."""
    adapter = get(figures, "gate.adapter")
    if not adapter:
        return UNMEASURED
    return True, f"the adapter {adapter} was not promoted; the others went on being served"


def _cut(figures: Json) -> Seen:
    """No request failed other than streams that had begun: no router can send the rest of those from elsewhere."""
    counts = _numbers(figures, "requests", "failed", "failed_streams")
    if counts is None:
        return UNMEASURED
    requests, failed, begun = counts
    other = failed - begun
    cut = f" but {begun} stream{'s' * (begun != 1)} that had begun" if begun else ""
    return requests > 0 and other == 0, f"{requests:,} requests, {other or 'none'} failed{cut}"


def _replica_kill(figures: Json) -> Seen:
    held, text = _cut(figures)
    return held, f"{text}; ready again in {duration(figures.get('recovery_seconds'))}"


def _registry(figures: Json) -> Seen:
    """The others told that it was away, for most of the time: it was. What was killed came back meanwhile."""
    away, told = get(figures, "registry.away_seconds"), get(figures, "registry.told_seconds")
    if not number(away) or not number(told) or not number(figures.get("recovery_seconds")):
        return UNMEASURED
    held, text = _cut(figures)
    shown = f"away for {duration(away)}, the metric says {duration(told)}; the killed replica serves from its own disk"
    return bool(held) and told > away / 2, f"{text}; {shown}"


def _drilled(name: str, figures: Json) -> Seen:
    """What the stack's Job judged of the scenario `name`; one that it did not come to has not held."""
    drill = get(figures, f"drills.{name}")
    bounds = _objects(get(drill, "bounds"))
    if failure := get(drill, "failure"):
        return False, brief(failure)
    if not bounds:
        return False, f"the Job did not come to it: {figures.get('state', 'state unknown')}"
    held = all(bound.get("held") is True for bound in bounds)
    return held, "; ".join(f"{bound.get('text')}: {figure(bound.get('measured'))}" for bound in bounds)


def _node_loss(figures: Json) -> Seen:
    held, text = _cut(figures)
    return held, f"{text}; ready on another node in {duration(figures.get('recovery_seconds'))}"


def _outage(figures: Json) -> Seen:
    token, whole = figures.get("recovery_seconds"), figures.get("all_replicas_seconds")
    if not number(token) or not number(whole):
        return UNMEASURED
    return True, f"first token after {duration(token)}, all adapters on all replicas after {duration(whole)}"


def _build(figures: Json) -> Seen:
    code, shown = figures.get("exit_code"), figures.get("shown")
    if not number(code):
        return UNMEASURED
    return code != 0 and bool(shown), f"pulumi up ended with {code} and " + (
        "showed the build's line" if shown else "did not show the build's line"
    )


# The page.


def write(record: Json, target: Path) -> None:
    """Write the self-contained page of `record`, the content of `local.json`, to `target`."""
    write_atomic(target, render(record))


def render(record: Json) -> str:
    """The page: HTML with its style and its plots inside, without scripts."""
    from stress import plots
    from stress.page import page

    drawn = {}
    if steps := [step for step in _steps(record) if number(step.get("seconds"))]:
        drawn["steps"] = _timeline(steps)
    phases = {name: seconds for name, seconds in pairs(get(record, "outage.phases")) if number(seconds)}
    if phases:
        drawn["phases"] = plots.phases(phases)
    found = promises(record)
    return page(
        Path(__file__).with_name("report.html.j2"), percent, ending,
        plots=drawn,
        record=record,
        adapters=_adapters(record),
        steps=_steps(record),
        promises=found,
        promise={promise.key: promise for promise in found},
        verdict=_verdict(record, found),
    )  # fmt: skip


def _verdict(record: Json, found: list[Promise]) -> dict[str, str]:
    """`{status, headline, text}`; status is held, broken, stopped or interrupted."""
    held = sum(promise.held is True for promise in found)
    broken = [promise for promise in found if promise.held is False]
    unknown = len(found) - held - len(broken)
    rest = f"; {unknown} not put to the test" if unknown else ""
    counts = f"{held} of {len(found)} promises held, {len(broken)} did not{rest}"
    last = next(iter(_steps(record)[::-1]), {}).get("name")
    where = f"in step {str(last).replace('_', ' ')}" if last else "before the first step"
    if record.get("status") == "failed":
        return {"status": "stopped", "headline": f"Stopped {where}", "text": counts}
    if record.get("status") != "finished":
        return {"status": "interrupted", "headline": f"Interrupted {where}", "text": counts}
    if broken:
        headline = f"{len(broken)} of {len(found)} promises did not hold{rest}"
        return {"status": "broken", "headline": headline, "text": "; ".join(f"{p.name}: {p.text}" for p in broken)}
    return {"status": "held", "headline": f"{held if unknown else f'All {held}'} promises held{rest}", "text": ""}


def _timeline(steps: list[Json]) -> str:
    """A bar for each step from its start to its end, one below the other; `seconds` must be there."""
    from stress import plots

    total = sum(step["seconds"] for step in steps)
    unit, name = (60, "minutes") if total >= 180 else (1, "seconds")
    colours = {"ok": "blue", "failed": "red"}
    with plots.canvas(620, 60 + 22 * len(steps)) as drawing:
        axes = drawing.subplots()
        start, spoken = 0.0, []
        for row, step in enumerate(steps):
            status = str(step.get("status"))
            text = duration(step["seconds"]) + ("" if status == "ok" else f", {status}")
            (bar,) = axes.barh(
                row, step["seconds"] / unit, 0.62, left=start / unit, color=plots.COLOURS[colours.get(status, "orange")]
            )
            bar.set_gid(f"steps-{row}")
            start += step["seconds"]
            axes.annotate(text, (start / unit, row), xytext=(6, 0), textcoords="offset points", va="center")
            spoken.append(f"{step.get('name')} {text}")
        axes.set_yticks(range(len(steps)), [str(step.get("name")).replace("_", " ") for step in steps])
        axes.set_ylim(len(steps) - 0.4, -0.6)
        axes.set(xlabel=f"{name} since the start", xlim=(0, total / unit * 1.14 or 1))
        axes.grid(axis="y", visible=False)
        return plots.svg(drawing, "steps", "Steps and their durations", "; ".join(spoken))


def _numbers(figures: Json, *names: str) -> list[int] | None:
    values: list[Any] = [figures.get(name) for name in names]
    return values if all(map(number, values)) else None


def _steps(record: Json) -> list[Json]:
    return _objects(record.get("steps"))


def _adapters(record: Json) -> list[Json]:
    return _objects(record.get("adapters"))


def _objects(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def plain(text: Any) -> str:
    """A program's output without what steers a terminal."""
    return CONTROL.sub("", text) if isinstance(text, str) else ""


def ending(text: Any, lines: int = 12) -> str:
    """A program's output without what steers a terminal: its first line and its last ones, which tell what failed."""
    said = plain(text).strip().splitlines()
    return "\n".join(said if len(said) <= lines + 2 else [said[0], "[…]", *said[-lines:]])


def brief(error: Any, limit: int = 160) -> str:
    """The first line of an error, at most `limit` characters of it."""
    line = next((line.strip() for line in plain(error).splitlines() if line.strip()), "no error was written")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
