"""Normalisation at the end of a transformer layer."""
