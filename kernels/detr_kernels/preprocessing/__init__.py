"""Images of different sizes to one normalised batch."""
