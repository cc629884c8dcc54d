"""The optimizer's state on the host: a transform that changes where arrays lie and nothing that is computed."""

from llm_jax.transforms.base import Transform


def offload_moments() -> Transform:
    """Moments lie in the host's memory between updates, and come to the device for each; the updates are those without it, bit for bit.

    A step needs the less memory of the device, and the more time, in which each moment crosses to the device and back: worth it
    where the rest of a step, with the weights, the gradients and the activations, leaves no room for the moments.
    """
    return Transform(offload=True, label="offload_moments()")
