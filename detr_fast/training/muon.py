"""Muon for the transformer's matrices, AdamW for all else, as one optimizer that never waits for the device.

torch.optim.Muon (2.11) computes the same, but reads a learning rate that is a tensor on the host, so that it cannot be
captured, and takes gradients that are not finite into its momentum.
(Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.)
"""

from collections import defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
ADAMW_RMS = 0.2
"""Root mean square of AdamW's usual update, over the learning rate: with it both rules take the same one."""
EPS = 1e-7


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights between hidden layers: of attention, feed-forward, projections and heads, without the last
    layers of heads, embeddings and the backbone."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    found = set()
    for name, parameter in model.named_parameters():
        inner = name.endswith("weight") and not name.startswith("backbone") and parameter not in embeddings
        last = "class_embed" in name or parameter.shape[0] == BOX_NUMBERS
        if inner and parameter.ndim == 2 and not last:
            found.add(parameter)
    return found


BOX_NUMBERS = 4


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW whose groups with `muon` follow Muon's rule instead; both skip a step where `found_inf` says so."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step by gradients that `grad_scale` divides, as fused AdamW does."""
        groups = [group for group in self.param_groups if group["muon"]]
        gradients = [{each: each.grad for each in group["params"] if each.grad is not None} for group in groups]
        for parameter in chain(*gradients):
            parameter.grad = None  # AdamW leaves out what has none
        super().step()
        for group, its_gradients in zip(groups, gradients, strict=True):
            self.update_matrices(group, its_gradients)
            for parameter, gradient in its_gradients.items():
                parameter.grad = gradient

    def update_matrices(self, group: dict[str, Any], gradients: dict[Tensor, Tensor]) -> None:
        """Move matrices of one shape at once: decay, then the orthogonalized mean of momentum and gradient."""
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in gradients:
            state = self.state[matrix]
            if not state:
                state["step"] = torch.zeros((), device=matrix.device)  # AdamW's loading expects one
                state["momentum"] = torch.zeros_like(matrix)
            alike[matrix.shape].append(matrix)
        for shape, weights in alike.items():
            momenta = [self.state[weight]["momentum"] for weight in weights]
            momentum, gradient = torch.stack(momenta), torch.stack([gradients[weight] for weight in weights])
            if self.grad_scale is not None:
                gradient = gradient / self.grad_scale
            rate = group["lr"]
            if self.found_inf is not None:  # with its momentum as gradient, and the rate zero, nothing changes
                gradient = torch.where(self.found_inf > 0, momentum, gradient)
                rate = rate * (self.found_inf == 0)
            momentum = momentum.lerp(gradient, 1 - MOMENTUM)
            update = orthogonalized(gradient.lerp(momentum, MOMENTUM)) * (ADAMW_RMS * max(shape) ** 0.5)
            torch._foreach_copy_(momenta, list(momentum))
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_sub_(weights, list(update * rate))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, A, B) near 1, by products alone; on a GPU in bf16."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
