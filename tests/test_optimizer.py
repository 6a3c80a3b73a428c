"""The optimizer's groups and the schedule, a function of the step alone."""

import copy

import pytest
import torch

from detr_fast.training.build import keep_layouts, restore_moments
from detr_fast.training.muon import MuonAdamW
from detr_fast.training.optimizer import Schedule, build_optimizer
from detr_fast.weights import build_model
from tests.factories import make_batch, make_step

FULL = make_batch([(64, 64), (64, 64)], [2, 0])


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


def reference(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, weight_decay: float) -> torch.Tensor:
    """torch's Muon, its products in the weight's precision."""
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.Muon([parameter], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            theirs.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (96, 32), (1, 7)])
def test_matrices_move_as_by_torchs_muon(shape: tuple[int, int]) -> None:
    """In float64, two matrices of one shape at once; the rate a tensor and gradients divided, as in a captured step."""
    torch.manual_seed(0)
    weights = torch.randn(2, *shape, dtype=torch.float64)
    gradients = torch.randn(3, 2, *shape, dtype=torch.float64)
    expected = [reference(weights[k], list(gradients[:, k]), 0.1, 0.3) for k in range(2)]
    for captured in (False, True):
        parameters = [torch.nn.Parameter(each.clone()) for each in weights]
        ours = MuonAdamW([{"params": parameters, "muon": True}], lr=0.1, weight_decay=0.3, fused=True)
        if captured:
            ours.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
            ours.found_inf = torch.tensor(0.0)
        for number, step in enumerate(gradients, 1):
            ours.grad_scale = torch.tensor(float(number)) if captured else None
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient * (number if captured else 1)
            ours.step()
        for parameter, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_an_update_is_as_large_as_adamws() -> None:
    """So that one learning rate serves both: 0.2 of it, root mean square, for any shape."""
    torch.manual_seed(0)
    for shape in ((256, 256), (768, 256), (256, 2048)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        MuonAdamW([{"params": [parameter], "muon": True}], lr=1e-3, fused=True).step()
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.15)


@pytest.mark.parametrize("name", ["detr_lite", "detr_tiny"])
def test_muon_takes_hidden_matrices_alone_and_adamw_the_rest(name: str) -> None:
    model = build_model(name)
    names = {parameter: each for each, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, 1e-3, 1e-4, 1e-4, muon=True)
    matrices, others, backbone = ([names[each] for each in group["params"]] for group in optimizer.param_groups)
    assert [group["muon"] for group in optimizer.param_groups] == [True, False, False]
    assert {name for name in matrices if "transformer" not in name} == {
        name
        for name in names.values()
        if ("bbox_embed" in name and name.endswith(("layers.0.weight", "layers.1.weight")))
        or name in ("query_selection.linear.weight", "query_position.layers.0.weight", "query_position.layers.1.weight")
    }
    assert {"transformer.encoder.layers.0.self_attn.in_proj_weight", "transformer.decoder.layers.2.linear2.weight"} <= {
        *matrices
    }
    assert all(each.startswith("backbone") for each in backbone) and "input_proj.weight" in others
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len({*every}) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_resumed_run_with_muon_goes_on_to_the_bit() -> None:
    whole, resumed = make_step(muon=True, learning_rate=1e-3), make_step(muon=True, learning_rate=1e-3)
    whole([FULL])
    resumed.model.load_state_dict(whole.model.state_dict())
    restore_moments(resumed.optimizer, copy.deepcopy(whole.optimizer.state_dict()))
    keep_layouts(resumed.optimizer)
    for step in (whole, resumed):
        torch.manual_seed(1)
        step([FULL])
    assert len(whole.optimizer.state) == len(resumed.optimizer.state) == len(whole.trained)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
