"""What ours is compared with, as workloads like ours."""
