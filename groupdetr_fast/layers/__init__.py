"""Modules that more than one detector uses. Layouts are batch-first: ``[B, L, d]`` for queries and tokens."""
