"""The set loss of all decoder layers at once, and the geometry of boxes that it shares with the matching cost."""
