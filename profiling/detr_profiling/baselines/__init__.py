"""Workloads that ours is compared with."""
