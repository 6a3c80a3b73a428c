"""Attention of every image's queries over its own keys, in rows of a batch or packed one after another."""
