"""Batches, rematerialisation and meshes of a run, tried and ranked by the time of a token among those that fit.

All are estimated; the best of them are compiled, where that can be done, and ranked again by what the compiler says.
"""

import dataclasses
from collections.abc import Iterator

from llm_jax import plan
from llm_jax.config import Batch, Mesh, Run
from llm_jax.errors import ConfigError, UserError
from llm_jax.models.config import REMAT
from llm_jax.program import resolve
from llm_jax.sharding import abstract_mesh

ROWS = (1, 2, 4, 8, 16)
"""Rows of a slice on each device that are tried"""
TENSOR = (1, 2, 4, 8)


def candidates(run: Run, topology: plan.Topology) -> Iterator[Run]:
    """The run with other meshes, rematerialisation and slices of its batch; those whose axes do not divide are left out.

    The batch of an update is the run's where the rows divide it, else as many rows as one slice has.
    """
    run = resolve(
        dataclasses.replace(run, batch=dataclasses.replace(run.batch, size=topology.chips, accumulate=1)),
        _flat(topology),
    )
    assert run.model is not None
    for tensor in (t for t in TENSOR if topology.chips % t == 0 and run.model.heads % t == 0):
        over = topology.chips // tensor
        for fsdp in sorted({over, min(over, 16), 1}, reverse=True):
            mesh = Mesh(data=over // fsdp, fsdp=fsdp, tensor=tensor)
            for remat in REMAT:
                for rows in ROWS:
                    batch = Batch(size=rows * over, length=run.batch.length)
                    model = run.model.replace(remat=remat)
                    yield dataclasses.replace(run, mesh=mesh, model=model, batch=batch)


def _flat(topology: plan.Topology):
    return abstract_mesh(Mesh(), topology.chips)


def search(run: Run, topology: plan.Topology, compiled: int = 3) -> list[plan.Plan]:
    """The plans that fit, fastest a token first; the first `compiled` of the estimated ones are compiled.

    Raises:
        UserError: nothing that was tried fits.
    """
    found = []
    for one in candidates(run, topology):
        try:
            found.append(plan.make(one, topology, compiled=False))
        except ConfigError:  # a transform or a task that the sizes do not suit
            continue
    fitting = sorted((p for p in found if p.memory.fits), key=_per_token)
    if not fitting:
        least = min((p.memory.peak for p in found), default=0.0)
        raise UserError(
            f"nothing that was tried fits {topology.name}: the least needs {least / 1e9:.1f} of {topology.chip.memory / 1e9:.1f} GB"
        )
    if not plan.can_compile(topology):
        return fitting
    first = [plan.make(p.run, topology) for p in fitting[:compiled]]
    return sorted((p for p in first if p.memory.fits), key=_per_token) + fitting[compiled:]


def _per_token(one: plan.Plan) -> float:
    return one.seconds / one.tokens
