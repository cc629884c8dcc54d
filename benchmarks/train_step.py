"""Claim: a training step on CPU is at least as fast as the same step in PyTorch, eager mode (target 0.95, goal 1.1 times its tokens a second).

    pip install torch==2.13.0
    python -m benchmarks.train_step [--repeats 5]

A decoder of 6 layers, D 384, 6 heads, V 8192, rows of 256, batch 8, AdamW, float32, two threads; the peer is
`peers/torch_lm_step.py`. Each repeat runs both sides one after the other in processes of their own, the peer with and without
the settings of the allocator that we take; the figure is the median of the ratios to its better one. Ours
is the very step that `train.py` takes, with the segments and positions of packed rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import write


def ours(steps: int, devices: int) -> dict:
    """Median seconds of a step of this project."""
    import jax
    import numpy as np

    jax.config.update("jax_num_cpu_devices", devices)
    from llm_jax import config, evaluate, loop, optim, sharding, step  # noqa: F401
    from llm_jax.models import transformer
    from llm_jax.models.config import ModelConfig
    from llm_jax.platform import setup
    from llm_jax.tasks import NextToken

    setup()
    sizes = ModelConfig(
        vocab_size=8192, max_length=256, layers=6, dim=384, heads=6, mlp="gelu_tanh", norm="rms", positions="none"
    )
    mesh = sharding.make_mesh()
    loss = NextToken().loss(sizes)
    shapes, axes = transformer.shapes(sizes), transformer.axes(sizes)
    optimizer = optim.make_optimizer(
        config.Optimizer(name="adamw", weight_decay=0.01, clip=0),
        optim.make_schedule(config.Schedule(), 1000),
        shapes,
        axes,
    )
    tokens = np.random.default_rng(0).integers(0, 8192, (8, 257)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((8, 256), np.float32),
        "segment_ids": np.ones((8, 256), np.int32),
        "positions": np.tile(np.arange(256, dtype=np.int32), (8, 1)),
    }
    with jax.set_mesh(mesh):

        def init(key):
            return step.init_state(transformer.init(sizes, key), optimizer, key)

        placed = sharding.state_shardings(
            mesh, jax.eval_shape(init, jax.random.key(0)), shapes, sharding.params_shardings(mesh, axes, shapes)
        )
        state = jax.jit(init, out_shardings=placed)(jax.random.key(0))
        one = jax.jit(
            step.make_step(loss, step.differentiate(loss), optimizer), donate_argnums=0, out_shardings=(placed, None)
        )
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = one(state, sharding.put(batch, mesh))
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {"step_seconds": median, "tokens_per_second": 8 * 256 / median, "devices": devices}


PEERS = {
    "as it comes": {},
    "freed memory kept": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)},
}
"""Settings of the peer's process. We let glibc keep what a step frees (`llm_jax/platform.py`), so the peer may as well; its better one counts."""


def run(command: list[str], **environment: str) -> dict:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ours", type=int, default=0, help="run one side alone, on this many CPU devices")
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.steps, options.ours)))
        return
    peer = [sys.executable, str(Path(__file__).parent / "peers" / "torch_lm_step.py"), "--steps", str(options.steps)]
    mine = [sys.executable, "-m", "benchmarks.train_step", "--steps", str(options.steps), "--ours"]
    sides = {"one device": [*mine, "1"], "two devices, one a core": [*mine, "2"]}
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in (*sides, *PEERS)}
    for i in range(options.repeats):
        for name, setting in PEERS.items():
            rates[name].append(run(peer, **setting)["tokens_per_second"])
        for name, command in sides.items():
            rates[name].append(run(command)["tokens_per_second"])
            ratios[name].append(rates[name][-1] / max(rates[setting][-1] for setting in PEERS))
        print(i, {name: round(x[-1]) for name, x in rates.items()}, flush=True)
    medians = {name: statistics.median(x) for name, x in rates.items()}
    claims = [
        {
            "name": f"tokens a second over PyTorch eager's, {name}",
            "value": statistics.median(x),
            "target": 0.95,
            "holds": statistics.median(x) >= 0.95,
            "seeds": len(x),
            "spread": [min(x), max(x)],
            "tokens_per_second": medians[name],
            "peer_tokens_per_second": {setting: medians[setting] for setting in PEERS},
        }
        for name, x in ratios.items()
    ]
    write("train_step", claims)


if __name__ == "__main__":
    main()
