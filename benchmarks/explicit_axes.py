"""Claim: optimizers of optax that the project offers by name are rejected on a mesh with Explicit axes, and work with Auto axes.

    python -m benchmarks.explicit_axes

One sharded matrix and one vector are updated once by every optimizer of optax and optax.contrib under each type of axis.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.common import write
from llm_jax import optim


def works(factory, kind: AxisType) -> bool:
    """Whether one update of sharded params goes through."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))),
            "b": jnp.ones(8),
        }
        try:
            optimizer = factory(learning_rate=1e-3)
            state = jax.jit(optimizer.init)(params)
            jax.jit(optimizer.update)(params, state, params)
            return True
        except Exception as e:  # what is asked is whether it works, whatever stops it
            return "shard" not in str(e).lower()


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    rejected = {
        kind: [name for name, factory in sorted(optim.optimizers().items()) if not works(factory, kind)]
        for kind in (AxisType.Explicit, AxisType.Auto)
    }
    print({str(kind): names for kind, names in rejected.items()})
    write(
        "explicit_axes",
        [
            {
                "name": "optimizers rejected for their shardings, Explicit axes: "
                + ", ".join(rejected[AxisType.Explicit]),
                "value": len(rejected[AxisType.Explicit]),
                "target": "1 decides for Auto axes",
                "holds": bool(rejected[AxisType.Explicit]),
            },
            {
                "name": "optimizers rejected for their shardings, Auto axes",
                "value": len(rejected[AxisType.Auto]),
                "target": 0,
                "holds": not rejected[AxisType.Auto],
            },
        ],
    )


if __name__ == "__main__":
    main()
