"""Shows a tuning run while it runs: a bar or log lines, `/metrics` for Prometheus, TensorBoard's files, events."""

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
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import logs

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines when nobody watches a terminal
TENSORBOARD = "tensorboard"  # the folder of its files, beside the events


@dataclass(frozen=True)
class Measurement:
    """One look at the run. `loss` is the mean per answer token (nats) since the last look, `tokens_per_second` counts
    every token through the model over the same time (rows are packed, so that none is padding), `eta_seconds` is to the
    last step. `pass_fill` is the share of a forward pass's room for tokens that was used, `gpu_memory_bytes` the
    allocator's peak; None where there is none to tell."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    elapsed_seconds: float
    eta_seconds: float
    pass_fill: float | None = None
    gpu_memory_bytes: int | None = None

    def figures(self) -> dict[str, float]:
        """What there is to tell, under the names that all forms share."""
        return {name: value for name, value in asdict(self).items() if value is not None}


METRICS = {
    "step": "Optimiser steps done.",
    "total_steps": "Optimiser steps in all.",
    "epoch": "Passes over the tuning split so far.",
    "loss": "Mean loss per answer token in nats since the last measurement.",
    "learning_rate": "Learning rate of the last step.",
    "gradient_norm": "Norm of the last gradient before clipping.",
    "tokens_per_second": "Tokens through the model per second; rows are packed, so none of them is padding.",
    "elapsed_seconds": "Seconds spent on this run, earlier attempts included.",
    "eta_seconds": "Seconds until the last step at the present speed.",
    "pass_fill": "Share from 0 to 1 of the room for tokens in a forward pass that was used.",
    "gpu_memory_bytes": "Most GPU memory that this process has had allocated; absent on a CPU.",
    "dropped_rows": "Rows longer than max_seq_length, which were left out.",
    "checkpoint_step": "Optimiser step of the newest checkpoint; absent before the first.",
    "checkpoint_timestamp_seconds": "When it was written, as Unix time.",
}
"""The names after `drydock_tuning_`, with their help text. Those of `Measurement` carry its figures."""

CURVES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "epoch", "pass_fill", "gpu_memory_bytes")
"""What TensorBoard shows over the step."""


class Progress:
    """Publishes measurements in all forms at once; use as a context manager."""

    def __init__(self, adapter: str, total_steps: int, events: Path, metrics_address: tuple[str, int] | None) -> None:
        self._registry = CollectorRegistry()
        self._gauges = {
            name: Gauge(f"drydock_tuning_{name}", text, ["adapter"], registry=self._registry)
            for name, text in METRICS.items()
        }
        self._adapter = adapter
        self._events = events.open("a", encoding="utf-8")
        self._board_folder, self._done_before = events.parent / TENSORBOARD, 0
        self._board: SummaryWriter | None = None
        self._address = metrics_address
        self._last_line = 0.0
        self._bar = tqdm(
            total=total_steps, unit="step", desc=f"tune {adapter}", disable=logs.wants_json() or not sys.stderr.isatty()
        )

    def __enter__(self) -> Self:
        self._server = None
        if self._address:
            host, port = self._address
            try:
                self._server, _ = start_http_server(port, host, registry=self._registry)
                log.info("metrics on http://%s:%d/metrics", host, port)
            except OSError as error:  # a run of hours is not lost to a busy port, but nobody shall wonder
                log.warning("no metrics: %s:%d is not free (%s); choose another --metrics-address", host, port, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._events.close()
        if self._board:
            self._board.close()
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def dropped(self, rows: int) -> None:
        self._set("dropped_rows", rows)

    def resumed(self, step: int) -> None:
        """The run goes on after `step`; what a lost attempt showed of later ones no longer counts."""
        self._done_before = step
        self._bar.update(step)
        if step:
            self._set("checkpoint_step", step)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is written."""
        self._set("checkpoint_step", step)
        self._set("checkpoint_timestamp_seconds", time.time())

    def step(self) -> None:
        self._bar.update(1)

    def show(self, now: Measurement) -> None:
        """Publish `now`. The loss of a run without answer tokens would be no number; such a run never starts."""
        values = now.figures()
        self._events.write(json.dumps(values, allow_nan=False) + "\n")
        self._events.flush()
        for name, value in values.items():
            self._set(name, value)
        self._draw(now.step, values)
        self._bar.set_postfix_str(f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s")
        due = time.monotonic() - self._last_line >= LINE_SECONDS or now.step == now.total_steps
        if self._bar.disable and due:
            self._last_line = time.monotonic()
            log.info(
                "step %d/%d  epoch %.2f  loss %.3f  %.0f tokens/s  ETA %d s",
                now.step, now.total_steps, now.epoch, now.loss, now.tokens_per_second, round(now.eta_seconds),
                extra={"figures": values},
            )  # fmt: skip

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].labels(self._adapter).set(value)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        """Add to TensorBoard's files; each attempt writes one of its own, and they are read as one run."""
        if self._board is None:
            self._board = SummaryWriter(
                str(self._board_folder),
                purge_step=self._done_before + 1,  # hides what a lost attempt wrote of the steps from here on
                flush_secs=int(LINE_SECONDS),
                filename_suffix=f".{time.time_ns()}",  # its own name has seconds, and a run may be started twice in one
            )
        for name in CURVES:
            if name in values:
                self._board.add_scalar(name, values[name], step)
