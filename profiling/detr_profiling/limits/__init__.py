"""What a stage would take at the least: its operations and bytes, and the peaks of this machine."""
