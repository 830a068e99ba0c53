"""vLLM's command line and environment for a serving spec, and a way to wait until it answers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from common.lora import vllm_lora_rank
from common.settings import SettingsError
from serving.spec import ServingSpec

log = logging.getLogger(__name__)

MIDDLEWARE = "serving.middleware.RequestLayer"


def vllm_command(
    spec: ServingSpec, *, host: str, port: int, adapters: Mapping[str, Path] | None = None, middleware: bool = True
) -> list[str]:
    """The command that serves `spec`; `adapters` (name to PEFT folder) are loaded at start.

    Each flag that differs from vLLM's default has its reason beside it.
    """
    slots = max(1, len(spec.adapters), len(adapters or {}))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", host, "--port", str(port)]
    command += ["--model", spec.base_model, "--served-model-name", spec.base_name]
    command += ["--dtype", spec.dtype, "--max-model-len", str(spec.max_model_len)]
    command += ["--max-num-seqs", str(spec.max_num_seqs)]
    if spec.gpus > 1:
        command += ["--tensor-parallel-size", str(spec.gpus)]
    command += ["--enable-lora", "--max-lora-rank", str(vllm_lora_rank(spec.max_lora_rank))]
    # While versions change, old and new of one adapter answer side by side: one slot more than adapters.
    command += ["--max-loras", str(slots + 1), "--max-cpu-loras", str(2 * slots + 1)]
    # By default one long prompt takes a whole step, for which all others wait. vLLM takes no more than the context.
    command += ["--long-prefill-token-threshold", str(min(spec.long_prefill_tokens, spec.max_model_len))]
    command += ["--long-prefill-token-threshold-adaptive"]
    # vLLM's default of 0 cuts every running stream at SIGTERM.
    command += ["--shutdown-timeout", str(spec.shutdown_timeout_seconds)]
    # Liveness and metrics are asked every few seconds; as log lines they would bury the requests.
    command += ["--disable-access-log-for-endpoints", "/health,/ready,/metrics"]
    # Between the tokens of a JSON schema a small model can go on with blanks until its answer is full.
    command += ["--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}']
    if spec.tool_call_parser:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
    if spec.device == "cpu":
        # No compiler is needed on the machine and the start is a minute shorter; tiny models gain nothing by it.
        command += ["--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(spec.cpu_kv_cache_mib * 2**20)]
    else:
        command += ["--gpu-memory-utilization", str(spec.gpu_memory_utilization)]
        command += capture_sizes(spec.max_num_seqs)
    if middleware:
        command += ["--middleware", MIDDLEWARE]
    if adapters:
        command += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in adapters.items())]
    return command


def graph_arguments(spec: ServingSpec) -> list[str]:
    """The arguments on which vLLM's compiled graphs may depend: those of `vllm_command`, wherever it listens."""
    return vllm_command(spec, host="", port=0, middleware=False)[3:]


def capture_sizes(max_num_seqs: int) -> list[str]:
    """The flag that captures CUDA graphs for batches of up to `max_num_seqs` tokens; none where vLLM captures no more.

    By default vLLM 0.32 (config/vllm.py, _set_cudagraph_sizes) captures batches of up to twice max_num_seqs tokens, at
    most 512 (1024 on a data centre's Blackwell): 1, 2, 4, every 8th below 256, every 16th above, and max_num_seqs. A
    batch that only decodes has at most max_num_seqs tokens; one with a prompt in it mostly exceeds the double as well.
    So the upper half costs start time and GPU memory, twice each for LoRA, and is hardly used. The sizes are named one
    by one, as a mere limit would leave max_num_seqs out where it is none of the steps.
    """
    if max_num_seqs > 512:
        return []
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return ["--cudagraph-capture-sizes", *(str(size) for size in steps if size < max_num_seqs), str(max_num_seqs)]


def vllm_environment(spec: ServingSpec, *, state: Path | None = None, api_keys: Path | None = None) -> dict[str, str]:
    """Environment variables that `vllm_command` needs on top of the process's own.

    `DRYDOCK_CACHE` in the process's own names the one folder that may be written to.
    """
    variables = {
        "VLLM_NO_USAGE_STATS": "1",  # nothing leaves the cluster
        "VLLM_MAX_N_SEQUENCES": "64",  # the default lets one request ask for 16384 answers
        "VLLM_PLUGINS": "",  # no adapter resolver: adapters come from the sidecar alone
        "HF_HUB_OFFLINE": "1",  # a mistyped path must fail, not be looked up on a hub
    }
    if state is not None:
        variables |= {
            "DRYDOCK_STATE": str(state.resolve()),
            "DRYDOCK_BASE_NAME": spec.base_name,
            "DRYDOCK_MAX_REQUEST_BYTES": str(spec.max_request_kib * 1024),
            "DRYDOCK_MAX_MODEL_LEN": str(spec.max_model_len),
            "DRYDOCK_MAX_NUM_SEQS": str(spec.max_num_seqs),
            "DRYDOCK_STALL_SECONDS": str(spec.stall_seconds),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # the request layer lets only the sidecar through
            "VLLM_LOGGING_STREAM": "ext://serving.startup.STREAM",  # notes the phases of the start as they are logged
        }
    if api_keys is not None:
        # Not resolved: a Secret's files are links, which lead elsewhere after each change of it.
        variables["DRYDOCK_API_KEYS"] = str(api_keys.absolute())
    if "DRYDOCK_CACHE" in os.environ:
        variables |= cache_environment(Path(os.environ["DRYDOCK_CACHE"]))
    if spec.device == "cpu":
        variables |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" pins to the first core: two replicas would share it
            "OMP_NUM_THREADS": "1",  # more threads than cores spin against each other
        }
    return variables


def cache_environment(folder: Path) -> dict[str, str]:
    """Variables that send whatever vLLM and the libraries below it write into `folder`, whose `tmp` is made here.

    For a container with a read-only root, run by a user that has no home and no entry in /etc/passwd. TRITON_CACHE_DIR
    is left alone: unless it is set, vLLM keeps Triton's kernels beside the compiled graphs that use them.
    """
    folder = folder.absolute()
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(folder),  # for libraries that know none of the variables below
        "USER": "drydock",  # getpass.getuser() asks /etc/passwd, and fails, where neither of these two is set
        "LOGNAME": "drydock",
        "TMPDIR": str(folder / "tmp"),  # sockets between vLLM's processes
        "XDG_CACHE_HOME": str(folder / "xdg"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),  # compiled graphs: what makes the next start short
        "VLLM_CONFIG_ROOT": str(folder / "config" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
        "HF_HOME": str(folder / "huggingface"),
    }


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], url: str, *, timeout_seconds: float, output: Path | None
) -> Iterator[float]:
    """vLLM by `command` for as long as the block lasts; yields the seconds until `url`/health answered.

    What it says goes into the file `output`, or is shown. Raises `SettingsError` where it ends before it answers.
    """
    from common.processes import die_with_parent  # not on a deployer's machine, who only asks for arguments

    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") if output else nullcontext() as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True, preexec_fn=die_with_parent
        )
        try:
            try:
                seconds = wait_until_ok(
                    f"{url}/health", timeout_seconds=timeout_seconds, alive=lambda: process.poll() is None
                )
            except RuntimeError as error:
                told = [f"vLLM did not start: {error}" + (f"; the end of {output}:" if output else "")]
                told += output.read_text(errors="replace").splitlines()[-15:] if output else []
                raise SettingsError(told) from error
            log.info("vLLM is ready after %.0f s", seconds)
            yield seconds
        finally:
            with suppress(ProcessLookupError):  # where nothing of it is left
                # The whole group: vLLM's engine processes must not outlive their server.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ok(url: str, *, timeout_seconds: float, alive: Callable[[], bool] = lambda: True) -> float:
    """Seconds until `url` answered 200. Raises RuntimeError when `alive()` turns false, TimeoutError at the end."""
    started = time.monotonic()
    while not is_ok(url):
        if not alive():
            raise RuntimeError(f"the process ended before {url} answered")
        if time.monotonic() - started > timeout_seconds:
            raise TimeoutError(f"{url} did not answer 200 within {timeout_seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - started


def is_ok(url: str) -> bool:
    """Whether `url` answers 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
