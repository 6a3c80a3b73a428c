"""Effect of one optimizer step on the weights, in terms that rounding does not blur.

AdamW's first step is the sign of each gradient times the learning rate: a weight whose gradient is rounding noise moves
as far as any other, either way. So weights are not compared one by one, but by what the step is for: how far it goes
down the gradient, where such weights count next to nothing, and the losses afterwards.
"""

import torch

from detr_profiling.batches import observed_batch
from detr_profiling.comparison.judgement import group_of
from detr_profiling.observation import Observation, our_name
from detr_profiling.workload import Workload


def observe_step(workload: Workload, gradients: Observation) -> Observation:
    """Run one step of a training workload, without dropout. `gradients`: the exact ones before it.

    Returns `update loss...`, each loss term after the step, and for each group of parameters `update of GROUP`, the
    decrease of the loss by the step, to first order, float64. Raises ValueError for a workload that is not comparable.
    """
    if workload.observe is None or workload.step is None:
        raise ValueError(f"{workload.name} is not comparable")
    model = workload.model
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    training = model.training
    model.eval()  # no dropout, and a compiled forward is not compiled once more
    workload.step(observed_batch(workload.options, workload.options.network.config().num_classes))
    model.train(training)
    decrease: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        if name in before:
            name, moved = our_name(name), (before[name] - value.detach()).cpu().double()
            group = f"update of {group_of(name)}"
            along = (moved * gradients[f"gradient {name}"].double()).sum()
            decrease[group] = decrease[group] + along if group in decrease else along
    after = workload.observe()
    return {f"update {name}": value for name, value in after.items() if name.startswith("loss")} | decrease
