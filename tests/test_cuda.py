"""What only a GPU can show: a whole training step that the driver itself sees not wait, and one that is captured."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from detr_kernels import batched_assignment, conv_bias_act
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_fast.config import MODELS
from detr_fast.data.batch import Batch
from detr_fast.data.loader import on_device
from detr_fast.detector import Detector
from detr_fast.model.detr import DETR
from detr_fast.options import Attention, Device, Kernels, Precision, RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training.graphed_step import GraphedStep, why_not_graphed
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.step import TrainStep
from tests import factories
from tests.factories import make_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CONFIG = replace(MODELS["detr_r50"], encoder_layers=2, decoder_layers=3, dropout=0.0)


@pytest.fixture
def no_waits() -> Iterator[None]:
    """The driver raises where the host waits for the device; set by the test once everything is warm."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def batch_of_three() -> Batch:
    return make_batch([(160, 224), (128, 192), (96, 224)], [3, 0, 7]).pin_memory()


def make_step(
    kernels: Kernels, attention: Attention, precision: Precision, device: Device = "cuda", dropout: float = 0.0
) -> TrainStep:
    options = RuntimeOptions(device=device, precision=precision, kernels=kernels, attention=attention)
    return factories.make_step(replace(CONFIG, dropout=dropout), choose_runtime(options), decay=0.9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("kernels", "attention"), [("triton", "triton"), ("triton", "xformers"), ("auto", "auto")])
@pytest.mark.usefixtures("no_waits")
def test_a_whole_step_does_not_wait(kernels: Kernels, attention: Attention, precision: Precision) -> None:
    step, batch = make_step(kernels, attention, precision, dropout=0.1), batch_of_three().to("cuda")
    step([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    terms = step([batch])
    torch.cuda.set_sync_debug_mode("default")
    assert terms["loss"].isfinite()


@pytest.mark.parametrize(("kernels", "attention"), [("triton", "triton"), ("auto", "sdpa")])
def test_the_same_step_as_on_the_cpu(kernels: Kernels, attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # fifty layers of it would hide a mistake
    on_cpu, on_gpu = make_step("ref", "ref", "fp32", "cpu"), make_step(kernels, attention, "fp32")
    on_gpu.model.load_state_dict(on_cpu.model.state_dict())
    expected, found = on_cpu([batch_of_three()]), on_gpu([batch_of_three().to("cuda")])
    for name in (name for name in expected if name.startswith("loss")):
        value = expected[name]
        assert found[name].item() == pytest.approx(value.item(), rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("kernels", "attention"), [("triton", "auto"), ("auto", "auto")])
def test_the_captured_step_is_the_same_step(kernels: Kernels, attention: Attention, precision: Precision) -> None:
    """Two shapes in turn, with dropout from the same seeds, several replays of each; the driver raises at a wait.

    FlashAttention and others add in no fixed order, and AdamW makes a step of the smallest gradient: so the weights may
    be twice as far apart as those of two plain runs, and by half of one of the eight steps, which no mistake would be.
    """
    plain, again, captured = (make_step(kernels, attention, precision, dropout=0.1) for _ in range(3))
    start = weights(plain)
    for step in (again, captured):
        step.model.load_state_dict(plain.model.state_dict())
    assert why_not_graphed(captured) is None
    graphed = GraphedStep(MicroBatches(captured))
    halves = batch_of_three().to("cuda").split(2)
    for number in range(8):
        batches = [batch_of_three().to("cuda") if number % 2 else halves[0]]
        terms = []
        running: TrainStep | GraphedStep
        for running in (plain, again, graphed):
            torch.manual_seed(number)
            if number > 5:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            found = running(batches)
            torch.cuda.set_sync_debug_mode("default")
            terms.append({name: value.item() for name, value in found.items() if name.startswith("loss")})
        assert terms[2] == pytest.approx(terms[0], rel=2e-2, abs=1e-3), number
    end = weights(plain)
    noise, moved = (weights(again) - end).norm(), (end - start).norm()
    assert (weights(captured) - end).norm() <= 2 * noise + moved / 16


def weights(step: TrainStep) -> Tensor:
    """All that the step trains, in one tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in step.trained])


@pytest.mark.parametrize("residual", [False, True])
def test_cudnns_fused_convolution_reads_no_memory_that_nobody_wrote(residual: bool) -> None:
    """Without a residual cuDNN is given its own output as one, times 0: a NaN that lies there must not get in."""
    x, weight = (torch.randn(2, 64, side, side, device="cuda").half() for side in (56, 3))
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight.repeat(32, 1, 1, 1)))
    bias, more = torch.randn(64, device="cuda").half(), torch.randn_like(x) if residual else None
    expected = conv_bias_act(x.float(), weight.float(), bias.float(), more if more is None else more.float(), 1, 1)
    for _ in range(3):
        poison = torch.full_like(x, float("nan"))  # the next tensor of its size lies where it did
        del poison
        found = conv_bias_act(x, weight, bias, more, 1, 1, backend="cudnn")
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=0.1)


def test_the_largest_shape_is_captured_first() -> None:
    """Smaller ones then take no more memory for their graphs than it did, but for the gradients' first calls."""
    step = GraphedStep(MicroBatches(make_step("auto", "auto", "bf16")))
    batch = batch_of_three().to("cuda")
    step.find_micro_batch_size(batch)
    assert not step.gave_up and step.micro_batches.count == 1 and not torch.backends.cudnn.benchmark
    assert len(step.gradient_graphs.graphs) == 1
    for each in (batch, batch.split(3)[0], batch.split(3)[0]):
        assert step([each])["loss"].isfinite()
    one, other = (each.inputs[0].images for each in step.gradient_graphs.graphs.values())
    assert one.data_ptr() == other.data_ptr()


def test_a_captured_step_of_fp16_skips_what_is_not_finite() -> None:
    """The scale lies on the device: a replay halves it and leaves the weights as they are, without the host."""
    step, factor = make_step("auto", "auto", "fp16"), torch.ones((), device="cuda")
    step.model.query_embed.weight.register_hook(lambda gradient: gradient * factor)
    graphed, batch = GraphedStep(MicroBatches(step)), batch_of_three().to("cuda")
    for number in range(6):
        factor.fill_(float("inf") if number == 4 else 1.0)
        scale = step.scaler.get_scale()
        before = [each.detach().clone() for each in step.model.parameters()]
        terms = graphed([batch])
        same = all(map(torch.equal, step.model.parameters(), before))
        skipped = terms["skipped"].item() == 1
        assert same == skipped and step.scaler.get_scale() == (scale / 2 if skipped else scale)
        assert skipped or number != 4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("kernels", "attention"), [("triton", "auto"), ("auto", "auto")])
@pytest.mark.usefixtures("no_waits")
def test_replayed_inference_finds_the_same(kernels: Kernels, attention: Attention, precision: Precision) -> None:
    """Two shapes in turn, ragged and not; what was found is kept over later replays, which wait for nothing."""
    torch.manual_seed(0)
    options = RuntimeOptions(device="cuda", precision=precision, kernels=kernels, attention=attention)
    runtime = choose_runtime(options)
    detector = Detector(DETR(CONFIG).eval()).optimize(runtime)
    eager = Detector(detector.network, runtime=replace(runtime, capture=False))
    assert detector.replays and not eager.replays
    batches = [batch_of_three().split(count)[0] for count in (1, 3, 1, 1, 3, 3, 1)]
    expected, found = [eager.detect(batch) for batch in batches], []
    for number, batch in enumerate(batches):
        if number > 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        found.append(detector.detect(batch))
        torch.cuda.set_sync_debug_mode("default")
    assert detector.graphs is not None and len(detector.graphs.graphs) == 2
    for one, other in zip(expected, found, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_batches_come_copied_one_ahead() -> None:
    batches = [batch_of_three() for _ in range(3)]
    for batch, arrived in zip(batches, on_device(batches, torch.device("cuda")), strict=True):
        for there, here in zip(arrived.tensors(), batch.tensors(), strict=True):
            assert there.device.type == "cuda" and torch.equal(there.cpu(), here)


def test_the_assignment_is_captured_and_replayed() -> None:
    cost = torch.rand(96, 100, 30, device="cuda")
    counts = torch.randint(0, 31, (96,), device="cuda")
    batched_assignment(cost, counts, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query_of_target = batched_assignment(cost, counts, "triton")
    for seed in range(3):
        torch.manual_seed(seed)
        cost.copy_(torch.rand(96, 100, 30))
        graph.replay()
        for problem, count in enumerate(counts.tolist()):
            rows, columns = linear_sum_assignment(cost[problem, :, :count].cpu().numpy())
            best = cost[problem, rows, columns].sum().item()
            found = cost[problem, query_of_target[problem, :count], torch.arange(count)].sum().item()
            assert found == pytest.approx(best, rel=1e-5)
