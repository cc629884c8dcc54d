"""What a run says: metrics.jsonl, TensorBoard, a progress bar, and a picture of the curves. Reads nothing but numbers."""

import json
import math
import os
import sys
import time
from typing import Any

from llm_jax.storage import PACKAGES, Growing, Path, as_path, is_remote, write_whole


class Metrics:
    """Writes the metrics of a run as they come; a resumed run continues the files at its step. A silent one writes nothing."""

    def __init__(self, folder: Path, start: int, steps: int, silent: bool = False):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        path = as_path(os.devnull if silent else folder / "metrics.jsonl")
        self._file = Growing(path, b"" if silent else keep_until(path, start))
        self._boards = _Boards()
        writer = _summary_writer()
        if is_remote(folder):
            self._boards.register()
        self._board = writer(
            str(folder / "tensorboard"),
            purge_step=start + 1,
            flush_secs=30,
            filename_suffix=f".{start}",
            write_to_disk=not silent,
        )
        self._lines = not silent and not sys.stderr.isatty()
        self._console = Console(stderr=True, quiet=silent)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=silent or self._lines,
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, said="")
        self._said = 0.0
        self._bar.start()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One object a step, in metrics.jsonl and on the board; what is not finite is null in the one and left out on the other."""
        plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self._file.write((json.dumps({"step": step, **plain}) + "\n").encode())
        self._file.flush()
        for name, value in plain.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar; without a terminal a line now and then."""
        said = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, completed=step, said=said)
        if self._lines and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            print(f"step {step}  {said}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def sync(self) -> None:
        """Have all that was written in the files, so that a run that goes on from here finds it."""
        self._board.flush()
        for file in (self._file, *self._boards.files):
            file.sync()

    def close(self) -> None:
        """Flush and release the files."""
        self._bar.stop()
        self._file.close()
        self._board.close()


class _Boards:
    """Event files in a bucket, in the interface by which tensorboardX opens what is on no disk."""

    def __init__(self) -> None:
        self.files: list[Growing] = []

    def register(self) -> None:
        """Have tensorboardX, once imported, open such files by this."""
        from tensorboardX import record_writer

        for scheme in PACKAGES:
            record_writer.register_writer_factory(scheme, self)

    def open(self, path: str) -> Growing:
        self.files.append(Growing(path))
        return self.files[-1]

    def directory_check(self, path: str) -> None:
        """A bucket has no folders to make."""


def _summary_writer() -> Any:
    """tensorboardX's writer, without torch: where that is installed it would be loaded, which takes seconds, and never used."""
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules |= hidden  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter


def keep_until(path: Path, step: int) -> bytes:
    """Drop the lines of a metrics file beyond a step, and a last line that was cut short: what was written after the checkpoint. Returns the rest."""
    if not path.exists():
        return b""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] > step:
            break
        kept.append(line + "\n")
    rest = "".join(kept).encode()
    write_whole(path, rest)
    return rest


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file."""
    return [json.loads(line) for line in as_path(path).read_text(encoding="utf-8").splitlines()]


def draw_curves(folder: Path) -> Path:
    """curves.png: training and held-out loss, and the learning rate, over the steps."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's affair

    entries = read(folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    apart = sorted({name for e in entries for name in e if name.startswith("eval/loss/")})
    drawn: list[tuple[str, str, dict[str, Any]]] = [
        ("loss", "training", dict(color="0.6", linewidth=1)),
        ("eval/loss", "held out", dict(color="C0", marker="o")),
        *((name, f"held out, {name.removeprefix('eval/loss/')}", dict(marker="o")) for name in apart),
    ]
    for name, label, style in drawn:
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        if points:
            top.plot(*zip(*points), label=label, **style)
    top.set_ylabel("loss (nats a token)")
    if top.lines:
        top.legend(frameon=False)
    rates = [(e["step"], e["learning_rate"]) for e in entries if "learning_rate" in e]
    if rates:
        bottom.plot(*zip(*rates), color="C1")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    with (folder / "curves.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return folder / "curves.png"
