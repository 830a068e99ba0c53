"""Exit codes of every entry point; the cluster's `podFailurePolicy` acts on the same numbers."""

import signal

OK = 0
FAILED = 1  # something broke that a retry may heal
INPUT = 2  # the person's dataset, settings or arguments are wrong: a retry cannot help (argparse uses 2 as well)
GATE = 3  # an adapter did not beat its base, a load did not keep its bounds: a retry cannot help
INTERRUPTED = 130  # SIGINT, by the shell's convention 128 + 2
TERMINATED = 143  # SIGTERM, 128 + 15: a checkpoint was written, run again to resume


def stopped(stop: KeyboardInterrupt) -> int:
    """The code of a command that a signal ended, by what `common.processes.interrupt` made of it."""
    return TERMINATED if signal.SIGTERM in stop.args else INTERRUPTED
