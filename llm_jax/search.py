"""Batches, rematerialisation and meshes of a run, tried and ranked by the time of a token among those that fit.

All are estimated; the best of them are compiled, where that can be done, and ranked again by what the compiler says.
"""

import dataclasses
import math
from collections.abc import Iterator

from llm_jax import plan
from llm_jax.chips import Topology
from llm_jax.config import Batch, Mesh, Run
from llm_jax.errors import UserError
from llm_jax.models.config import REMAT
from llm_jax.program import resolve
from llm_jax.sharding import abstract_mesh

ROWS = (1, 2, 4, 8, 16)
"""Rows of a slice on each device that are tried"""
TENSOR = (1, 2, 4, 8)


def candidates(run: Run, topology: Topology) -> Iterator[list[Run]]:
    """The run on other meshes, for each with every rematerialisation and several batches, in one slice.

    Those whose heads the tensor axis does not divide are left out; the context axis stays 1.
    """
    every = dataclasses.replace(run, batch=Batch(size=topology.chips, length=run.batch.length))
    sizes = resolve(every, abstract_mesh(Mesh(), topology.chips)).model
    assert sizes is not None
    for tensor in (t for t in TENSOR if topology.chips % t == 0 and sizes.heads % t == 0):
        over = topology.chips // tensor
        for fsdp in sorted({over, math.gcd(over, 16), 1}, reverse=True):
            mesh = Mesh(data=over // fsdp, fsdp=fsdp, tensor=tensor)
            yield [
                dataclasses.replace(
                    run,
                    mesh=mesh,
                    model=sizes.replace(remat=remat),
                    batch=Batch(size=rows * over, length=run.batch.length),
                )
                for remat in REMAT
                for rows in ROWS
            ]


def search(run: Run, topology: Topology, compiled: int = 3) -> list[plan.Plan]:
    """The plans that fit, fastest a token first; the first `compiled` of the estimated ones are compiled, where that can be done.

    Raises:
        UserError: what in the config does not fit together, or nothing that was tried fits.
    """
    found = [p for runs in candidates(run, topology) for p in plan.variants(runs, topology)]
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
