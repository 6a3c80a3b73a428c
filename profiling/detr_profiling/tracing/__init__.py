"""Reads traces of torch's profiler: time by range, synchronisations, launches and memory."""
