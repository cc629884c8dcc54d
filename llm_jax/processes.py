"""The processes of a run on several hosts: how they meet, and how all of them end when one dies, hangs, fails or is told to stop.

What they tell each other of their data and results is in `platform.gather`. A run of one process has none of this but the answer to SIGTERM.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax

from llm_jax.errors import UserError

PATIENCE = 120.0
"""Seconds without a sign of life, or behind the others, after which a process is given up; LLM_JAX_PATIENCE says another number"""
COMPILING = 10
"""Times that patience with a process in its first step: one may have to compile what others find in a cache"""
MEETING = 3
"""Times that patience for all processes to be there: hosts do not start in the same moment"""
LOST = 75
"""Exit status of a process whose run has lost another one: EX_TEMPFAIL, to be tried again"""
STOPPED = 143
"""Exit status of a run that was told to stop, 128 + SIGTERM"""

ENDS = "ends: "
"""State of a process that gives up a lost one, and why"""
BOARD = "llm_jax/processes/"
"""Where in the store that the processes share each writes how it is"""


class Stopped(UserError):
    """SIGTERM came, and the run saved what it had."""

    status = STOPPED


def join() -> "_Watch | None":
    """Meet the other processes of this run, where the environment tells of any; before a device is touched.

    Returns what from then on watches the others, for `together`; None for a run of one process.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID tell of them on any machine; a Cloud TPU (also GKE,
    also several slices), SLURM's srun and Open MPI's mpirun tell by themselves.

    Raises:
        UserError: they do not all come within three times the patience.
    """
    if not jax.distributed.is_initialized():
        if not _several():
            return None
        _meet()
    return _Watch(patience()) if _known().num_processes > 1 else None


def _known() -> Any:
    """What jax knows of its processes before a device is touched, which has no public name."""
    from jax._src import distributed

    return distributed.global_state


def _meet() -> None:
    explicit: dict[str, Any] = {}
    allowed, wait = MEETING * patience(), int(2 * patience()) + 30
    # The runtime would abort without a word of what it waited for, as its own heartbeat does: both come after ours.
    late = threading.Timer(allowed, _absent, [allowed])
    late.daemon = True
    late.start()
    try:
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if variable in os.environ:
                explicit[name] = int(os.environ[variable])
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=math.ceil(allowed) + 30,
            heartbeat_timeout_seconds=wait,
            shutdown_timeout_seconds=wait,
        )
    except (RuntimeError, ValueError, TypeError) as e:
        raise UserError(f"the processes of this run do not find each other: {str(e).splitlines()[0]}") from e
    finally:
        late.cancel()


def _absent(seconds: float) -> NoReturn:
    """End this process, since it waits for others that do not come."""
    known = _known()
    print(
        f"error: process {known.process_id} of {known.num_processes} has waited {seconds:g} s for the others to come, and ends: one of them died "
        f"before, or does not reach process 0 at {known.coordinator_address}; start the same command again on all hosts",
        file=sys.stderr,
        flush=True,
    )
    _exit(LOST)


def _several() -> bool:
    """Whether the environment tells of more than one process, or may know of more (a Cloud TPU host)."""
    told = os.environ
    if "JAX_COORDINATOR_ADDRESS" in told or "MEGASCALE_COORDINATOR_ADDRESS" in told:
        return True
    if "," in told.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    if "SLURM_PROCID" in told and "SLURM_STEP_NODELIST" in told:
        return int(told.get("SLURM_NTASKS", "1")) > 1
    if "OMPI_MCA_orte_hnp_uri" in told:
        return int(told.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    on_tpu = any(Path("/dev").glob("accel*")) or (told.get("PJRT_DEVICE") == "TPU")
    return on_tpu and "TPU_SKIP_MDS_QUERY" not in told and not told.get("JAX_PLATFORMS", "").startswith("cpu")


def patience() -> float:
    """Seconds after which a process is given up.

    Raises:
        UserError: LLM_JAX_PATIENCE is no number above 0.
    """
    told = os.environ.get("LLM_JAX_PATIENCE", "")
    try:
        seconds = float(told or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"LLM_JAX_PATIENCE is {told!r}: it must be a number of seconds above 0")
    return seconds


class Together:
    """This process among those of its run."""

    def __init__(self, watch: "_Watch | None") -> None:
        self.told = False
        self.watch = watch

    def begin(self, step: int) -> None:
        """Say that this process begins a step, in which it will wait for the others."""
        if self.watch is not None:
            self.watch.compiled = self.watch.at > 0
            self.watch.at = step

    def stopping(self, step: int) -> bool:
        """Whether the run is to stop after this step because SIGTERM came to any of its processes: the same answer on all of them."""
        if self.watch is None:
            return self.told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def together(watch: "_Watch | None") -> Iterator[Together]:
    """The processes of a run while it lasts: an error of one is told to the others, which then end, as they do when it dies or hangs.

    Args:
        watch: what `join` gave.
    """
    own = Together(watch)
    before: Any = None
    alone = own.watch is None and threading.current_thread() is threading.main_thread()

    def tell(*_: Any) -> None:
        own.told = True

    if alone:  # of several, jax's own handler tells all
        before = signal.signal(signal.SIGTERM, tell)
    try:
        yield own
        _leave(own, "done")
    except Stopped:
        _leave(own, "done")
        raise
    except BaseException as e:
        if own.watch is not None and _of_runtime(e):
            own.watch.blame()  # a collective fails at once where a process is gone: which one, the watch knows soon
        _leave(own, f"failed: {(str(e).splitlines() or [type(e).__name__])[0]}")
        if own.watch is not None and not isinstance(e, UserError):
            traceback.print_exc()
            _exit(1)  # at its end the interpreter would wait for the others, which end without a word
        raise
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


def _of_runtime(error: BaseException | None) -> bool:
    """Whether an error is one of the runtime, or came from one, as of a checkpoint that could not be written without the others."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    return error is not None


def _leave(own: Together, state: str) -> None:
    if own.watch is not None:
        own.watch.leave(state)


def end(status: int) -> int:
    """The exit status of a command that failed; one of several processes ends at once, since the others, told of it, are not to be waited for.

    Those that were told to stop end together, as at the end of a run: the runtime aborts a process whose coordinator leaves without it.
    """
    if status != STOPPED and _known().num_processes > 1:
        _exit(status)
    return status


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Watch:
    """A thread that writes how this process is, reads how the others are, and ends this one when one of them is lost.

    It ends it without unwinding: the main thread may wait for ever in a collective.
    """

    def __init__(self, patience: float):
        known = _known()
        self.store: Any = known.client
        self.patience, self.pause = patience, min(5.0, patience / 8)
        self.me, self.count = known.process_id, known.num_processes
        self.at, self.compiled, self.beats, self.state = 0, False, 0, "runs"
        self.known: dict[int, tuple[dict[str, Any], float, float]] = {}
        """of each process what it wrote last, and when it last wrote and last went on, by this process's clock"""
        self.lock, self.over = threading.Lock(), threading.Event()
        self.write()
        self.thread = threading.Thread(target=self.run, name="processes", daemon=True)
        self.thread.start()

    def write(self) -> None:
        """Say how this process is."""
        with self.lock:
            self.beats += 1
            told = {
                "beats": self.beats,
                "at": self.at,
                "compiled": self.compiled,
                "state": self.state,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            self.store.key_value_set(f"{BOARD}{self.me}", json.dumps(told), True)

    def run(self) -> None:
        """Until this process leaves."""
        heard = time.monotonic()
        while not self.over.wait(self.pause):
            try:
                self.write()
                told = {int(key.rpartition("/")[2]): json.loads(x) for key, x in self.store.key_value_dir_get(BOARD)}
                heard = time.monotonic()
            except jax.errors.JaxRuntimeError:  # the store lives in process 0
                if time.monotonic() - heard > self.patience / 2 and not self.over.is_set():
                    self.give_up("process 0, where all meet, is gone")
                continue
            if lost := self.judge(told, heard):
                self.give_up(lost)

    def judge(self, told: dict[int, dict[str, Any]], now: float) -> str:
        """Which process is lost and why; empty if none is."""
        for process in range(self.count):
            new = told.get(process, {"beats": 0, "at": 0, "compiled": False, "state": "runs", "host": "?", "pid": "?"})
            old, wrote, went = self.known.get(process, (new, now, now))
            wrote = now if new["beats"] != old["beats"] else wrote
            went = now if new["at"] != old["at"] else went
            self.known[process] = new, wrote, went
        furthest = max(x["at"] for x, _, _ in self.known.values())
        for process, (x, wrote, went) in self.known.items():
            name = f"process {process} of {self.count} ({x['host']}, pid {x['pid']})"
            if x["state"].startswith(ENDS):
                return x["state"].removeprefix(ENDS)
            if x["state"].startswith("failed"):
                return f"{name} {x['state']}"
            if x["state"] == "done":
                continue
            if now - wrote > self.patience:
                return f"{name} gave no sign of life for {self.patience:g} s: it died or its host did"
            # The others wait in the step that it has not begun since the first of them has
            begun = min((w for y, _, w in self.known.values() if y["at"] == furthest), default=now)
            allowed = self.patience * (1 if x["compiled"] else COMPILING)
            if x["at"] < furthest and now - max(went, begun) > allowed:
                return (
                    f"{name} has not begun step {x['at'] + 1} for {allowed:g} s, and the others wait for it: it hangs"
                )
        return ""

    def give_up(self, why: str) -> NoReturn:
        """End this process with an error that names the lost one; the one that holds the store last, so that all others read why."""
        self.leave(f"{ENDS}{why}")
        print(
            f"error: {why}. Process {self.me} ends; start the same command again on all hosts to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self.me == 0:
            time.sleep(3 * self.pause)
        _exit(LOST)

    def blame(self) -> None:
        """Wait for the watch to find out who is lost, which ends this process; return if all are well."""
        self.thread.join(2 * self.patience)

    def leave(self, state: str) -> None:
        """Say that this process is done or has failed, and watch no more."""
        self.over.set()
        self.state = state
        try:
            self.write()
        except jax.errors.JaxRuntimeError:
            return  # nobody is there to be told
