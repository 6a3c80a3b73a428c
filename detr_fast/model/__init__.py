"""The detector's network: backbone, positions, attention, transformer, heads."""
