"""The optimizer's groups and the schedule, a function of the step alone."""

import pytest
import torch

from detr_fast.training.optimizer import Schedule, build_optimizer
from detr_fast.weights import build_model


def test_the_backbone_has_its_own_rate_and_nothing_frozen_is_trained() -> None:
    model = build_model("detr_r50")
    others, backbone = build_optimizer(model, 1e-4, 1e-5, 1e-4).param_groups
    assert (others["lr"], backbone["lr"]) == (1e-4, 1e-5)
    counted = sum(parameter.numel() for group in (others, backbone) for parameter in group["params"])
    assert counted == 41_302_368  # what facebookresearch/detr trains of its 41,524,768


def test_step_schedule_drops_every_time_as_upstreams_does() -> None:
    schedule = Schedule("step", total_steps=300, drop_step=100, warmup_steps=0)
    theirs = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 100)
    for step in range(300):
        assert schedule.factor(step) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()


def test_cosine_schedule_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule("cosine", total_steps=100, drop_step=0, warmup_steps=10)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(50) == pytest.approx(0.5)
    assert schedule.factor(99) < 0.001


def test_apply_scales_every_group_from_its_own_rate() -> None:
    optimizer = build_optimizer(build_model("detr_tiny"), 1e-3, 1e-4, 0.0)
    schedule = Schedule("step", 10, 5, 0)
    for _ in range(3):
        schedule.apply(optimizer, 7)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-5])
    assert isinstance(optimizer, torch.optim.AdamW)
