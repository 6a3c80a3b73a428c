"""Lower bounds of a profiler range's time, from its operations and bytes and from the peaks of this machine."""
