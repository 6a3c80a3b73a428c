"""Matching, loss, optimizer, step, loop, checkpoints."""
