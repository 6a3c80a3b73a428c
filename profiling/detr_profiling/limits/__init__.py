"""Lower bounds of a stage's time, from its operations and bytes and from the peaks of this machine."""
