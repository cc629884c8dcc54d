"""A model kept current: lineage, drift, gate, registry, update and the report of a life. Plain files, no server.

Everything here reads models, cards and runs as others do; nothing below knows of it.
"""
