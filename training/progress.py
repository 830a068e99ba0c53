"""Shows a tuning run while it runs: a bar or log lines for people, `/metrics` for Prometheus, events for the report."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines when nobody watches a terminal


@dataclass(frozen=True)
class Measurement:
    """One look at the run. `loss` is the mean per answer token (nats) since the last look, `tokens_per_second` counts
    every non-padding token through the model over the same time, `eta_seconds` is to the last step."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    elapsed_seconds: float
    eta_seconds: float


class Progress:
    """Publishes measurements in all forms at once; use as a context manager."""

    def __init__(self, adapter: str, total_steps: int, events: Path, metrics_address: str | None) -> None:
        self._registry = CollectorRegistry()
        self._gauges = {
            name: Gauge(f"drydock_tuning_{name}", text, ["adapter"], registry=self._registry)
            for name, text in {
                "step": "Optimiser steps done.",
                "total_steps": "Optimiser steps in all.",
                "epoch": "Passes over the tuning split so far.",
                "loss": "Mean loss per answer token in nats since the last measurement.",
                "learning_rate": "Learning rate of the last step.",
                "gradient_norm": "Norm of the last gradient before clipping.",
                "tokens_per_second": "Tokens without padding through the model per second.",
                "elapsed_seconds": "Seconds spent on this run, earlier attempts included.",
                "eta_seconds": "Seconds until the last step at the present speed.",
                "dropped_rows": "Rows longer than max_seq_length, which were left out.",
            }.items()
        }
        self._adapter = adapter
        self._events = events.open("a", encoding="utf-8")
        self._address = metrics_address
        self._last_line = 0.0
        self._bar = tqdm(total=total_steps, unit="step", desc=f"tune {adapter}", disable=not sys.stderr.isatty())

    def __enter__(self) -> Self:
        self._server = None
        if self._address:
            host, _, port = self._address.rpartition(":")
            try:
                self._server, _ = start_http_server(int(port), host or "127.0.0.1", registry=self._registry)
                log.info("metrics on http://%s/metrics", self._address)
            except OSError as error:  # a run of hours is not lost to a busy port, but nobody shall wonder
                log.warning("no metrics: %s is not free (%s); choose another --metrics-address", self._address, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._events.close()
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def dropped(self, rows: int) -> None:
        self._gauges["dropped_rows"].labels(self._adapter).set(rows)

    def resumed(self, step: int) -> None:
        self._bar.update(step)

    def step(self) -> None:
        self._bar.update(1)

    def show(self, now: Measurement) -> None:
        """Publish `now`. The loss of a run without answer tokens would be no number; such a run never starts."""
        values = asdict(now)
        for name, value in values.items():
            self._gauges[name].labels(self._adapter).set(value)
        self._events.write(json.dumps(values, allow_nan=False) + "\n")
        self._events.flush()
        self._bar.set_postfix_str(f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s")
        due = time.monotonic() - self._last_line >= LINE_SECONDS or now.step == now.total_steps
        if self._bar.disable and due:
            self._last_line = time.monotonic()
            log.info(
                "step %d/%d  epoch %.2f  loss %.3f  %.0f tokens/s  ETA %d s",
                now.step, now.total_steps, now.epoch, now.loss, now.tokens_per_second, round(now.eta_seconds),
            )  # fmt: skip
