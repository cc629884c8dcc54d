"""Where the time of a run goes: its parts by name, and a trace of chosen steps for a profiler."""

import contextlib
import tempfile
import time
from collections.abc import Iterator

import jax

from llm_jax.storage import Path, is_remote, upload

PARTS = ("start", "compile", "input", "step", "evaluation", "checkpoint")
"""From the command to the first batch, that wait included; the first step; waiting for rows; the other steps; evaluations; what saves hold the loop up"""


class Times:
    """Seconds by part. What is measured inside of another part counts for itself alone."""

    def __init__(self, begin: float):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.seconds["start"] = time.time() - begin
        self.inner = 0.0

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens in here.

        >>> times = Times(time.time())
        >>> with times.of("step"):
        ...     with times.of("input"):
        ...         time.sleep(0.02)
        >>> times.seconds["input"] >= 0.02 > times.seconds["step"]
        True
        """
        outer, self.inner, begin = self.inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - begin
            self.seconds[part] += passed - self.inner
            self.inner = outer + passed


class Trace:
    """Traces the steps from `first` to `last`, both included, into a folder that XProf or TensorBoard opens; (0, 0) traces none."""

    def __init__(self, folder: Path, steps: tuple[int, int]):
        self.folder, (self.first, self.last) = folder / "profile", steps
        self.running = False
        # The profiler writes to a disk; what goes into a bucket is copied there when it is done.
        self.written = tempfile.TemporaryDirectory() if self.last and is_remote(folder) else None

    def before(self, step: int) -> None:
        """Begin where the first step is due, or was passed before a resume."""
        if not self.running and self.last and self.first <= step <= self.last:
            jax.profiler.start_trace(self.written.name if self.written else str(self.folder))
            self.running = True

    def after(self, step: int, state: object) -> None:
        """End after the last step is done."""
        if self.running and step >= self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End, also in the middle."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            if self.written:
                upload(self.written.name, self.folder)
                self.written.cleanup()
