"""The step's promises: nothing read on the host, and the same step however it is run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.config import MODELS, ModelConfig, UserError
from detr_fast.data.batch import Batch
from detr_fast.model.detr import DETR
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training import criterion as criterion_module
from detr_fast.training.criterion import build_criterion
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.snapshot import batch_norm_statistics
from detr_fast.training.step import TrainStep
from detr_fast.weights import build_model
from tests import factories
from tests.factories import TINY, make_batch

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


RAGGED = make_batch([(64, 64), (48, 56)], [2, 1])
FULL = make_batch([(64, 64), (64, 64)], [2, 0])


def make_step(config: ModelConfig = TINY, decay: float = 0.0, muon: bool = False, **options: Any) -> TrainStep:
    runtime = choose_runtime(RuntimeOptions(**{"device": "cpu", "precision": "fp32", **options}))
    return factories.make_step(config, runtime, decay=decay, muon=muon)


def gradients(step: TrainStep) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in step.trained if parameter.grad is not None])


class CountHostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("data", [RAGGED, FULL], ids=["ragged", "one size"])
def test_a_step_asks_the_device_for_nothing(data: Batch, scaled: bool) -> None:
    """But for the assignment, which SciPy solves on the host: one copy there, which on a CPU is no read."""
    step = make_step(decay=0.9)
    step.scaler = torch.amp.GradScaler("cpu", enabled=scaled)  # as fp16 has it
    step([data])
    with CountHostReads() as count:
        step([data])
    assert count.reads == []


def test_a_host_read_in_the_step_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = criterion_module.match

    def reading(*arguments: Any) -> Any:
        arguments[0].logits.sum().item()
        return original(*arguments)

    monkeypatch.setattr(criterion_module, "match", reading)
    with CountHostReads() as count:
        make_step()([FULL])
    assert len(count.reads) == 1


@pytest.mark.parametrize("change", [{"channels_last": False}, {"kernels": "ref"}, {"attention": "ref"}])
def test_how_it_runs_does_not_change_what_it_computes(change: dict[str, Any]) -> None:
    one, other = make_step(), make_step(**change)
    assert one([RAGGED])["loss"].item() == pytest.approx(other([RAGGED])["loss"].item(), rel=1e-5)
    assert (gradients(one) - gradients(other)).norm() < 1e-3 * gradients(one).norm()


def test_recomputed_activations_give_the_same_gradients_dropout_included() -> None:
    one, other = (make_step(replace(TINY, dropout=0.1)) for _ in range(2))
    other.model.transformer.checkpoint_activations = True
    for step in (one, other):
        torch.manual_seed(1)
        step([FULL])
    assert torch.equal(gradients(one), gradients(other))


def test_the_compiled_step_is_the_same_step() -> None:
    one, other = make_step(), make_step(compile=True)
    assert one([FULL])["loss"].item() == pytest.approx(other([FULL])["loss"].item(), rel=1e-4)
    assert (gradients(one) - gradients(other)).norm() < 1e-3 * gradients(one).norm()


def test_bf16_autocast_stays_near_fp32_and_keeps_the_losses_in_fp32() -> None:
    one, other = make_step(), make_step(precision="bf16")
    exact, rough = one([FULL]), other([FULL])
    assert rough["loss"].dtype == torch.float32
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)
    assert rough["loss"].item() != exact["loss"].item()


def test_the_average_follows_its_formula() -> None:
    step = make_step(decay=0.75)
    assert step.ema is not None
    before = step.ema.query_embed.weight.clone()
    step([FULL])
    expected = 0.75 * before + 0.25 * step.model.query_embed.weight
    torch.testing.assert_close(step.ema.query_embed.weight, expected)
    norm = step.model.backbone.bn1.running_mean  # type: ignore[union-attr]
    assert torch.equal(step.ema.backbone.bn1.running_mean, norm)  # type: ignore[union-attr]


def test_the_average_forgets_its_start() -> None:
    """Its first steps go far; later ones no less far than the decay that is asked for."""
    step = make_step(decay=0.75)
    rates = []
    for number in (0, 2, 100):
        step.warm_ema_up(number)
        rates.append(step.ema_rate.item())
    assert rates == pytest.approx([0.9, 0.75, 0.25])
    step.warm_ema_up(0)
    assert step.ema is not None
    before = step.ema.query_embed.weight.clone()
    step([RAGGED])
    moved = before + 0.9 * (step.model.query_embed.weight - before)
    torch.testing.assert_close(step.ema.query_embed.weight, moved)


def test_what_training_does_not_change_is_not_copied() -> None:
    """A frozen batch norm's four buffers, 53 times in a ResNet-50, are neither averaged nor sent to other ranks."""
    model = DETR(replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=1, hidden_dim=32, feedforward_dim=32))
    assert len(list(model.buffers())) == 212 and batch_norm_statistics(model) == []
    tiny = DETR(TINY)
    assert len(batch_norm_statistics(tiny)) == len(list(tiny.buffers())) > 0


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    step = make_step()
    assert step([FULL])["grad_norm"] > 0.1
    assert gradients(step).norm().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_28_a_step_with_a_gradient_that_is_not_finite_changes_nothing(value: float, muon: bool) -> None:
    step = make_step(decay=0.5, muon=muon)
    step([FULL])
    assert step.ema is not None
    before = [each.detach().clone() for each in step.model.parameters()]
    moments = [each.clone() for state in step.optimizer.state.values() for each in state.values()]
    hook = step.model.query_embed.weight.register_hook(lambda gradient: gradient * value)
    terms = step([FULL])
    hook.remove()
    assert terms["loss"].isfinite() and terms["skipped"].item() == 1
    assert all(map(torch.equal, step.model.parameters(), before))
    after = [each for state in step.optimizer.state.values() for each in state.values()]
    assert all(map(torch.equal, after, moments))
    assert all(each.isfinite().all() for each in step.ema.parameters())
    assert step([FULL])["skipped"].item() == 0
    assert not all(map(torch.equal, step.model.parameters(), before))


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="fp16"):
        choose_runtime(RuntimeOptions(device="cpu", precision="fp16"))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        choose_runtime(RuntimeOptions(device="cpu", compile=True))


def test_a_timm_backbone_trains_with_its_batch_norm_frozen() -> None:
    sizes = {"hidden_dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 32}
    model = build_model("resnet10t", num_classes=6, **sizes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, 1e-2, 1e-2, 0.0)
    step = TrainStep(model.train(), build_criterion(6), optimizer, choose_runtime(RuntimeOptions(device="cpu")))
    step([RAGGED])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone") for name in changed)
    assert not any("running" in name or ".bn" in name for name in changed)
