"""The work of a step, counted by profiler range: floating-point operations, and bytes that must move."""

import gc
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fast.profiler_ranges import PROFILER_RANGES, current_range
from detr_profiling.limits.flops import has_products, operator_flop
from detr_profiling.tracing.timeline import OTHER

aten = torch.ops.aten

UNWRITTEN = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted),
    *(aten.new_empty, aten.new_empty_strided),
}
"""Operators that take memory and leave it as it is."""
SHAPED_LIKE = {
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.randint_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full),
}
"""Operators that take shape and dtype from a tensor and do not read it."""
OVERWRITING = {
    *(aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_, aten.random_, aten.bernoulli_),
    *(aten._foreach_copy_, aten._foreach_zero_),
}
"""In-place operators that do not read the tensor that they write."""
FUSED_OPTIMIZERS = {aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_}
"""Declared to write gradients, which they do only to take a scale off."""

View = tuple[int, ...]
"""Where in its storage a tensor begins, its sizes and strides."""


@dataclass(frozen=True)
class Work:
    """Counts what has to be done in a profiler range; all ranges of one name are one.

    `minimum_bytes` are those that move even if all of it were fused: every tensor that the range reads and
    that others have made, once; and every tensor that it makes and that another range reads, or that outlives the
    run, once. These are weights and images, activations that the backend keeps for the backward pass, gradients, the
    optimizer's state, outputs. Counted by storage: of each the distinct views that were touched, at most all of it.
    An operator that picks entries is taken to read its source whole.

    `moved_bytes` are those of the inputs and outputs of every operator; views are free.
    """

    flop: int
    minimum_bytes: int
    moved_bytes: int

    def __add__(self, other: "Work") -> "Work":
        """Add two ranges as they are: what one leaves to the other counts in both."""
        return Work(
            self.flop + other.flop,
            self.minimum_bytes + other.minimum_bytes,
            self.moved_bytes + other.moved_bytes,
        )


NOTHING = Work(0, 0, 0)


def count_work(run: Callable[[], Any]) -> dict[str, Work]:
    """Count the work of one `run` by the innermost range that is open, or "other". It is really run, once, eagerly.

    A compiled model shows nothing of what it does, so compilation is off meanwhile: what is counted is the same model
    uncompiled. Run it once before, since a first step also makes the optimizer's state. Tensors may be fake or on the
    device `meta`, where nothing is computed.
    """
    counter = _Counter()
    with torch.compiler.set_stance("force_eager"), counter:
        result = run()
    gc.collect()  # what only a cycle holds is not in use
    work = counter.work()
    del result  # not earlier: outputs are to be alive
    return work


@dataclass
class _Traffic:
    """Notes who wrote one storage, who read it, and which parts: bytes by range and view."""

    nbytes: int
    writer: str | None = None
    """The range that wrote it last; None: it was there before the run."""
    read: dict[str, dict[View, int]] = field(default_factory=lambda: defaultdict(dict))
    """Bytes by range and view that a range read and had not written itself."""
    written: dict[str, dict[View, int]] = field(default_factory=lambda: defaultdict(dict))
    used: set[str] = field(default_factory=set)
    """Ranges that wrote what another one read."""

    def note_read(self, range_name: str, view: View, nbytes: int) -> None:
        if self.writer != range_name:
            self.read[range_name][view] = nbytes
            self._use()

    def note_written(self, range_name: str, view: View, nbytes: int) -> None:
        if self.writer != range_name and nbytes < self.nbytes:
            self._use()  # the rest of it stays
        self.writer = range_name
        self.written[range_name][view] = nbytes

    def minimum_bytes(self, alive: bool) -> Iterator[tuple[str, int]]:
        """Yield each range with the bytes that must move for it; `alive`: the storage outlives the run."""
        if alive:
            self._use()
        for range_name, views in self.read.items():
            yield range_name, min(self.nbytes, sum(views.values()))
        for range_name in self.used:
            yield range_name, min(self.nbytes, sum(self.written[range_name].values()))

    def _use(self) -> None:
        if self.writer is not None:
            self.used.add(self.writer)


class _Counter(TorchDispatchMode):
    """Sees every operator, of the backward pass too; nothing of what an operator of ours calls, so nothing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.flop, self.moved, self.packed = Counter[str](), Counter[str](), Counter[str]()
        self.storages: dict[StorageWeakRef, _Traffic] = {}
        """A weak reference keeps a storage's identity when its memory is gone: no later one is taken for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return func(*args, **kwargs)
        if not has_products(func):
            with self:
                result = func.decompose(*args, **kwargs)  # in inference mode, operators that consist of others arrive
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        range_name = current_range() or OTHER
        self.flop[range_name] += operator_flop(func, args, kwargs, result)
        self._count_bytes(range_name, func, args, kwargs, result)
        return result

    def work(self) -> dict[str, Work]:
        minimum = self.packed.copy()
        for storage, traffic in self.storages.items():
            for range_name, nbytes in traffic.minimum_bytes(alive=not storage.expired()):
                minimum[range_name] += nbytes
        work = {name: Work(self.flop[name], minimum[name], self.moved[name]) for name in (*PROFILER_RANGES, OTHER)}
        return {name: each for name, each in work.items() if each != NOTHING}

    def _count_bytes(self, range_name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packed = packed_bytes((args, kwargs))
        self.packed[range_name] += packed
        self.moved[range_name] += packed
        read, written = operands(func, args, kwargs)
        given = {StorageWeakRef(each.untyped_storage()) for each in (*read, *written)}
        outputs = tensors_in(result)
        made = [each for each in outputs if StorageWeakRef(each.untyped_storage()) not in given]
        if func.overloadpacket in UNWRITTEN or (outputs and not made and not written):  # the latter: a view
            return
        for traffic, view, nbytes in self._touched(read):
            traffic.note_read(range_name, view, nbytes)
            self.moved[range_name] += nbytes
        for traffic, view, nbytes in self._touched([*written, *made]):
            traffic.note_written(range_name, view, nbytes)
            self.moved[range_name] += nbytes

    def _touched(self, tensors: list[Tensor]) -> Iterator[tuple[_Traffic, View, int]]:
        """Yield each distinct part of memory once, with its bytes; a dimension of stride 0 has one entry."""
        seen = set()
        for tensor in tensors:
            storage = StorageWeakRef(tensor.untyped_storage())
            view = (tensor.storage_offset(), *tensor.shape, *tensor.stride())
            if tensor.numel() == 0 or (storage, view) in seen:
                continue
            seen.add((storage, view))
            nbytes = tensor.untyped_storage().nbytes()
            traffic = self.storages.setdefault(storage, _Traffic(nbytes))
            entries = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            yield traffic, view, min(nbytes, entries * tensor.element_size())


def operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """List the tensors that an operator (an OpOverload) reads, and those that it writes in place; some are both."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    packet, arguments = func.overloadpacket, func._schema.arguments
    if packet in SHAPED_LIKE:
        return read, written
    values = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    for argument in arguments:
        tensors = tensors_in(values.get(argument.name))
        kept = argument.name == "grads" and packet in FUSED_OPTIMIZERS and values.get("grad_scale") is None
        writes = argument.is_write and not kept
        if writes:
            written += tensors
        if not writes or not (argument.is_out or packet in OVERWRITING):
            read += tensors
    return read, written


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors of a tree, but for weights in oneDNN's own order, whose memory cannot be seen."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


def packed_bytes(tree: Any) -> int:
    """Add up the weights in oneDNN's own order, each as large as it was before."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_mkldnn)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
