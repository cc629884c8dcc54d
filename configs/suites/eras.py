"""What a model of the State of the Union must keep: neither era may lose more than 0.03 nats a token, no decade more than 0.1; no slower, no larger.

python -m llm_jax gate runs/eras_update --against=runs/eras_base --suite=configs/suites/eras.py
"""

from llm_jax.config import Batch, Data
from llm_jax.lifecycle.suite import Check, Limits, Suite
from llm_jax.tasks import NextToken


def get_suite() -> Suite:
    def era(name: str, dates: str) -> Check:
        # What configs/eras_base.py and eras_update.py hold out of it.
        data = Data(sources=(f"asset:sotu#date={dates}",), heldout=0.1)
        return Check(
            name,
            NextToken(),
            data,
            margin=0.03,
            batch=Batch(size=4, length=256),
            slices=("party",),
            slice_margin=0.1,
            least=5,
        )

    return Suite(
        checks=(era("old", "..1945"), era("new", "1946..")), limits=Limits(size=1.1, latency=1.5, rows=4, length=256)
    )
