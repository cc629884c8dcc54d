"""Another rate of dropout for a trained model."""

from llm_jax.transforms.base import Transform


def dropout(rate: float) -> Transform:
    """From here on training drops this share of embeddings, attention weights and branch outputs (Srivastava et al. 2014); weights stay as they are.

    Raises:
        ConfigError: a rate outside [0, 1).
    """
    return Transform(config=lambda sizes: sizes.replace(dropout=rate), label=f"dropout({rate})")
