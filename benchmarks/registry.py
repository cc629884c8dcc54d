"""Claims: after 200 SIGKILLs among 8 writers no name is torn or missing and no line lost; 8 writers at once lose and repeat none.

    python -m benchmarks.registry [--kills 200] [--moves 100] [--dry]

All writers move one name: forced promotions, rollbacks, and promotions past a gate, which the others' moves may spoil. A writer says of each move
when it is done. Several are killed at once, at random moments, often the one that holds the lock; then the log is held against what was said: each
move once, each from where the one before it went, each gate that was needed passed; the model that the name stands for is read and verified, and
the files of all that were promoted are compared with their sources. A reader asks meanwhile, without pause, where the name stands.
"""

import argparse
import collections
import contextlib
import dataclasses
import filecmp
import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import claim, write
from llm_jax import checkpoint, names
from llm_jax.errors import UserError
from llm_jax.lifecycle.registry import Registry, versions

NAME = "production"
MODELS = 24
AT_ONCE = 4
"""Writers that are killed together"""
ROUND = 20
"""Kills of a registry, then comes a new one, so that models are kept anew"""

WRITER = """
import os, random, sys, uuid
from llm_jax.lifecycle.registry import Registry, RegistryError
folder, said, seed, count, *models = sys.argv[1:]
registry, rng, left = Registry(folder), random.Random(int(seed)), int(count)
hashes = dict(model.split("=") for model in models)
said = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while left:
    token, kind, (content, path) = uuid.uuid4().hex, rng.random(), rng.choice(list(hashes.items()))
    try:
        if kind < 0.4:
            made = registry.promote("production", path, force=True, why=token)
        elif kind < 0.6:
            made = registry.rollback("production", token)
        else:
            verdict = {"candidate": content, "incumbent": registry.resolve("production").hash, "suite": "none"}
            registry.record_gate({**verdict, "passed": rng.random() < 0.8, "reasons": ["chance"], "writer": token})
            made = registry.promote("production", path, why=token)
    except RegistryError:  # refused by the gate, or nothing to roll back to
        continue
    if made.entry["why"] == token:  # else it stood there already
        os.write(said, token.encode() + b"\\n")
        left -= 1
assert "jax" not in sys.modules
"""


def make_models(folder: Path, count: int = MODELS) -> dict[str, Path]:
    """So many small checkpoints by their content hash."""
    for i in range(count):
        checkpoint.save_params(folder / f"model{i}", {"w": jnp.full(8, i, jnp.float32)}, {"name": f"model{i}"}, "{}")
    return {checkpoint.read_card(path)["hashes"]["params"]: path for path in sorted(folder.iterdir())}


@dataclasses.dataclass
class Trial:
    """A registry, its writers, and what is wrong with it."""

    folder: Path
    models: dict[str, Path]
    faults: list[str] = dataclasses.field(default_factory=list)
    writers: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)
    kills: int = 0
    reads: int = 0
    torn: int = 0
    """kills after which a line without its end, or a model half kept, was left"""

    def __post_init__(self):
        self.folder.mkdir()
        self.registry = Registry(self.folder / "registry")
        self.registry.promote(NAME, next(iter(self.models.values())), force=True, why="first")

    def begin(self, seed: int, count: int) -> None:
        """Start a writer."""
        models = [f"{content}={path}" for content, path in self.models.items()]
        files = (self.registry.folder, self.folder / "said")
        command = [sys.executable, "-c", WRITER, *map(str, (*files, seed, count)), *models]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with (self.folder / "errors").open("ab") as errors:
            self.writers.append(subprocess.Popen(command, env=environment, stderr=errors))

    def kill(self, count: int, rng: random.Random) -> None:
        """End so many writers at once."""
        chosen = rng.sample(self.writers, count)
        for writer in chosen:
            writer.send_signal(signal.SIGKILL)
        for writer in chosen:
            writer.wait()
            self.writers.remove(writer)
        self.kills += count
        content = (self.registry.folder / names.MOVES).read_bytes()
        self.torn += not content.endswith(b"\n") or any((self.registry.folder / "models").glob("*.part"))

    def wait(self, moves: int) -> None:
        """Return when so many moves are said to be done."""
        begin = time.monotonic()
        while len(self.said()) < moves:
            if time.monotonic() - begin > 60:
                raise TimeoutError(f"no move in a minute: {(self.folder / 'errors').read_text()[-500:]}")
            time.sleep(0.01)

    def said(self) -> list[str]:
        """The moves that writers said were done."""
        return (self.folder / "said").read_text().split() if (self.folder / "said").exists() else []

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Ask where the name stands, without pause, while this lasts."""
        ended = threading.Event()

        def ask() -> None:
            known = 0
            while not ended.wait(0.001):
                try:
                    assert self.registry.resolve(NAME).hash in self.models
                    count = len(self.registry.moves())
                except (UserError, OSError, AssertionError) as e:
                    self.faults.append(f"a reader met {e!r}")
                    continue
                if count < known:
                    self.faults.append(f"a reader saw {known} lines, then {count}")
                known, self.reads = count, self.reads + 1

        reader = threading.Thread(target=ask)
        reader.start()
        try:
            yield
        finally:
            ended.set()
            reader.join()

    def check(self) -> None:
        """Hold the log against what was said, and the models against their sources."""
        said = self.said()  # before the log: what was said is in it
        moves = self.registry.moves()[1:]
        found = collections.Counter(move["why"] for move in moves)
        self.faults += [
            f"{found[token]} lines of a move that was said to be done" for token in said if found[token] != 1
        ]
        self.faults += [f"{count} lines of a move" for count in found.values() if count > 1]
        at_work = sum(writer.poll() is None for writer in self.writers)
        if len(moves) - len(said) > self.kills + at_work:
            self.faults.append(f"{len(moves)} lines for {len(said)} moves, {self.kills} kills, {at_work} at work")
        self.faults += [*_broken(self.registry), *_not_whole(self.registry, self.models)]
        if errors := (self.folder / "errors").read_text():
            self.faults.append(f"a writer failed: {errors[-500:]}")


def _broken(registry: Registry) -> list[str]:
    """Moves that do not go on from the one before them, or that no gate allowed."""
    history, faults = registry.history(NAME), []
    verdicts = {verdict["id"]: verdict for verdict in registry.gates()}
    for at, move in enumerate(history[1:], 1):
        before = history[at - 1]["hash"]
        if move["from"] != before or versions(history[: at + 1])[-1]["hash"] != move["hash"]:
            faults.append(f"line {at + 1} does not go on from line {at}")
        if move["action"] == "promote" and not move["forced"]:
            verdict = verdicts[move["gate"]]
            if (verdict["passed"], verdict["candidate"], verdict["incumbent"]) != (True, move["hash"], before):
                faults.append(f"line {at + 1} was allowed by another gate")
    return faults


def _not_whole(registry: Registry, models: dict[str, Path]) -> list[str]:
    """What is wrong with the models that the log names; that of the name is loaded."""
    faults = []
    for place, content in {(move["model"], move["hash"]) for move in registry.moves()}:
        source = models[content]
        files = sorted(str(x.relative_to(source)) for x in source.rglob("*") if x.is_file())
        kept = sorted(
            str(x.relative_to(registry.folder / place)) for x in (registry.folder / place).rglob("*") if x.is_file()
        )
        same, _, _ = filecmp.cmpfiles(source, registry.folder / place, files, shallow=False)
        if kept != files or len(same) != len(files):
            faults.append(f"{place} is not whole")
    wanted = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=_one_device())}
    try:
        stands = registry.resolve(NAME)
        params, _, _ = checkpoint.load_params(stands.path, wanted)  # verifies the weights
    except UserError as e:
        return [*faults, str(e)]
    number = int(models[stands.hash].name.removeprefix("model"))
    return faults if (params["w"] == number).all() else [*faults, "the model of the name is another one"]


@functools.cache
def _one_device() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def killed(folder: Path, models: dict[str, Path], kills: int, writers: int, seed: int, at_once: int = AT_ONCE) -> Trial:
    """Kill writers at random moments, several at once, and begin others, so many times in all."""
    rng, trial = random.Random(seed), Trial(folder, models)
    try:
        with trial.read():
            while trial.kills < kills:
                while len(trial.writers) < writers:
                    trial.begin(rng.randrange(2**31), -1)
                trial.wait(len(trial.said()) + 1)
                time.sleep(rng.random() * 0.3)
                trial.kill(min(at_once, kills - trial.kills), rng)
                trial.check()
    finally:
        trial.kill(len(trial.writers), rng)
    trial.check()
    trial.kills = kills
    return trial


def together(folder: Path, models: dict[str, Path], writers: int, moves: int) -> Trial:
    """So many writers at once, of so many moves each, to their end."""
    trial = Trial(folder, models)
    with trial.read():
        for seed in range(writers):
            trial.begin(seed, moves)
        ended = [writer.wait() for writer in trial.writers]
    trial.check()
    lines = len(trial.registry.moves()) - 1
    if any(ended) or len(trial.said()) != writers * moves or lines != writers * moves:
        trial.faults.append(
            f"{lines} lines and {len(trial.said())} moves said to be done of {writers * moves}; {ended}"
        )
    return trial


def seconds(models: dict[str, Path], folder: Path) -> dict[str, float]:
    """Of one move and of one look-up, in a registry of 1000 lines; and of a process that only imports and looks up."""
    registry = Registry(folder)
    two = list(models.values())[:2]
    for i in range(1000):
        registry.promote(NAME, two[i % 2], force=True, why="x")
    begin = time.perf_counter()
    for i in range(50):
        registry.promote(NAME, two[i % 2], force=True, why="x")
    moved = time.perf_counter()
    for _ in range(50):
        registry.resolve(NAME)
    found = time.perf_counter()
    command = f"from llm_jax import names; names.resolve({NAME!r}, {str(folder)!r}); import sys; assert 'jax' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    return {"move": (moved - begin) / 50, "look_up": (found - moved) / 50, "process": time.perf_counter() - found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").mkdir()
        models = make_models(folder / "models")
        took = seconds(models, folder / "timed")
        print(f"{took}", flush=True)
        trials = []
        for i, begun in enumerate(range(0, given.kills, ROUND)):
            trials.append(killed(folder / f"killed{i}", models, min(ROUND, given.kills - begun), given.writers, i))
            told = f"{len(trials[-1].said())} moves done, {trials[-1].torn} torn, {trials[-1].reads} reads"
            print(f"{begun + trials[-1].kills} kills: {told}, faults {trials[-1].faults}", flush=True)
        begin = time.perf_counter()
        whole = together(folder / "together", models, given.writers, given.moves)
        took["moves_a_second_together"] = given.writers * given.moves / (time.perf_counter() - begin)
        print(f"{took}, faults {whole.faults}", flush=True)
        done, lines = (sum(x) for x in zip(*((len(t.said()), len(t.registry.moves()) - 1) for t in trials)))
        kills, bad = sum(t.kills for t in trials), [fault for t in trials for fault in t.faults]
    if given.dry:
        return
    counted: dict[str, Any] = {"moves_done": done, "lines": lines, "torn": sum(t.torn for t in trials)}
    counted["reads"] = sum(t.reads for t in trials)
    least = kills >= 200 and given.writers >= 8
    every = given.writers * given.moves
    write(
        "registry",
        [
            claim(
                f"names torn or missing, and lines lost, in {kills} kills among {given.writers} writers at once",
                len(bad),
                0,
                not bad and least,
                **counted,
            ),
            claim(
                f"moves of {given.writers} writers at once, {every} in all, that are lost, repeated or out of order",
                len(whole.faults),
                0,
                not whole.faults and given.writers >= 8,
                reads=whole.reads,
                seconds=took,
            ),
        ],
    )


if __name__ == "__main__":
    main()
