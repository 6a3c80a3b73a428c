"""Many small linear assignments at once, exact and without the host: DETR's matcher (Carion et al. 2020, section 3.1).

    minimise  sum_t cost[query(t), t]   over the one-to-one choices of a query for each target

Shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016, which SciPy implements): rows, the smaller side of
the problem, are matched one after another, each by Dijkstra's search over the reduced costs cost[i, j] - u[i] - v[j]
to the nearest free column. One program solves one problem, in float64 like SciPy, with a vector over the columns for
each thing it remembers. u is not kept: a matched pair's reduced cost is 0, so u[i] = cost[i, j] - v[j] for the column j
of row i.

A cost that is NaN or infinite counts as 2 * rows * m, where m is the problem's largest finite magnitude, or as 1 if m
is 0. What is finite in two matchings, of which one has such a pair more, differs by (2 * rows - 1) * m at most: as few
such pairs as possible are matched.
"""

import numpy as np
import torch
from torch import Tensor

from detr_kernels.launch import DTYPES, launch, next_power_of_2, unmeasured, why_not_triton_kernel
from detr_kernels.registry import Backend, Facts, Operation, zero_flop
from detr_kernels.specimens import IMAGES, LAYERS, QUERIES, TARGETS, meta
from detr_kernels.triton_compat import UNALIGNED, tl, triton

MOST_COLUMNS = 32768
"""So that the keys of the Triton kernel fit into int32; wider problems are solved by SciPy."""
CHUNK = 512
"""Entries that a program looks at together for non-finite ones: 16 a thread."""


def _priced(cost: np.ndarray) -> tuple[np.ndarray, int]:
    """Replace non-finite entries of one problem's costs (queries, targets) by their price, and count them."""
    finite = np.isfinite(cost)
    broken = finite.size - np.count_nonzero(finite)
    if broken == 0:
        return cost, 0
    largest = float(np.abs(cost[finite]).max(initial=0.0))
    penalty = 2 * min(cost.shape) * largest if largest > 0 else 1.0
    return np.where(finite, cost.astype(np.float64), penalty), broken


def _solve_on_host(cost: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve as `_solve`, by SciPy. On a GPU it waits for the device: one copy to the host, and one back."""
    from scipy.optimize import linear_sum_assignment

    problems, queries, targets = cost.shape
    found = np.full((problems, targets + 1), -1)  # the last column is the number of non-finite costs
    count = num_targets.clamp(0, targets).float()  # exact up to 2^24
    joined = torch.cat((cost.float().flatten(1), count[:, None]), dim=1).cpu().numpy()
    for problem, row in enumerate(joined):
        real = row[:-1].reshape(queries, targets)[:, : int(row[-1])]
        priced, found[problem, -1] = _priced(real)
        matched_queries, matched_targets = linear_sum_assignment(priced)
        found[problem, matched_targets] = matched_queries
    answer = torch.from_numpy(found).to(cost.device)
    return answer[:, :-1].clone(), answer[:, -1].int()


scipy_op = torch.library.custom_op("detr_kernels::assignment_scipy", _solve_on_host, mutates_args=())


def batched_assignment_ref(cost: Tensor, num_targets: Tensor, nonfinite: Tensor | None = None) -> Tensor:
    """Compute `batched_assignment` by SciPy, which waits for the device on a GPU."""
    return batched_assignment(cost, num_targets, "scipy", nonfinite)


@triton.jit
def _price(entries, penalty):
    """Cast float32 to float64, non-finite entries to `penalty`."""
    return tl.where(tl.abs(entries) < float("inf"), entries.to(tl.float64), penalty)


@triton.jit
def _survey(cost, queries, count, stride_q, stride_t, CHUNK: tl.constexpr):
    """Find the largest finite magnitude of a problem's (queries, count) costs, and count its non-finite ones."""
    largest = tl.full((CHUNK,), 0.0, tl.float32)
    broken = tl.full((CHUNK,), 0, tl.int32)
    size = queries * count
    for first in range(0, size, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        at = entry // count * stride_q + entry % count * stride_t
        magnitude = tl.abs(tl.load(cost + at, mask=entry < size, other=0.0).to(tl.float32))
        finite = magnitude < float("inf")
        largest = tl.maximum(largest, tl.where(finite, magnitude, 0.0))
        broken += tl.where(finite, 0, 1)
    return tl.max(largest, 0), tl.sum(broken, 0)


@triton.jit
def _shortest_path(before, row, rows, row_stride, column_stride, columns, v, keys, penalty, COLUMNS: tl.constexpr):
    """Search by Dijkstra from the unmatched `row` to the nearest free column; row 1 lies row_stride after `before`.

    Returns that column, its distance, every column's distance as far as it is known, and `path`: for each column that
    was reached, the key of the row that it was reached from.
    """
    column = tl.arange(0, COLUMNS)
    at = column * column_stride
    unscanned = column < columns
    distance = tl.full((COLUMNS,), float("inf"), tl.float64)
    path = tl.full((COLUMNS,), 0, tl.int32)
    lowest = tl.full((), 0.0, tl.float64)
    start = lowest
    here = before + row * row_stride
    key = row * COLUMNS
    step = 0
    while (key >= COLUMNS) & (step < rows):  # at most rows - 1 columns are matched, so this many steps find a free one
        entries = _price(tl.load(here + at, mask=unscanned, other=0.0).to(tl.float32), penalty)
        length = start + (entries - v)
        nearer = unscanned & (length < distance)
        distance = tl.where(nearer, length, distance)
        path = tl.where(nearer, key, path)
        lowest = tl.min(tl.where(unscanned, distance, float("inf")), 0)
        # of equally near columns the least key is a free one's, if there is one
        key = tl.min(tl.where(unscanned & (distance == lowest), keys, 2147483647), 0)
        via = key % COLUMNS
        unscanned = unscanned & (column != via)
        here = before + key // COLUMNS * row_stride
        matched = tl.load(here + via * column_stride, mask=key >= COLUMNS, other=0.0).to(tl.float32)
        potential = tl.sum(tl.where(column == via, v, 0.0), 0)
        start = lowest - (_price(matched, penalty) - potential)  # lowest - u of the row of `via`
        step += 1
    return key % COLUMNS, lowest, distance, path


@triton.jit
def _augment(row, rows, sink, path, keys, COLUMNS: tl.constexpr):
    """Match each column on the path from `row` to the free column `sink` with the row that it was reached from."""
    column = tl.arange(0, COLUMNS)
    owner = 0
    step = 0
    while (owner != row) & (step < rows):
        key = tl.sum(tl.where(column == sink, path, 0), 0)
        owner = key // COLUMNS
        keys = tl.where(column == sink, (key & -COLUMNS) | sink, keys)
        sink = key % COLUMNS
        step += 1
    return keys


SIZES = ["queries", "targets", "stride_p", "stride_q", "stride_t"]


# one compilation for any number of targets: otherwise a batch with 1, 16 or 32 of them would compile anew in training
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def _solve_kernel(
    cost,  # (problems, queries, targets), by its strides
    num_targets,  # (problems,) any integer
    query_of_target,  # (problems, targets) int64
    non_finite,  # (problems,) int32
    queries,
    targets,
    stride_p,
    stride_q,
    stride_t,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * stride_p
    count = tl.minimum(tl.maximum(tl.load(num_targets + problem).to(tl.int64), 0), targets).to(tl.int32)
    largest, broken = _survey(cost, queries, count, stride_q, stride_t, CHUNK)
    tl.store(non_finite + problem, broken)

    targets_are_columns = count > queries
    rows, columns = tl.minimum(count, queries), tl.maximum(count, queries)
    row_stride = tl.where(targets_are_columns, stride_q, stride_t)
    column_stride = tl.where(targets_are_columns, stride_t, stride_q)
    penalty = tl.where(largest > 0, 2.0 * rows.to(tl.float64) * largest.to(tl.float64), 1.0)
    column = tl.arange(0, COLUMNS)
    v = tl.full((COLUMNS,), 0.0, tl.float64)
    keys = column  # a column's key: the number of its row, from 1, or 0 if it is free, times COLUMNS, plus the column
    for row in range(1, rows + 1):
        sink, lowest, distance, path = _shortest_path(
            cost - row_stride, row, rows, row_stride, column_stride, columns, v, keys, penalty, COLUMNS
        )
        v += tl.minimum(distance - lowest, 0.0)  # of scanned columns alone: no other is nearer than the free one
        keys = _augment(row, rows, sink, path, keys, COLUMNS)

    # every entry is written once: a target's by its column or by the column that has it, no target's by its number
    row_of_column = keys // COLUMNS - 1
    matched_target = tl.where(targets_are_columns, column, row_of_column)
    matched_query = tl.where(targets_are_columns, row_of_column, column)
    written = tl.where(targets_are_columns, column < count, row_of_column >= 0)
    query_of_target += problem * targets
    tl.store(query_of_target + matched_target, matched_query.to(tl.int64), mask=written)
    none = tl.full((COLUMNS,), -1, tl.int64)
    tl.store(query_of_target + column, none, mask=(column >= count) & (column < targets))


def _empty_outputs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate query_of_target (P, T) int64 and the numbers of non-finite costs (P,) int32."""
    problems, _, targets = cost.shape
    return cost.new_empty((problems, targets), dtype=torch.int64), cost.new_empty((problems,), dtype=torch.int32)


def _solve(cost: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute query_of_target (P, T) int64 and the counts of non-finite costs (P,) int32 from cost (P, Q, T).

    One warp a problem, up to 512 columns: reductions, of which there are three a step, are then shuffles and need no
    barrier. At 128 columns (DETR's 100 queries) a thread holds 4 of each vector; at 4,096 (an image's tokens) 16.
    """
    problems, queries, targets = cost.shape
    columns = max(32, next_power_of_2(max(queries, targets)))
    if columns > MOST_COLUMNS:
        return _solve_on_host(cost, num_targets)
    query_of_target, non_finite = _empty_outputs(cost)
    arguments = (cost, num_targets.contiguous(), query_of_target, non_finite, queries, targets, *cost.stride())
    warps = min(8, max(1, columns // 512))
    launch(_solve_kernel, (problems,), *arguments, COLUMNS=columns, CHUNK=CHUNK, num_warps=warps)
    return query_of_target, non_finite


triton_op = torch.library.custom_op("detr_kernels::assignment", _solve, mutates_args=())


@scipy_op.register_fake
@triton_op.register_fake
def _(cost, num_targets):
    return _empty_outputs(cost)


def _specimens() -> None:
    """Match the queries of all layers, and all tokens of 16 pixels of 800 x 1066."""
    for problems, columns in ((LAYERS * IMAGES, QUERIES), (LAYERS * IMAGES, 300), (IMAGES, 50 * 67)):
        cost = meta(problems, columns, TARGETS, dtype=torch.float32)
        _solve(cost, meta(problems, dtype=torch.int64))


OPERATION = Operation(
    "assignment",
    (
        Backend(
            "triton",
            why_not_triton_kernel,
            lambda facts: unmeasured(facts) if facts.device.type == "cpu" else None,
            reason="SciPy would wait for the device",
        ),
        Backend("scipy"),
    ),
    mode="training",
    flop=dict.fromkeys(("assignment", "assignment_scipy"), zero_flop),
    specimens=_specimens,
)


def batched_assignment(
    cost: Tensor, num_targets: Tensor, backend: str = "auto", nonfinite: Tensor | None = None
) -> Tensor:
    """Find the query of each target, (P, T) int64, at the least total cost of each of P problems.

    cost (P, Q, T) float32, bfloat16 or float16, of any strides; num_targets (P,) integers: how many of each problem's T
    columns are real, the others are not looked at. -1 where there is no target, or no query left for it: of more
    targets than queries the cheapest Q are matched. Exact; of several optima, backends may choose different ones.

    `nonfinite` (1,) int64: to it is added the number of NaN and infinite costs of real targets. Such pairs are matched
    last; the answer is a matching whatever the costs. Has no gradient.

    With SciPy a GPU is waited for, and no graph can be captured. Triton's kernel holds a problem's larger side in
    registers, up to 32768; wider ones are SciPy's. Raises ValueError for shapes or dtypes that do not fit and
    RuntimeError where Triton is asked for and cannot run.
    """
    if cost.dim() != 3 or num_targets.shape != cost.shape[:1] or num_targets.device != cost.device:
        given = [(tuple(each.shape), str(each.device)) for each in (cost, num_targets)]
        raise ValueError(f"cost must be (P, Q, T) and num_targets (P,), on one device; got {given[0]} and {given[1]}")
    if cost.dtype not in DTYPES or num_targets.is_floating_point():
        raise ValueError(f"cost must be of {DTYPES}, num_targets integer; got {cost.dtype} and {num_targets.dtype}")
    if nonfinite is not None and (nonfinite.dtype != torch.int64 or nonfinite.numel() != 1):
        raise ValueError(f"nonfinite must be one int64; got {tuple(nonfinite.shape)} {nonfinite.dtype}")
    solve = triton_op if OPERATION.choose(Facts(cost.device), backend).backend == "triton" else scipy_op
    query_of_target, broken = solve(cost, num_targets)
    if nonfinite is not None:
        nonfinite += broken.sum()
    return query_of_target
