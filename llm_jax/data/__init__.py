"""From sources of text to batches: sources, assets, tokenizer, pieces, and the one Grain pipeline that joins them.

What a batch means (targets, weights, masks) belongs to `llm_jax.tasks`; devices and sharding to `llm_jax.sharding`.
"""
