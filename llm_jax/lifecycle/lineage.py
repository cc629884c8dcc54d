"""Which models there are and what each was made of: checkpoints found by their cards, joined by the hashes of their weights.

The same weights in several places are one version. Nothing is written and no index is kept: the cards are the truth. How it is drawn is
`lineage_text.py`. Arrays are read by `check` alone.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llm_jax import card_text, names, saved
from llm_jax.errors import CheckpointError, UserError
from llm_jax.lifecycle.card_schema import check_card
from llm_jax.storage import Path, as_path, is_remote

Card = dict[str, Any]

UNFINISHED = ("orbax-checkpoint-tmp", ".removing", ".part", ".unfinished", ".damaged")
"""In the names of folders that are no checkpoints, or not any more"""


class UnsoundError(UserError):
    """A checkpoint that is not what its card says."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Version:
    """Weights, with the card of how they were made."""

    hash: str
    card: Card
    places: tuple[str, ...]

    @property
    def parents(self) -> tuple[str, ...]:
        """Hashes of what it was made of, each once. (A run of no steps has the weights that it starts from: it is no parent of itself.)"""
        return tuple(h for h in dict.fromkeys(self.card["parents"]) if h != self.hash)

    @property
    def references(self) -> dict[str, str]:
        """Hashes of the models that its loss read, such as a teacher, by name."""
        return self.card.get("references", {})


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A checkpoint that cannot be trusted."""

    place: str
    reason: str
    hash: str = ""
    """of its weights, as its card claims; empty where it claims none"""


@dataclasses.dataclass(frozen=True)
class Lineage:
    """All versions that were found, in the order in which they were."""

    versions: dict[str, Version]
    damaged: tuple[Damaged, ...]
    names: dict[str, tuple[str, ...]]
    """names of the registry by the hash that each stands for"""

    @property
    def origins(self) -> dict[str, str]:
        """Weights that runs read from another project's files and that no checkpoint holds: what the config called them, by their hash."""
        return {
            v.parents[0]: card_text.starts_outside(v.card)
            for v in self.versions.values()
            if v.parents and v.parents[0] not in self.versions and _is_foreign(card_text.starts_outside(v.card))
        }

    @property
    def missing(self) -> tuple[str, ...]:
        """Hashes that a card names as a parent, or a name of the registry stands for, of which no checkpoint was found."""
        wanted = dict.fromkeys([*(h for v in self.versions.values() for h in v.parents), *self.names])
        found = {*self.versions, *self.origins, *(each.hash for each in self.damaged)}
        return tuple(h for h in wanted if h not in found)

    def parent(self, version: Version) -> Version | None:
        """The first parent, where it was found."""
        return self.versions.get(version.parents[0]) if version.parents else None

    def ancestors(self, parents: Iterable[str]) -> list[Version]:
        """What models with these parents come from, as far as it was found, the nearest first, each once."""
        found: dict[str, Version] = {}
        waiting = list(parents)
        for h in waiting:
            if h in self.versions and h not in found:
                found[h] = self.versions[h]
                waiting += self.versions[h].parents
        return list(found.values())


def _is_foreign(start: str) -> bool:
    """Whether a run that started there read another project's files; a folder that is gone is not known to be one."""
    if start.startswith("asset:") or start.endswith(".gguf"):
        return True
    if not start or start.startswith(names.PREFIX):
        return False
    folder = as_path(start).expanduser()
    return (folder / "config.json").is_file() and not any((folder / x).is_dir() for x in ("checkpoints", "about"))


def read(folders: Sequence[str | Path] = (), registry: str | Path = "") -> Lineage:
    """The versions in and below some folders: by default `runs` and the registry's, where they exist.

    Of a run's checkpoints, those that it ends with, and others that a card or a name of the registry names.

    Raises:
        UserError: a folder that is not there or cannot be read.
    """
    kept = names.folder_of(registry)
    if not folders:
        folders = [folder for folder in (as_path("runs"), kept) if folder.is_dir()]
        if not folders:
            raise UserError(f"there is neither runs nor {kept} here: name the folders to look in")
    pointed: dict[str, tuple[str, ...]] = {}
    for name, entry in {move["name"]: move for move in names.moves(kept)}.items():
        pointed[entry["hash"]] = (*pointed.get(entry["hash"], ()), name)
    seen: set[Path] = set()
    found = [place for folder in folders for place in _places(_there(folder), seen)]
    return _index(found, pointed)


def near(path: str | Path) -> Lineage:
    """The versions beside a checkpoint or a run's folder, and in `runs` and the registry: where what it was made of is likely to be."""
    place = saved.find(as_path(path))
    run = place.parent.parent if place.parent.name == "checkpoints" else place
    folders = [folder for folder in (as_path("runs"), names.folder_of()) if folder.is_dir()]
    seen: set[Path] = set()
    found = [each for folder in folders for each in _places(folder, seen)]
    return _index([*_places(run.parent, seen, depth=1), *found], {})


def read_card(path: str | Path) -> Card:
    """The card of a checkpoint, a run's folder or registry:NAME. Raises CheckpointError where it is missing, damaged, or no card by the schema."""
    text = str(path)
    where = names.resolve(text.removeprefix(names.PREFIX)).path if text.startswith(names.PREFIX) else as_path(path)
    card = saved.read_card(where.expanduser())
    if faults := check_card(card):
        raise CheckpointError(f"the card of {path} is not one: {'; '.join(faults[:3])}")
    return card


def _there(folder: str | Path) -> Path:
    path = as_path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if path.exists() else 'no such folder'}")
    return path


def _places(folder: Path, seen: set[Path], depth: int = 100) -> Iterator[Path]:
    """The checkpoints and runs' folders at and below a folder, each once; links are followed."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        saved.find(folder)
        yield folder
    except CheckpointError:  # neither: what is below it may be
        pass
    if (folder / "about").is_dir() or not depth:
        return
    try:
        below = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError as e:
        raise UserError(f"{folder} cannot be read: {e.strerror}") from e
    in_run = (folder / "checkpoints").is_dir() and bool(saved.steps(folder))
    for child in below:
        if not any(word in child.name for word in UNFINISHED) and not (in_run and child.name == "checkpoints"):
            yield from _places(child, seen, depth - 1)


@dataclasses.dataclass(frozen=True)
class _Entry:
    hash: str
    card: Card
    place: str


def _read(path: Path) -> _Entry | Damaged:
    """The card of a checkpoint, checked."""
    place = _shown(path)
    try:
        card = saved.read_card(path)
    except (CheckpointError, ValueError) as e:
        reason = str(e).partition(" is damaged: ")[2] or str(e)
        return Damaged(place, reason, _claimed(path))
    if faults := check_card(card):
        return Damaged(place, f"its card is not one: {'; '.join(faults[:3])}", _claimed(path))
    return _Entry(card["hashes"]["params"], card, place)


def _claimed(path: Path) -> str:
    """The hash that a card states which cannot be trusted, so that what was made of the checkpoint is drawn under it."""
    try:
        stated = json.loads((path / "about" / "card.json").read_text(encoding="utf-8"))["hashes"]["params"]
        return stated if isinstance(stated, str) else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _shown(path: Path) -> str:
    """A path as it is shown: from here, where it lies below."""
    if is_remote(path):
        return str(path)
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def _index(found: Sequence[Path], pointed: dict[str, tuple[str, ...]]) -> Lineage:
    entries: list[_Entry] = []
    damaged: list[Damaged] = []
    others: list[_Entry] = []
    for place in found:
        each = [_read(path) for path in _of_run(place)]
        damaged += [x for x in each if isinstance(x, Damaged)]
        whole = [x for x in each if isinstance(x, _Entry)]
        entries += whole[:1]
        others += whole[1:]
    while True:
        held = {e.hash for e in entries}
        wanted = {*pointed, *(h for e in entries for h in (*e.card["parents"], *e.card.get("references", {}).values()))}
        more = [e for e in others if e.hash in wanted and e.hash not in held]
        if not more:
            break
        entries += more
    return Lineage(_versions(entries), tuple(damaged), pointed)


def _of_run(place: Path) -> list[Path]:
    """The checkpoints of a run's folder: first the one that it ends with, then from the newest on; or the checkpoint itself."""
    first = saved.find(place)
    if first.parent.name != "checkpoints" or first == place.absolute():
        return [first]
    rest = [first.with_name(str(step)) for step in reversed(saved.steps(place))]
    return [first, *(path for path in rest if path != first and (path / "about").is_dir())]


def _versions(entries: Sequence[_Entry]) -> dict[str, Version]:
    """One version for each hash. Of several cards that one which tells how the weights were made.

    Its parents do not descend from the version, as those of a change that was undone do; it is a run's, or one with parents, rather than that of an
    export that was imported again.
    """
    by_hash: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_hash.setdefault(entry.hash, []).append(entry)
    edges = {h: {parent for e in each for parent in e.card["parents"]} for h, each in by_hash.items()}

    def returns(entry: _Entry) -> bool:
        waiting = list(entry.card["parents"])
        met: set[str] = set()
        while waiting:
            h = waiting.pop()
            if h == entry.hash:
                return True
            if h not in met:
                met.add(h)
                waiting += edges.get(h, ())
        return False

    made = {}
    for h, each in by_hash.items():
        first = min(each, key=lambda e: (returns(e), not card_text.is_run(e.card), not e.card["parents"]))
        made[h] = Version(h, first.card, tuple(dict.fromkeys(e.place for e in each)))
    return made


def check(lineage: Lineage) -> list[Damaged]:
    """The checkpoints whose weights are not what their cards say: each is loaded and hashed, one after the other."""
    from llm_jax import model

    found = []
    for version in lineage.versions.values():
        for place in version.places:
            try:
                model.load(place)
            except UserError as e:
                found.append(Damaged(place, str(e).partition(" is damaged: ")[2] or str(e), version.hash))
    return found
