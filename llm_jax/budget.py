"""Which model fits a budget: sizes and token counts worth training with given chips and days.

Hoffmann et al. 2022, 'Training compute-optimal large language models': operations C = 6 N D of N parameters and D tokens are spent best
at about 20 tokens a parameter (table 3); what more tokens on a smaller model cost in loss is told by their parametric fit (eq. 10).
"""

import dataclasses
import math
from typing import Any

from llm_jax.chips import Topology

RATIOS = (20, 40, 100, 200, 500)
"""Tokens a parameter: the optimum for the training alone, and models trained longer, which are cheaper to use"""
STATE = 16
"""Bytes a parameter in training: weights, gradient and two moments in float32"""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to spend the budget."""

    ratio: int
    """tokens a parameter"""
    parameters: float
    tokens: float
    loss: float
    """nats a token on the authors' data, by eq. 10: to compare the choices with, not to expect"""
    layers: int
    dim: int
    """of a decoder of about that size, 128 units of width a layer"""
    fits: bool
    """whether weights, gradients and Adam's moments, fully sharded, take at most two thirds of the memory"""


def choices(topology: Topology, days: float, utilisation: float) -> list[Choice]:
    """The ways to spend so many days of the chips, at a utilisation that is assumed.

    >>> from llm_jax.chips import read_topology
    >>> best = choices(read_topology("v5e:16x16"), 7, 0.4)[0]
    >>> f"{best.parameters / 1e9:.1f}B parameters, {best.tokens / 1e9:.0f}B tokens"
    '10.1B parameters, 202B tokens'
    """
    total = operations(topology, days, utilisation)
    found = []
    for ratio in RATIOS:
        parameters = math.sqrt(total / (6 * ratio))
        dim = max(128, 128 * round((128 * parameters / 12) ** (1 / 3) / 128))
        layers = max(1, round(parameters / 12 / dim**2))
        fits = STATE * parameters / topology.chips <= topology.chip.memory * 2 / 3
        tokens = ratio * parameters
        found.append(Choice(ratio, parameters, tokens, loss(parameters, tokens), layers, dim, fits))
    return found


def operations(topology: Topology, days: float, utilisation: float) -> float:
    """What the chips do in the time."""
    return topology.chips * topology.chip.flops * utilisation * days * 86400


def loss(parameters: float, tokens: float) -> float:
    """1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 (Hoffmann et al. 2022, eq. 10).

    >>> round(loss(70e9, 1.4e12), 2)
    1.94
    """
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def to_dict(found: list[Choice], topology: Topology, days: float, utilisation: float) -> dict[str, Any]:
    """The choices and what they rest on, as JSON-able data."""
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "days": days,
        "assumed_utilisation": utilisation,
        "operations": operations(topology, days, utilisation),
        "choices": [dataclasses.asdict(one) for one in found],
    }
