"""What torch's profiler recorded, read as stages, waits, launches and memory."""
