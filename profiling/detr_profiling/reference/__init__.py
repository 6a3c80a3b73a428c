"""The paper's DETR in plain torch, and weights for it."""
