"""Start and end of a script: after a refusal or Ctrl-C it prints at most one line, and no traceback."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gallery.refused import Refused


def command(run: Callable[[], int]) -> int:
    """Runs a script and returns its exit status: 2 if refused, 130 after Ctrl-C, 141 if stdout is closed, else `run`'s.

    `run` imports what it needs. Until it calls `raise_on_ctrl_c`, Ctrl-C ends the process at once: an interrupted
    import ends in any kind of traceback, and nothing is written yet.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell ignores the signal
        signal.signal(signal.SIGINT, _leave)
    try:
        try:
            status = run()
        except SystemExit as stop:  # of argparse
            status = stop.code if isinstance(stop.code, int) else 0
        except Refused as refused:
            print(f"{os.path.basename(sys.argv[0])}: {refused}", file=sys.stderr)
            status = 2
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both once more
            os.dup2(nowhere, stream.fileno())
        return 141


def raise_on_ctrl_c() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, so that no file is left half written."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os._exit(130)


def set_wait_policy(options: argparse.Namespace) -> None:
    """Before torch is imported: beside a busy process, torch's OpenMP threads sleep while they wait for each other.

    By default they spin, which is several times slower where another process wants the same cores
    (benchmarks/scripts.py). The user's own settings stay, and so do a real model's threads where there is a GPU.
    """
    gpu = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))  # NVIDIA's, AMD's, in WSL
    named = os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    on_cpu = options.model == "demo" or options.device == "cpu" or not gpu
    if on_cpu and not named and _running_processes() > 1:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _running_processes() -> int:
    """The threads on this machine that run or are ready to run, this one included: the median of five readings.

    The load average follows only after a minute. 0 on other systems than Linux.
    """
    found = [0] * 5
    with contextlib.suppress(OSError):
        for i in range(5):
            found[i] = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
            time.sleep(0.004)
    return sorted(found)[2]
