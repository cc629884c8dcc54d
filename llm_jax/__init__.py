"""llm_jax: a language model's whole life as transforms of a value. See README.md for the five functions a notebook needs."""
