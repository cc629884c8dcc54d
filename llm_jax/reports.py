"""Plans and budgets as text. The figures are made in `plan.py`, `search.py` and `budget.py`."""

from llm_jax import budget as budgets
from llm_jax.chips import Topology
from llm_jax.plan import Plan, lacks_compiler, whole_run


def plan(made: Plan) -> str:
    """Everything that a plan tells, a line each."""
    memory, times, total = made.memory, made.times, whole_run(made)
    run, model = made.run, made.run.model
    assert model is not None
    mesh = ", ".join(f"{axis}={n}" for axis, n in made.mesh.items() if n > 1) or "one device"
    bound = max(times, key=lambda name: times[name])
    spare = memory.limit - memory.peak
    lines = [
        f"{run.name} on {made.topology.name}: {made.topology.chips} chips, {mesh}",
        f"{made.parameters / 1e9:.3f}B parameters, {run.batch.size} rows of {run.batch.length} tokens"
        f" in {run.batch.accumulate} slices, remat {model.remat}",
        "read off the step as compiled for this topology"
        if made.compiled
        else "ANALYTIC ESTIMATE: nothing was compiled" + _why(made.topology),
        "",
        "memory of a device, GB",
        *_rows(
            {
                "parameters": memory.parameters,
                "optimizer state": memory.optimizer,
                "batch and the like": memory.other,
                "activations and the rest": memory.rest,
                "peak": memory.peak,
                "of the chip": memory.limit,
            },
            1e9,
        ),
        *(_rows({"of the host beside it": memory.host}, 1e9) if memory.host else []),
        f"  {'fits, free' if memory.fits else 'DOES NOT FIT, lacking':<26}{abs(spare) / 1e9:>12.3f}",
        "",
        "operations of a device and step, TFLOP",
        *_rows({"of the program": made.flops, "of the model": made.model_flops}, 1e12),
        f"  {'ratio':<26}{made.flops / made.model_flops:>12.3f}",
        "",
        "collectives of a device and step, GB",
        *_rows({name: made.payload[name] for name in sorted(made.payload)} or {"none": 0.0}, 1e9),
        f"  {'sent in all':<26}{sum(made.sent.values()) / 1e9:>12.3f}",
        *(_rows({"sent to other slices": sum(made.network.values())}, 1e9) if made.topology.slices > 1 else []),
        "",
        "least time of a step at the chip's full rates, s",
        *_rows(times, 1.0),
        f"  bound by {bound}: {made.seconds:.4f} s, which allows a utilisation of {made.utilisation:.1%}",
        "",
        f"at that rate {total['tokens_per_day'] / 1e9:.3f}B tokens a day",
    ]
    if run.epochs:
        lines.append("how many steps the epochs of the config are is known when the data is read")
    else:
        lines.append(
            f"the run: {run.steps} steps of {made.tokens} tokens, {total['days']:.2f} days, {total['chip_hours']:.0f} chip-hours"
        )
    return "\n".join(lines + [f"note: {note}" for note in made.notes])


def _why(topology: Topology) -> str:
    """Why a TPU's plan was not compiled, where that can be mended."""
    return " (libtpu is not installed: pip install 'llm_jax[plan]')" if lacks_compiler(topology) else ""


def _rows(values: dict[str, float], unit: float) -> list[str]:
    return [f"  {name:<26}{x / unit:>12.3f}" for name, x in values.items()]


def ranking(plans: list[Plan], most: int = 20) -> str:
    """The best plans of a search, a line each."""
    lines = [
        f"{'mesh':<28}{'remat':<8}{'rows':>8}{'peak GB':>10}{'us a token':>12}{'bound by':>14}{'utilisation':>13}  kind"
    ]
    for one in plans[:most]:
        assert one.run.model is not None
        mesh = " ".join(f"{axis}={n}" for axis, n in one.mesh.items() if n > 1) or "one device"
        bound = max(one.times, key=lambda name: one.times[name])
        lines.append(
            f"{mesh:<28}{one.run.model.remat:<8}{one.run.batch.size:>8}{one.memory.peak / 1e9:>10.2f}"
            f"{one.seconds / one.tokens * 1e6:>12.3f}{bound:>14}{one.utilisation:>13.1%}"
            f"  {'compiled' if one.compiled else 'analytic estimate'}"
        )
    if len(plans) > most:
        lines.append(f"and {len(plans) - most} more that fit")
    return "\n".join(lines)


def budget(found: list[budgets.Choice], topology: Topology, days: float, utilisation: float) -> str:
    """The ways to spend a budget, a line each."""
    total = budgets.operations(topology, days, utilisation)
    lines = [
        f"{topology.name}, {topology.chips} chips, {days:g} days at an assumed utilisation of {utilisation:.0%}: {total:.3g} operations",
        f"{'tokens a parameter':>18}{'parameters':>14}{'tokens':>12}{'layers x width':>18}{'loss by eq. 10':>16}  state fits",
    ]
    for one in found:
        lines.append(
            f"{one.ratio:>18}{one.parameters / 1e9:>13.2f}B{one.tokens / 1e9:>11.0f}B{f'{one.layers} x {one.dim}':>18}"
            f"{one.loss:>16.3f}  {'yes' if one.fits else 'no'}"
        )
    lines.append(
        "20 tokens a parameter are best for the training alone (Hoffmann et al. 2022); smaller models trained longer cost less to use"
    )
    return "\n".join(lines)
