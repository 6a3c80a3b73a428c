"""`python -m detr_profiling launches`: what a GPU would be told to do in a training step, counted without one.

The step runs on fake tensors: every operator that launches is counted where it is called, in the forward and the
backward pass and the optimizer. An operator is one launch, a convolution with a bias two (cuDNN's and the addition);
some are more in truth (a sum in two passes, FlashAttention's gradient), so what is counted is a lower bound.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from detr_kernels import PackedImages
from detr_kernels.launch import launches_to
from detr_kernels.preprocessing.resize import Slot
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fast.config import ModelConfig, model_config, require
from detr_fast.console import Console
from detr_fast.data.batch import Batch, Targets
from detr_fast.model.backends import reasons, select_backends
from detr_fast.model.detr import DETR
from detr_fast.option_groups import Options
from detr_fast.options import Attention, Kernels
from detr_fast.profiler_ranges import PROFILER_RANGES, current_range
from detr_fast.runtime import Runtime
from detr_fast.training.criterion import build_criterion
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep
from detr_profiling.absent_gpu import absent_gpu, made_on
from detr_profiling.limits.counting import UNWRITTEN
from detr_profiling.pages.blocks import Section, Table, cells, figures, words
from detr_profiling.pages.terminal import show
from detr_profiling.tracing.timeline import OTHER

aten = torch.ops.aten
NOTHING_RUNS = UNWRITTEN | {aten._unsafe_view, aten.detach, aten.lift_fresh}
"""Operators that are no views by their schema, and yet launch nothing."""
SHAPES = 10
ONE_CALL = {"detr_kernels::conv_bias_act_library"}
"""Our operators that are one call of a library, which knows no fake tensors."""
COPIES = {aten._to_copy, aten.copy_}


@dataclass(frozen=True, kw_only=True)
class LaunchesOptions(Options):
    """Launches, device synchronisations and compiled graphs of a training step, counted on a GPU that is not there."""

    model: str = "detr_r50"
    batch_size: int = 16
    size: tuple[int, int] = (800, 1066)
    """Height and width of the batch in pixels."""
    kernels: Kernels = "auto"
    attention: Attention = "auto"
    compile: bool = False
    """Compile model and loss too, as far as AOTAutograd, at ten shapes: takes a minute or two."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least 1.")
        require(min(self.size) >= 64, f"--size {self.size}: sides of at least 64 pixels.")
        require(self.kernels != "ref", "--kernels ref: SciPy's assignment reads values, and nothing here has any.")


class Launches(TorchDispatchMode):
    """Counts, by the innermost open range, operators that launch on `cuda`, and the launches of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.by_range: dict[str, Counter[str]] = {}
        """Profiler range to operator or kernel to how often."""
        self.synchronizations: list[str] = []
        """Operators that took something from the device to the host, or brought it from memory that is not pinned."""
        self.ours: set[str] = set()
        """Our operators that ran."""

    def note(self, name: str) -> None:
        self.by_range.setdefault(current_range() or OTHER, Counter())[name] += 1

    def note_triton(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.note(kernel.fn.__name__)
        if not isinstance(arguments[0], FakeTensor):
            kernel[grid](*arguments, **options)

    def totals(self) -> dict[str, int]:
        """Count the launches by range, in the order of a step."""
        return {name: self.by_range[name].total() for name in (*PROFILER_RANGES, OTHER) if name in self.by_range}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "detr_kernels" and func.name() not in ONE_CALL:
            self.ours.add(func.name().removeprefix("detr_kernels::"))
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):
            return result
        taken, given = ({x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in (args, result))
        if ("cuda" in taken and "cpu" in given) or (
            "cpu" in taken and "cuda" in given and func.overloadpacket in COPIES
        ):
            self.synchronizations.append(str(func))
        if "cuda" in taken | given and not func.is_view and func.overloadpacket not in NOTHING_RUNS:
            self.note(func.name())
            if func.overloadpacket is aten.convolution and args[2] is not None:
                self.note("bias of a convolution")
        return result


@dataclass
class Graphs:
    """A backend of torch.compile that runs what AOTAutograd traced, and remembers how many launching nodes that is."""

    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    def backend(self, graph: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._counted(self.forward), bw_compiler=self._counted(self.backward))(
            graph, inputs
        )

    @staticmethod
    def _counted(into: list[int]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            operators = (node.target for node in graph.graph.nodes if node.op == "call_function")
            into.append(sum(_launches(operator) for operator in operators))
            return make_boxed_func(graph.forward)

        return compiler


def _launches(operator: Any) -> bool:
    if not isinstance(operator, torch._ops.OpOverload):
        return False  # arithmetic on sizes, or an element of a tuple
    return not operator.is_view and operator.overloadpacket not in NOTHING_RUNS


def make_batch(
    device: torch.device,
    images: int,
    padded_size: tuple[int, int],
    padded: bool,
    targets: int = 16,
    hflip: bool = True,
) -> Batch:
    """Draw images of 3/5 the sides of `padded_size`, to be resized to it; if `padded`, every other one is narrower
    by a sixteenth."""
    height, width = (3 * side // 5 for side in padded_size)
    slots = tuple(
        Slot(
            index * height * width * 3,
            *(height, width),
            *(padded_size[0], padded_size[1] - (padded_size[1] // 16 if padded and index % 2 else 0)),
            int(hflip),
        )
        for index in range(images)
    )
    buffer = torch.randint(0, 256, (images * height * width * 3,), dtype=torch.uint8, device=device)
    packed = PackedImages(buffer, torch.tensor(slots).to(device), slots)
    objects = Targets(
        torch.zeros(images, targets, dtype=torch.int64, device=device),
        torch.rand(images, targets, 4, device=device) * 0.3 + 0.2,
        torch.full((images,), targets // 2, device=device),
    )
    sizes = torch.full((images, 2), 480, device=device)
    return Batch(packed, padded_size, objects, list(range(images)), sizes)


def make_step(
    config: ModelConfig, device: torch.device, kernels: Kernels = "auto", attention: Attention = "auto"
) -> TrainStep:
    """Make a step of a model of random weights in bf16, with the EMA model, all on the device."""
    runtime = Runtime(device, torch.bfloat16, True, False, kernels, attention, {})
    model, ema = (made_on(device, lambda: DETR(config)) for _ in range(2))
    ema.requires_grad_(False)
    select_backends(model, kernels, attention, runtime.dtype)
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
    return TrainStep(
        model, build_criterion(config.num_classes, scores=config.scores), optimizer, runtime, ema=ema, ema_decay=0.9
    )


def count_step(step: TrainStep, batch: Batch) -> Launches:
    """Count a second step: the first makes the optimizer's state, and whatever is kept."""
    launches = Launches()
    step([batch])
    with launches_to(launches.note_triton), launches:
        step([batch])
    return launches


def inputs_of(step: TrainStep, batch: Batch) -> tuple[Tensor, Tensor | None, Targets]:
    """Return images, mask and targets, as `loss_of` takes them."""
    images, mask = replace(step.preprocessing, backend="ref")(batch)
    return images, mask, batch.targets


def loss_of(step: TrainStep) -> Callable[..., Tensor]:
    """Give the function from images, mask and targets to the loss, to be compiled as one."""

    def loss(images: Tensor, mask: Tensor | None, targets: Targets) -> Tensor:
        with step.runtime.autocast():
            predictions = step.model.predict_layers(images, mask)
        return step.criterion(predictions, targets)["loss"]

    return loss


def compile_at(
    step: TrainStep, batches: Sequence[Batch], backend: Any, fullgraph: bool = True, backward: bool = False
) -> dict[str, int]:
    """Compile model and loss by `backend`, call them with each batch, and count graphs and graph breaks.

    With `fullgraph` torch raises at the first break.
    """
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss_of(step), fullgraph=fullgraph, backend=backend)
    for batch in batches:
        loss = compiled(*inputs_of(step, batch))
        if backward:  # AOTAutograd compiles it when it first runs
            loss.backward()
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": counters["graph_break"].total()}


def counted(found: Mapping[str, int]) -> str:
    """Word counts as in "2 graphs, 0 breaks"."""
    return ", ".join(f"{count} {name}" for name, count in found.items())


def launches_table(launches: Launches) -> Table:
    """Return launches by range with the operators that launch most, and all of them together."""
    totals = launches.totals()
    rows = []
    for name, count in totals.items():
        most = ", ".join(f"{operator} {often}" for operator, often in launches.by_range[name].most_common(4))
        rows.append(cells(name, str(count), most))
    waits = f"{len(launches.synchronizations)} device synchronisations"
    rows.append(cells("together", str(sum(totals.values())), waits))
    return Table("Launches in a step", [*words("range"), *figures("launches"), *words("most frequent")], rows)


def main(options: LaunchesOptions) -> int:
    require(not torch.cuda.is_available(), "There is a GPU: python -m detr_profiling trace shows what it really does.")
    console = Console()
    (height, width), images = options.size, options.batch_size
    config = model_config(options.model)
    with absent_gpu() as device:
        step = make_step(config, device, options.kernels, options.attention)
        for name, reason in reasons(step.model, step.model.selection, training=True).items():
            console.print(f"{name}: {reason}")
        for padded in (True, False):
            launches = count_step(step, make_batch(device, images, options.size, padded))
            show([Section("Padded" if padded else "One size", [launches_table(launches)])], console)
        if options.compile:
            sizes = [(height - 32 * (index % 4), width - 32 * (index % 5)) for index in range(SHAPES)]
            batches = [make_batch(device, images, size, True) for size in sizes]
            graphs = Graphs()
            first = compile_at(step, batches[:1], graphs.backend, fullgraph=False, backward=True)
            nodes = f"{sum(graphs.forward):,} launching nodes forward, {sum(graphs.backward):,} backward"
            console.print(f"compiled, one shape: {counted(first)}; {nodes}, before any fusion")
            several = compile_at(step, batches, "eager", fullgraph=False)
            console.print(f"compiled, {SHAPES} shapes: {counted(several)}")
    return 0
