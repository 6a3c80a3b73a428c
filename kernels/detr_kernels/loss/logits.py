"""Class logits inside kernels: a tile of them, their softmax, and the focal loss of their sigmoids."""

from detr_kernels.triton_compat import tl, triton


@triton.jit
def load_logits(logits, row, COLUMNS: tl.constexpr, CLASSES: tl.constexpr):
    """Load (QUERIES, CLASSES) float32; -inf past the last class."""
    column = tl.arange(0, CLASSES)[None, :]
    return tl.load(logits + row * COLUMNS + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)


@triton.jit
def log_softmax(logit):
    """Compute log softmax over the last dimension, as torch does; -inf is padding."""
    shifted = logit - tl.max(logit, 1)[:, None]
    return shifted - tl.log(tl.sum(tl.exp(shifted), 1)[:, None])


@triton.jit
def softplus(x):
    """Compute log(1 + exp(x)), for any x."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def focal_parts(logit, hit, alpha):
    """Compute the weight, the probability that is missing and the cross entropy of each entry; `hit`: its class."""
    wrong = tl.sigmoid(tl.where(hit, -logit, logit))
    return tl.where(hit, alpha, 1.0 - alpha), wrong, softplus(tl.where(hit, -logit, logit))
