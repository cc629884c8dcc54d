"""Claims: packed documents have the loss of the same documents unpacked (1e-6), and packing fills at least 0.97 of the quickstart's rows.

python -m benchmarks.packing
"""

import dataclasses

import jax

from benchmarks.common import write
from llm_jax import config, evaluate, parts, sharding
from llm_jax.data.accounting import Accounting
from llm_jax.data.pipeline import Loader
from llm_jax.models import transformer


def main():
    run = config.load("configs/quickstart.py")
    run = dataclasses.replace(run, eval=config.Eval())
    built = parts.build(run)
    accounting = Accounting()
    while accounting.report()["read"] < 237:  # about an epoch of the documents that are not held out
        accounting.add(next(built.train).account)
    fill = 1 - accounting.report()["padding"]
    params = transformer.init(built.model, jax.random.key(0))
    losses = {}
    for pack in (True, False):
        data = dataclasses.replace(run.data, pack=pack)
        sources = parts.open_sources(data, "heldout")
        with (
            Loader(sources, built.tokenizer, run.task, data, run.batch, 0, "heldout") as loader,
            jax.set_mesh(sharding.make_mesh()),
        ):
            losses[pack] = evaluate.judge(built.eval_step, params, [loader], built.mesh)[0]["loss"]
    built.close()
    difference = abs(losses[True] - losses[False]) / losses[False]
    write(
        "packing",
        [
            {
                "name": "relative difference of the held-out loss, packed against unpacked",
                "value": difference,
                "target": 1e-6,
                "holds": difference <= 1e-6,
            },
            {
                "name": "share of the slots filled, quickstart's training rows",
                "value": fill,
                "target": 0.97,
                "holds": fill >= 0.97,
            },
        ],
    )


if __name__ == "__main__":
    main()
