"""Shows where time and memory go, and that accuracy did not move."""
