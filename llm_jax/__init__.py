"""llm_jax: a language model's whole life as transforms of a value.

model = llm_jax.load(path)
outputs = llm_jax.apply(model, batch)
texts = llm_jax.generate(model, prompts, max_new_tokens=64, temperature=0.0)
smaller = llm_jax.transform(model, change, key, aux=calibration)
llm_jax.save(smaller, path)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_jax.model import Model, apply, generate, load, save, transform

__all__ = ["Model", "apply", "generate", "load", "save", "transform"]


def __getattr__(name: str) -> Any:
    """The names above, imported when first asked for, so that a misspelt key of a config is told before jax is loaded."""
    if name in __all__:
        from llm_jax import model

        return getattr(model, name)
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}")
