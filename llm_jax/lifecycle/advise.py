"""How to update a model, tried out: small arms of equal compute, judged on old and on new text."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax import flops, log, model, program, sharding
from llm_jax.config import Eval, Optimizer, Run
from llm_jax.errors import ConfigError, choose
from llm_jax.lifecycle.recipes import continued, retrained
from llm_jax.models.config import ModelConfig
from llm_jax.storage import in_one_line
from llm_jax.transforms import grow_depth, lora

REPLAY = {"new_only": 0.0, "replay_1": 0.01, "replay_5": 0.05, "replay_25": 0.25, "replay_50": 0.5}
"""Share of the pieces from the old source"""

ARMS = ("nothing", "lora", *REPLAY, "grown", "union")
EVALUATIONS = 8
"""of each arm, so that its curve can be seen"""

FACTORS = Optimizer(name="adamw", learning_rate=2e-3)
"""of low rank: a recipe's rate is that of whole matrices"""


def arms(recipe: Run, start: str, tokenizer: str, old: str, new: str, wanted: Sequence[str] = ()) -> dict[str, Run]:
    """A run for each way to update a model, of as many operations as the recipe has.

    nothing; lora: factors of low rank, a quarter of the rows old; new_only, replay_1, replay_5, replay_25, replay_50: the whole model, with
    that share of old rows in hundredths; grown: half as deep again by layers that change nothing at first, as replay_5; union: fresh weights, all documents.

    Args:
        wanted: some of them; empty for all that can be made of the model.

    Raises:
        ConfigError: an unknown arm, one that cannot be made of the model, or a recipe without held-out documents.
    """
    if not recipe.data.heldout:
        raise ConfigError("what is to be told of old and new text needs held-out documents: set data.heldout above 0")
    for name in wanted:
        choose("arm", name, ARMS)
    every = max(1, recipe.steps // EVALUATIONS)
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, every=every, prompts=()))
    made = {name: continued(recipe, start, old, new, share) for name, share in REPLAY.items()}
    made["nothing"] = dataclasses.replace(made["new_only"], steps=0, transforms=(), eval=Eval(task=recipe.eval.task))
    made["lora"] = dataclasses.replace(made["replay_25"], transforms=(*recipe.transforms, lora(8)), optimizer=FACTORS)
    sizes = model.sizes(start)
    post_norm = sizes.norm_place == "post"  # where a layer that adds nothing still normalises
    if sizes.architecture != "encoder-decoder" and not post_norm:
        deeper = grow_depth(sizes.layers + max(1, sizes.layers // 2), how="zero")
        made["grown"] = dataclasses.replace(made["replay_5"], transforms=(deeper, *recipe.transforms))
    elif "grown" in wanted:
        kind = "a post-norm model" if post_norm else "an encoder-decoder"
        raise ConfigError(f"the arm grown cannot be made of {kind}: leave it out of --arms")
    made["union"] = retrained(recipe, start, tokenizer, old, new)
    whole = _work(sizes, recipe)
    return {
        name: _of_equal_work(made[name], whole / _work(_sizes(made[name], sizes), recipe))
        for name in wanted or (name for name in ARMS if name in made)
    }


def _sizes(run: Run, start: ModelConfig) -> ModelConfig:
    """The sizes of the model that a run ends with."""
    sizes = run.model or start
    for change in run.transforms:
        sizes = change.config(sizes)
    return sizes


def _work(sizes: ModelConfig, run: Run) -> float:
    """Operations of a step on the rows of the run's task; what a transform adds to them is no work of the model."""
    batch = program.abstract_batch(dataclasses.replace(run, transforms=()), sharding.make_mesh(run.mesh))
    return flops.train_flops(sizes, {name: x.shape for name, x in batch.items()})


def _of_equal_work(run: Run, factor: float) -> Run:
    return dataclasses.replace(run, steps=round(run.steps * min(factor, 1.0)))


@dataclasses.dataclass(frozen=True)
class Tried:
    """What became of an arm, over its seeds."""

    name: str
    steps: int
    flops: float
    old: list[float]
    """held-out loss on old text, a value each seed"""
    new: list[float]
    curve: list[tuple[float, float, float]]
    """(operations, loss on old, loss on new) of the first seed's evaluations"""
    folders: list[str]

    @property
    def average(self) -> list[float]:
        """Mean of the losses on old and on new text, a value each seed."""
        return [(a + b) / 2 for a, b in zip(self.old, self.new)]


def attempt(name: str, run: Run, old: str, new: str, folder: Path, seeds: Sequence[int]) -> Tried:
    """Carry out an arm for some seeds; one that is done already is only evaluated again."""
    from llm_jax.loop import train

    results = [
        train(dataclasses.replace(run, name=name, seed=seed, workdir=str(folder / name / f"seed{seed}")))
        for seed in seeds
    ]
    first = results[0]
    lines = log.read(Path(first["paths"]["metrics"]))
    told = [(x["step"], x[f"eval/loss/{old}"], x[f"eval/loss/{new}"]) for x in lines if f"eval/loss/{old}" in x]
    each = first["flops"] / max(1, first["steps"])
    return Tried(
        name,
        first["steps"],
        first["flops"],
        [x["eval"][f"loss/{old}"] for x in results],
        [x["eval"][f"loss/{new}"] for x in results],
        [(step * each, a, b) for step, a, b in told],
        [x["paths"]["folder"] for x in results],
    )


def advise(
    recipe: Run, start: str, old: str, new: str, out: Path, seeds: Sequence[int] = (0,), wanted: Sequence[str] = ()
) -> list[Tried]:
    """Try each arm; advice.json and advice.png in `out`, and the arms' runs below it. The least mean of both losses comes first.

    Raises:
        UserError: whatever a run raises, or a folder that cannot be written.
    """
    tokenizer = model.read_tokenizer(start)
    if tokenizer is None:
        raise ConfigError(f"{start} has no tokenizer")
    with in_one_line(out):
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer")
    planned = arms(recipe, start, str(out / "tokenizer"), old, new, wanted)
    tried = [attempt(name, run, old, new, out, seeds) for name, run in planned.items()]
    tried.sort(key=lambda x: statistics.fmean(x.average))
    with in_one_line(out):
        (out / "advice.json").write_text(json.dumps(to_dict(tried), indent=1), encoding="utf-8")
        draw(tried, out / "advice.png")
    return tried


def told(tried: Sequence[Tried]) -> str:
    """A table of the arms, the best first, and the advice."""
    lines = [f"{'':<12}{'steps':>8}{'FLOPs':>10}{'old':>9}{'new':>9}{'mean':>9}   spread of the mean"]
    for x in tried:
        mean = statistics.fmean(x.average)
        spread = f"{min(x.average):.4f} to {max(x.average):.4f}" if len(x.average) > 1 else "one seed"
        lines.append(
            f"{x.name:<12}{x.steps:>8}{x.flops:>10.2e}{statistics.fmean(x.old):>9.4f}"
            f"{statistics.fmean(x.new):>9.4f}{mean:>9.4f}   {spread}"
        )
    return "\n".join([*lines, f"advice: {tried[0].name}, the least mean of the losses on old and on new text"])


def draw(tried: Sequence[Tried], path: Path) -> None:
    """A picture of the losses on old and on new text against operations: on the way small, of as many batches as the recipe says, at the end large, of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, what, at in zip(figure.subplots(1, 2, sharex=True), ("old", "new"), (1, 2)):
        for i, x in enumerate(sorted(tried, key=lambda x: x.name)):
            points = [(point[0] / 1e12, point[at]) for point in x.curve]
            if x.name == "nothing":
                axis.axhline(points[-1][1], color="0.6", linestyle=":", label=x.name)
            else:
                marker, colour = "os^vDP*X"[i % 8], f"C{i}"
                axis.plot(*zip(*points[:-1]), marker=marker, color=colour, markersize=3, linewidth=1)
                axis.plot(*points[-1], marker=marker, color=colour, markersize=7, linestyle="", label=x.name)
        axis.set_xlabel("TFLOP")
        axis.set_ylabel(f"loss on {what} text (nats a token)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize="small", title="large: all held-out text", title_fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def to_dict(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """All of it, for JSON."""
    return [dataclasses.asdict(x) for x in tried]
