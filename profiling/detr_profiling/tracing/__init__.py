"""Recordings of torch's profiler, read as stages, waits, launches and memory."""
