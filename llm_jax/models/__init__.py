"""Transformers of every family as pure functions of a config and a dict of weights. Flax is imported in this package only."""
