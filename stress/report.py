"""The report: one JSON and one page made from what the chain wrote, with every missing figure named and explained.

Nothing here measures. A figure is copied from the file of the part that measured it; where it is missing, null or not
a finite number, it is left out and its dotted path stands in `absent` with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import exits
from common.files import read_jsonl, write_atomic, write_json
from stress import figures

Json = dict[str, Any]

# Figures that each section must have, and their kind; everything else that the part wrote is copied as well.
REQUIRED: dict[str, dict[str, str]] = {
    "dataset": {"examples": "number", "rejected": "number"},
    "tuning": {"tokens_per_second": "number", "seconds": "number"},
    "evaluation": {
        "metric": "text",
        "base": "number",
        "adapter": "number",
        "gain_ci95": "interval",
        "examples": "number",
        "passed": "flag",
    },
    "promotion": {"adapter": "text", "digest": "text", "seconds_to_all_replicas": "number"},
    "stress": {
        "requests": "number",
        "failed": "number",
        "rps": "number",
        "ttft_ms.p50": "number",
        "ttft_ms.p95": "number",
        "tokens_per_second.p50": "number",
        "tokens_per_second.p95": "number",
    },
    "drills.long_prompts": {"short_p95_ratio": "number", "long_p95_ratio": "number"},
    "drills.replica_loss": {"failed": "number", "p95_ratio": "number", "recovery_seconds": "number"},
    "drills.outage": {"recovery_seconds": "number", "phases": "numbers"},
    "drills.node_drain": {"failed": "number", "recovery_seconds": "number"},
    "drills.tuning_eviction": {"recovery_seconds": "number", "lost_steps": "number"},
    "drills.registry_unreachable": {
        "failed": "number",
        "unready": "number",
        "noticed_seconds": "number",
        "recovery_seconds": "number",
    },
}
ADAPTER_FILES = {
    "dataset": "dataset/{}.json",
    "tuning": "runs/{}/tuning.json",
    "evaluation": "runs/{}/evaluation.json",
    "promotion": "promotions/{}.json",
}
DRILLS = ("long_prompts", "replica_loss", "outage")  # of every chain
CLUSTER_DRILLS = ("node_drain", "tuning_eviction", "registry_unreachable")  # of those who asked for them
GOOD = "ok"  # the status of a stage that ended well
MAIN_SCENARIO = "load"  # the default of `python -m stress run --scenario`
# What a drill should stay within that brought no bounds along: the most that these figures may be.
BOUNDS: dict[str, dict[str, float]] = {
    "long_prompts": {"short_p95_ratio": 1.5, "failed_short": 0},
    "replica_loss": {"failed_not_begun": 0},
}
BOUND_WORDS = {
    "short_p95_ratio": "TTFT p95 of the normal prompts at most %g times as high",
    "failed_short": "at most %g normal prompts failed beside long ones",
    "failed_not_begun": "at most %g requests lost that the router could send again (no answer begun)",
    "failed": "at most %g requests failed",
    "recovery_seconds": "recovered within %g s",
    "lost_steps": "at most %g steps made again",
    "unready": "at most %g replicas ceased to be ready",
}


class Folder:
    """The chain's output folder: reads its JSON files, and remembers why one could not be had."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def json(self, name: str) -> tuple[Json | None, str]:
        """`(object, "")`, or `(None, reason)`."""
        try:
            value = json.loads((self.root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None, f"file {name} was not written"
        except (OSError, ValueError) as error:
            return None, f"file {name} cannot be read: {error}"
        return (value, "") if isinstance(value, dict) else (None, f"file {name} does not hold a JSON object")

    def lines(self, name: str) -> Iterator[Any]:
        """The objects of a JSON-lines file up to the first broken line (a crash cuts the last); none if absent."""
        try:
            yield from (row for row in read_jsonl(self.root / name) if isinstance(row, dict))
        except (OSError, ValueError):
            return

    def names(self, *patterns: str) -> list[str]:
        """Sorted stems of the files (names of the folders) that match."""
        return sorted(
            {
                path.stem if path.is_file() else path.name
                for p in patterns
                for path in self.root.glob(p)
                if path.name[0] != "."
            }
        )


def get(value: Any, path: str) -> Any:
    """The value at the dotted `path`, or None."""
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> bool:
    """Whether `value` is a finite number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: Any, form: str = "%.1f") -> str:
    """A share of 1 in percent, without the sign; a dash for what is no number."""
    return fixed(100 * value, form) if number(value) else "–"


def _fits(value: Any, kind: str) -> bool:
    if kind == "interval":
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))
    if kind == "numbers":
        return isinstance(value, dict) and bool(value) and all(map(number, value.values()))
    return {"number": number(value), "text": isinstance(value, str), "flag": isinstance(value, bool)}[kind]


class Builder:
    """Collects sections and the reasons for what is absent."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.absent: dict[str, str] = {}
        rehearsal, reason = folder.json("rehearsal.json")
        self.rehearsal: Json = rehearsal or {}
        if rehearsal is None:
            self.absent["stages"] = reason
        stages = self.rehearsal.get("stages")
        self.stages: list[Json] = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []

    def stopped(self) -> Json | None:
        """The stage that ended badly, and the chain with it."""
        return next((stage for stage in self.stages if stage.get("status") != GOOD), None)

    def why(self, section: str, otherwise: str) -> str:
        """Why a whole section is missing: its stage failed or was not reached, or `otherwise` (its file)."""
        stop = self.stopped()
        own = next((stage for stage in self.stages if stage.get("name") == section), None)
        if stop is None or (own and own is not stop):
            return otherwise
        return told(stop) if own else f"not reached: {told(stop)}"

    def section(self, path: str, file: str, kind: str, leave: Sequence[str] = ()) -> Json | None:
        """The object in `file`, cleaned, without the keys `leave`; notes what `REQUIRED[kind]` misses below `path`."""
        value, reason = self.folder.json(file)
        if value is None:
            self.absent[path] = self.why(kind, reason)
            return None
        own = value.get("absent")
        own = own if isinstance(own, dict) else {}
        kept = {key: item for key, item in value.items() if key not in (*leave, "absent")}
        if isinstance(kept.get("spec"), dict):  # settings, where null means "by default"; not figures
            kept["spec"] = {key: item for key, item in kept["spec"].items() if item is not None}
        found: Json = self._clean(kept, path, file)
        self.absent |= {f"{path}.{key}": str(text) for key, text in own.items()}
        failure = value.get("failure")
        for name, wanted in REQUIRED[kind].items():
            item = get(found, name)
            if item is not None and not _fits(item, wanted):
                parent = get(found, name.rpartition(".")[0]) if "." in name else found
                parent.pop(name.rpartition(".")[2])
                self.absent[f"{path}.{name}"] = f"file {file}: expected {wanted} at {name}, found {str(item)[:80]}"
            elif item is None and not any(
                f"{path}.{name}" == p or f"{path}.{name}".startswith(p + ".") for p in self.absent
            ):
                self.absent[f"{path}.{name}"] = str(failure) if failure else f"file {file} has no {name}"
        return found

    def _clean(self, value: Any, path: str, file: str) -> Any:
        """`value` without nulls and numbers that are not finite; each of them becomes absent with its reason."""
        if isinstance(value, dict):
            kept = {}
            for key, item in value.items():
                if item is None or (isinstance(item, float) and not math.isfinite(item)):
                    self.absent[f"{path}.{key}"] = f"file {file}: {'null' if item is None else item} instead of a value"
                else:
                    kept[str(key)] = self._clean(item, f"{path}.{key}", file)
            return kept
        if isinstance(value, list):
            if any(isinstance(item, float) and not math.isfinite(item) for item in value):
                self.absent[path] = f"file {file}: a number that is not finite"
                return []
            return [self._clean(item, f"{path}.{at}", file) for at, item in enumerate(value)]
        return value


def told(stage: Json) -> str:
    """A stage that ended badly, in words."""
    text = f"stage {stage.get('name')}: {str(stage.get('status')).replace('_', ' ')}"
    return f"{text}: {stage['error']}" if stage.get("error") else text


def build(root: Path) -> Json:
    """The content of report.json from the output folder `root`; see the module's docstring for what is left out."""
    folder = Folder(root)
    builder = Builder(folder)
    rehearsal = builder.rehearsal
    names = folder.names("dataset/*.json", "runs/*/", "promotions/*.json")
    main = rehearsal.get("main")
    if not isinstance(main, str) or not main:
        main = names[0] if names else ""
        if len(names) > 1:
            builder.absent["main"] = f"rehearsal.json names no main adapter; {main} is the first of {', '.join(names)}"
    report: Json = {"main": main} if main else {}
    absent = builder.absent

    adapters: Json = {}
    for name in dict.fromkeys([*([main] if main else []), *names]):
        adapters[name] = {}
        for section, file in ADAPTER_FILES.items():
            path = section if name == main else f"adapters.{name}.{section}"
            leave = ("samples",) if section == "evaluation" else ()
            found = builder.section(path, file.format(name), section, leave)
            if found is not None:
                adapters[name][section] = found
        evaluation, promotion = (
            adapters[name].get("evaluation", {}),
            "promotion" if name == main else f"adapters.{name}.promotion",
        )
        if evaluation.get("passed") is False and promotion in absent:
            absent[promotion] = (
                f"the gate was not passed, so nothing is promoted: {evaluation.get('verdict', '')}".rstrip(": ")
            )
    if main:
        report |= adapters[main]
    else:
        absent |= dict.fromkeys(ADAPTER_FILES, "no adapter: neither dataset/, runs/ nor promotions/ has a file")
    report["adapters"] = adapters

    scenarios = folder.names("stress/*/")
    chosen = MAIN_SCENARIO if MAIN_SCENARIO in scenarios or not scenarios else scenarios[0]
    stress = builder.section("stress", f"stress/{chosen}/summary.json", "stress")
    if stress is not None:
        if not isinstance(stress.get("bounds", []), list):
            del stress["bounds"]
        report["stress"] = {"scenario": chosen, **stress}
    for name in scenarios:
        if name != chosen:
            more = builder.section(f"scenarios.{name}", f"stress/{name}/summary.json", "stress")
            if more is not None:
                report.setdefault("scenarios", {})[name] = more

    report["drills"] = {}
    written = [name for name in CLUSTER_DRILLS if (root / drill_file(name)).exists()]
    for name in (*DRILLS, *written):
        drill = builder.section(f"drills.{name}", drill_file(name), f"drills.{name}")
        if drill is not None:
            report["drills"][name] = drill | {"bounds": _bounds(name, drill)}

    versions = _versions(rehearsal, *adapters.get(main, {}).values(), report.get("stress", {}))
    if versions:
        report["versions"] = versions
    else:
        absent["versions"] = "no part has written its versions"
    for key in ("machine", "started_at", "finished_at"):
        if rehearsal.get(key) is not None:
            report |= builder._clean({key: rehearsal[key]}, "rehearsal", "rehearsal.json")
    if builder.stages:
        report["stages"] = builder._clean(builder.stages, "stages", "rehearsal.json")
    if not (rehearsal or adapters) and ("stress" in report) != bool(report["drills"]):
        report["alone"] = True
        # Of what a load, or drills, by themselves do not mean to be.
        chain = {"stages", *ADAPTER_FILES, *(f"drills.{name}" for name in DRILLS if name not in report["drills"])}
        chain |= set() if "stress" in report else {"stress", "versions"}
        report["absent"] = dict(sorted((path, text) for path, text in absent.items() if path not in chain))
        report["verdict"] = _load_verdict(report["stress"]) if "stress" in report else _drills_verdict(report["drills"])
        return report
    report["verdict"] = _verdict(report, builder)
    report["absent"] = dict(sorted(absent.items()))
    return report


def _load_verdict(stress: Json) -> Json:
    """As `_verdict`, for a load without a chain; status is held, not_held or measured (no bounds were given)."""
    bounds = [bound for bound in stress.get("bounds", []) if isinstance(bound, dict)]
    broken = [bound for bound in bounds if not bound.get("held")]
    asked = f"{figure(stress.get('requests'))} requests, {figure(stress.get('failed'))} failed"
    notes = [figures.told(bound) for bound in bounds]
    if not bounds:
        return {
            "status": "measured",
            "headline": "The load is measured; no bounds were given",
            "text": asked,
            "notes": [],
        }
    held = f"{len(bounds) - len(broken)} of {len(bounds)} bounds held"
    headline = f"The load broke its bounds: {held}" if broken else f"The load kept its bounds: {held}"
    return {"status": "not_held" if broken else "held", "headline": headline, "text": asked, "notes": notes}


def _drills_verdict(drills: Json) -> Json:
    """As `_load_verdict`, for drills without a chain. One that could not be measured has not held."""
    bad = [
        name for name, drill in drills.items() if drill.get("failure") or not all(b["held"] for b in drill["bounds"])
    ]
    judged = len(bad) + sum(1 for name, drill in drills.items() if drill["bounds"] and name not in bad)
    held = f"{judged - len(bad)} of {judged} drills held their bounds"
    names = ", ".join(name.replace("_", " ") for name in bad)
    notes = _drill_notes(drills)
    if bad:
        return {"status": "not_held", "headline": f"Not held: {names}", "text": held, "notes": notes}
    if not judged:
        headline = "The drills are measured; no bounds were given"
        return {"status": "measured", "headline": headline, "text": f"{len(drills)} measured", "notes": notes}
    return {"status": "held", "headline": "The drills kept their bounds", "text": held, "notes": notes}


def _drill_notes(drills: Json) -> list[str]:
    """What of the drills did not go well, in words."""
    notes = []
    for name, values in drills.items():
        title = f"drill {name.replace('_', ' ')}"
        if values.get("failure"):
            notes.append(f"{title}: {values['failure']}")
        for bound in values["bounds"]:
            if not bound["held"] and "measured" in bound:
                notes.append(f"{title}: measured {figure(bound['measured'])}, wanted {bound['text']}")
    return notes


def drill_file(name: str, suffix: str = ".json") -> str:
    """Where the drill `name` has written."""
    return f"drills/{name.replace('_', '-')}{suffix}"


def _bounds(name: str, drill: Json) -> list[Json]:
    """What became of the drill's bounds, with words: those that it brought along, or those of `BOUNDS`."""
    given = drill.get("bounds")
    if not isinstance(given, list):
        given = [
            {"name": key, "at_most": most, "measured": value, "held": value <= most}
            for key, most in BOUNDS.get(name, {}).items()
            if number(value := drill.get(key)) and value is not None
        ]
    found = []
    for bound in given:
        if isinstance(bound, dict) and number(bound.get("at_most")) and isinstance(bound.get("held"), bool):
            words = BOUND_WORDS.get(str(bound.get("name")), f"{bound.get('name')} at most %g")
            kept = {key: value for key, value in bound.items() if key != "measured" or number(value)}
            found.append(kept | {"text": words % bound["at_most"]})
    return found


def _versions(*sources: Json) -> Json:
    found: Json = {}
    for source in sources:
        part = source.get("versions")
        if isinstance(part, dict):
            found |= {str(key): str(value) for key, value in part.items() if value is not None and key not in found}
    return dict(sorted(found.items()))


def _verdict(report: Json, builder: Builder) -> Json:
    """`{status, headline, text, notes}`; status is promoted, gate_failed, stopped or incomplete."""
    name, stop = report.get("main", "the adapter"), builder.stopped()
    evaluation, promotion = report.get("evaluation", {}), report.get("promotion")
    notes = [told(stop)] if stop and stop.get("status") != "gate_failed" else []
    nothing = not any("promotion" in parts for parts in report["adapters"].values())
    for other, parts in report["adapters"].items():
        if other != report.get("main") and get(parts, "evaluation.passed") is False:
            notes.append(f"{other} did not pass its gate and is not served: {get(parts, 'evaluation.verdict')}")
    notes += _drill_notes(report["drills"])
    if evaluation.get("passed") is False:
        text = str(evaluation.get("verdict") or "the interval of the gain is not above the gate's minimum")
        headline = f"{name} did not pass the gate" + ("; nothing was promoted" if nothing else " and is not promoted")
        return {"status": "gate_failed", "headline": headline, "text": text, "notes": notes}
    if promotion:
        headline = f"{name} beat its base and is promoted" if evaluation.get("passed") else f"{name} is promoted"
        headline += f"; the run stopped later, in stage {stop.get('name')}" if stop else ""
        return {"status": "promoted", "headline": headline, "text": str(evaluation.get("verdict", "")), "notes": notes}
    if stop:
        return {
            "status": "stopped",
            "headline": f"Stopped in stage {stop.get('name')}"
            + ("; nothing was promoted" if nothing else f"; {name} is not promoted"),
            "text": told(stop),
            "notes": [note for note in notes if note != told(stop)],
        }
    return {
        "status": "incomplete",
        "headline": f"{name} is not promoted: the chain is not complete",
        "text": builder.absent.get("promotion", ""),
        "notes": notes,
    }


# --- the page ---------------------------------------------------------------------------------------------------


def duration(seconds: Any) -> str:
    """Seconds for people: `0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 07 min`; a dash for what is no number."""
    if not number(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def figure(value: Any) -> str:
    """A number for people: about three significant digits, thousands apart; a dash for what is no number."""
    if not number(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def fixed(value: Any, form: str) -> str:
    """`value` in the printf form `form`; a dash for what is no number."""
    return form % value if number(value) else "–"


def pairs(value: Any) -> list[tuple[str, Any]]:
    """The items of a mapping; none of anything else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def listed(value: Any) -> str:
    """A text as it is, a list with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def clip(text: Any, limit: int = 2000) -> str:
    """A text of a dataset or model for the page: the first `limit` characters, and how many there are."""
    if not isinstance(text, str):
        return "–"
    return text if len(text) <= limit else f"{text[:limit]} […] ({len(text):,} characters)"


def episodes(folder: Folder, report: Json) -> list[Any]:
    """The loads and drills with their requests, in the order of time."""
    from stress.plots import Episode, Sent

    found = []
    files: list[tuple[str, str, Json]] = [
        (name, f"stress/{name}/requests.jsonl", {}) for name in folder.names("stress/*/")
    ]
    drills = report["drills"]
    files += [(n, drill_file(n, ".requests.jsonl"), drills.get(n, {})) for n in (*DRILLS, *CLUSTER_DRILLS)]
    for name, file, drill in files:
        sent = []
        for row in folder.lines(file):
            start, took, ttft = row.get("started_at"), row.get("latency_ms"), row.get("ttft_ms")
            if number(start):
                end = start + (took / 1000 if number(took) else 0.0)
                sent.append(Sent(start, end, ttft if number(ttft) else None, row.get("error") is not None))
        # beginning and end of a load are the edges of its plot
        events = [
            (event["at"], str(event.get("name")))
            for event in (drill["events"] if isinstance(drill.get("events"), list) else [])
            if isinstance(event, dict)
            and number(event.get("at"))
            and event.get("name") not in ("load started", "load ended")
        ]
        if sent:
            found.append(Episode(name, sent, events))
    return sorted(found, key=lambda episode: episode.start)


def _scores(evaluation: Json) -> tuple[list[Any], float]:
    """What `plots.evaluation` draws: the deciding metric first; metrics without an interval are left out."""
    from stress.plots import Score

    found = []
    metrics = [(evaluation.get("metric"), evaluation), *pairs(evaluation.get("also"))]
    for position, (name, values) in enumerate(metrics):
        if not isinstance(values, dict):
            continue
        interval = values.get("gain_ci95")
        if (
            name
            and all(number(values.get(key)) for key in ("base", "adapter"))
            and isinstance(interval, list)
            and _fits(interval, "interval")
        ):
            minimum = evaluation.get("min_gain") if position == 0 and number(evaluation.get("min_gain")) else None
            gain = values["gain"] if number(values.get("gain")) else values["adapter"] - values["base"]
            found.append(Score(str(name), values["base"], values["adapter"], gain, tuple(interval), minimum))
    confidence = evaluation.get("confidence")
    return found, confidence if isinstance(confidence, float) else 0.95


def _expected(drill: str, report: Json) -> bool:
    """Whether the report tells why this drill is missing."""
    return drill in DRILLS and not report.get("alone")


def render(root: Path, report: Json) -> str:
    """The self-contained page for `report`, with plots and examples from the files in `root`."""
    from stress import plots
    from stress.page import page

    folder = Folder(root)
    drawn: dict[str, str] = {}
    main = report.get("main", "")
    steps = [
        row
        for row in folder.lines(f"runs/{main}/events.jsonl")
        if all(number(row.get(key)) for key in ("step", "loss", "tokens_per_second"))
    ]
    if main and steps:
        drawn |= {"loss": plots.loss(steps), "speed": plots.speed(steps)}
    scores, confidence = _scores(report.get("evaluation", {}))
    if scores:
        drawn |= {"score": plots.scores(scores), "gain": plots.gain(scores, confidence)}
    shown = episodes(folder, report)
    if shown:
        drawn["timeline"] = plots.timeline(shown)
    series: dict[str, list[float]] = {"time to first token": [], "whole answer": []}
    if "stress" in report:
        start, end = (get(report, f"stress.window.{edge}") for edge in ("started_at", "ended_at"))
        start, end = start if number(start) else 0.0, end if number(end) else math.inf
        for row in folder.lines(f"stress/{report['stress']['scenario']}/requests.jsonl"):
            if row.get("error") is None and number(row.get("started_at")) and start <= row["started_at"] <= end:
                for key, name in (("ttft_ms", "time to first token"), ("latency_ms", "whole answer")):
                    if number(row.get(key)):
                        series[name].append(row[key])
    series = {name: values for name, values in series.items() if values}
    if series:
        drawn["latency"] = plots.latency(series)
    outage = get(report, "drills.outage.phases")
    if outage:
        drawn["phases"] = plots.phases(outage)

    samples: dict[str, list[Json]] = {}
    for name in report["adapters"]:
        evaluation, _ = folder.json(ADAPTER_FILES["evaluation"].format(name))
        rows = (evaluation or {}).get("samples")
        if isinstance(rows, list) and rows:
            samples[name] = [row for row in rows if isinstance(row, dict)]

    return page(
        Path(__file__).with_name("report.html.j2"), listed, clip, percent,
        plots=drawn,
        report=report,
        main=main,
        marks=[(episode.name, plots.marks(episode)) for episode in shown],
        samples=samples,
        drills=[name for name in (*DRILLS, *CLUSTER_DRILLS) if name in report["drills"] or _expected(name, report)],
        good=GOOD,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """`report OUT`: write report.json and report.html there; the exit code is about the writing, not the verdict."""
    parser = argparse.ArgumentParser("python -m stress report", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="the chain's output folder")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    if not out.is_dir():
        print(f"report: {out}: no such folder; give the one that the chain wrote into", file=sys.stderr)
        return exits.INPUT
    report = build(out)
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", render(out, report))
    print(f"{report['verdict']['headline']}\n{out / 'report.json'}\n{out / 'report.html'}")
    if report["absent"]:
        print(f"{len(report['absent'])} figures are absent; the report says why", file=sys.stderr)
    return exits.OK
