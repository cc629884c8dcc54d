"""Another rate of dropout for a trained model."""

from llm_jax.transforms.base import Transform


def dropout(rate: float) -> Transform:
    """Training drops so many of the values that the model drops out; weights and evaluation stay as they are.

    A student is taught better without: what it learns from a teacher's soft answers is no noise that it could learn by heart.

    Raises:
        ConfigError: a rate outside [0, 1).
    """
    return Transform(config=lambda sizes: sizes.replace(dropout=rate), label=f"dropout({rate})")
