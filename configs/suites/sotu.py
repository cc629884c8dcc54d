"""What a model of the State of the Union must keep, whatever its tokenizer: 0.02 bits a byte, 0.06 on no century alone; no slower, no larger.

python train.py --config=configs/sotu.py
python -m llm_jax gate runs/sotu --against=registry:sotu --suite=configs/suites/sotu.py
"""

from llm_jax.config import Batch, Data
from llm_jax.lifecycle.suite import Check, Limits, Suite
from llm_jax.tasks import NextToken


def get_suite() -> Suite:
    text = Check(
        "text",
        NextToken(overlap=128),
        # What configs/sotu.py holds out: 12 addresses, so that the interval is that of 12.
        Data(sources=("asset:sotu",), heldout=0.05),
        margin=0.02,
        metric="bits",
        batch=Batch(size=8, length=256),
        slices=("date:2",),
        slice_margin=0.06,
        least=3,
    )
    return Suite(checks=(text,), limits=Limits(size=1.1, latency=1.5, memory=1.2, length=256))
