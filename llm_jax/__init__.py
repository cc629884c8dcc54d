"""llm_jax: a language model's whole life as transforms of a value.

model = llm_jax.load(path)
outputs = llm_jax.apply(model, batch)
texts = llm_jax.generate(model, prompts, max_new_tokens=64, temperature=0.0)
smaller = llm_jax.transform(model, change, key, aux=llm_jax.calibration(run, model.tokenizer, 8))
figures = llm_jax.held_out(smaller, run)
llm_jax.save(smaller, path)
result = llm_jax.train(run)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_jax.evaluate import held_out
    from llm_jax.loop import train
    from llm_jax.model import Model, apply, generate, load, save, transform
    from llm_jax.parts import calibration

__all__ = ["Model", "apply", "calibration", "generate", "held_out", "load", "save", "train", "transform"]

_PLACES = {"held_out": "evaluate", "train": "loop", "calibration": "parts"}
"""The modules of those that are not in `model`"""


def __getattr__(name: str) -> Any:
    """The names above, imported when first asked for, so that a misspelt key of a config is told before jax is loaded."""
    if name in __all__:
        return getattr(importlib.import_module(f"llm_jax.{_PLACES.get(name, 'model')}"), name)
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}")
