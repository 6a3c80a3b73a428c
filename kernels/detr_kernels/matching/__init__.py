"""Bipartite matching: the cost of every pair and the exact assignment."""
