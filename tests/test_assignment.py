"""Batched assignments: SciPy's optimum in every problem, and a valid matching whatever the costs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from detr_kernels import batched_assignment, batched_assignment_ref
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernel_inputs import DEVICE

BACKENDS: list[str] = ["triton", "scipy"]
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("poisoned")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """TimeoutError where what is in it takes longer: a loop without end fails its test."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def solve(cost: Tensor, count: list[int], backend: str = "triton", **options: Any) -> np.ndarray:
    """`batched_assignment` of a cost on the CPU, solved on DEVICE."""
    with alarm(600):
        num_targets = torch.tensor(count, dtype=torch.int64, device=DEVICE)
        found = batched_assignment(cost.to(DEVICE), num_targets, backend, **options)
        assert found.dtype == torch.int64 and found.shape == (len(cost), cost.shape[2])
        return found.cpu().numpy()


def pairs(found: np.ndarray, queries: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and targets of one problem's answer (T,); fails where it is no matching of as many as there can be."""
    assert (found[count:] == -1).all(), f"a target that is none has a query: {found}, {count} targets"
    targets = np.flatnonzero(found != -1)
    chosen = found[targets]
    assert len(targets) == min(queries, count), f"{found} of {queries} queries and {count} targets"
    assert ((chosen >= 0) & (chosen < queries)).all() and len(set(chosen)) == len(chosen), f"{found}"
    return chosen, targets


def assert_optimal(cost: Tensor, count: list[int], found: np.ndarray, relative: float = 1e-5) -> None:
    """Each total is SciPy's to `relative`.

    A sum that cancels also carries the rounding in float64 of what it is a sum of: that much is allowed where there
    are negative costs.
    """
    exact = cost.double().numpy()
    for problem, real in enumerate(count):
        table = exact[problem, :, :real]
        total = table[pairs(found[problem], cost.shape[1], real)].sum()
        least = table[linear_sum_assignment(table)].sum()
        tolerance = 1e-13 * min(table.shape) * np.abs(table).max(initial=0) if (table < 0).any() else 0.0
        assert abs(total - least) <= relative * abs(least) + tolerance, f"{total} is not {least}, problem {problem}"


def random_problems(problems: int, queries: int, targets: int) -> tuple[Tensor, list[int]]:
    """Costs (P, Q, T), a quarter each of four kinds, and numbers of targets: mostly all, at times fewer or none."""
    generator = torch.Generator().manual_seed(problems + targets)
    normal = torch.randn(problems, queries, targets, generator=generator)
    ties = normal.round()
    of_queries = torch.rand(problems, queries, 1, generator=generator)
    of_targets = torch.rand(problems, 1, targets, generator=generator)
    product = of_queries * of_targets  # the classic hard case: every row wants the same columns, so that paths are long
    rounding = of_queries + of_targets  # matchings of the same queries differ by float32's rounding of the costs alone
    kinds = torch.stack([product, rounding, normal, ties])
    cost = kinds[torch.arange(problems) % 4, torch.arange(problems)]
    count = targets - torch.rand(problems, generator=generator).pow(4).mul(targets + 1).long()
    return cost, count.clamp(min=0).tolist()


# problems, queries, targets: many that an interpreter solves in milliseconds, a few as large as DETR's; square, more
# targets than queries, one query, one target, more columns than the least block of 32
SIZES = [
    *[(450, 5, 2), (350, 2, 4), (180, 3, 3), (440, 1, 4), (440, 4, 1), (90, 6, 4)],
    *[(30, 12, 7), (9, 9, 40), (5, 33, 5), (3, 100, 30), (3, 30, 100)],
]


def test_there_are_two_thousand_random_problems() -> None:
    assert sum(problems for problems, _, _ in SIZES) == 2000


@pytest.mark.parametrize(("problems", "queries", "targets"), SIZES)
def test_random_problems_reach_scipys_optimum(problems: int, queries: int, targets: int) -> None:
    cost, count = random_problems(problems, queries, targets)
    assert_optimal(cost, count, solve(cost, count), relative=1e-12)  # costs are float32: sums are not


def values(*groups: list[float], low: float = -100) -> st.SearchStrategy[float]:
    """Few values, so that ties are many, or any of float32 between `low` and 100."""
    return st.one_of(*map(st.sampled_from, groups), st.floats(low, 100, width=32))


@st.composite
def problems(draw: st.DrawFn, entries: st.SearchStrategy[float], most: int = 4) -> tuple[Tensor, list[int]]:
    """One or two problems of up to `most` queries and targets, and none of either at times."""
    shape = draw(st.integers(1, 2)), draw(st.integers(0, most)), draw(st.integers(0, most))
    kind = draw(st.sampled_from(["any", "equal", "any"]))
    size = shape[0] * shape[1] * shape[2]
    table = [draw(entries)] * size if kind == "equal" else draw(st.lists(entries, min_size=size, max_size=size))
    count = draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]))
    return torch.tensor(table, dtype=torch.float32).view(shape), count


property_test = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@property_test
@given(problems(values([0, 1, 2, 3], [1e30, 1e-30, 3e38], low=0)))
def test_huge_and_tiny_costs_and_ties(problem: tuple[Tensor, list[int]]) -> None:
    """None is negative, so nothing cancels: to 1e-5 of the total even where huge costs lie beside a tiny optimum."""
    cost, count = problem
    assert_optimal(cost, count, solve(cost, count))


@property_test
@given(problems(values([-3, -2, -1, 0, 1, 2], [-3e38, 1e30, -1e-30])))
def test_negative_costs(problem: tuple[Tensor, list[int]]) -> None:
    cost, count = problem
    assert_optimal(cost, count, solve(cost, count))


@property_test
@given(problems(st.integers(-5, 5).map(float)))
def test_integer_costs_are_exact(problem: tuple[Tensor, list[int]]) -> None:
    cost, count = problem
    assert_optimal(cost, count, solve(cost, count), relative=0)


def assert_least_broken(cost: Tensor, count: list[int], found: np.ndarray) -> list[float]:
    """As few non-finite pairs as can be; returns what the finite pairs of each problem cost."""
    finite_totals = []
    for problem, real in enumerate(count):
        table = cost[problem, :, :real].double().numpy()
        broken = ~np.isfinite(table)
        matched = pairs(found[problem], cost.shape[1], real)
        assert broken[matched].sum() == broken[linear_sum_assignment(broken)].sum(), f"{table}: {found[problem]}"
        finite_totals.append(table[matched][~broken[matched]].sum())
    return finite_totals


def number_broken(cost: Tensor, count: list[int]) -> int:
    return sum(int((~cost[problem, :, :real].isfinite()).sum()) for problem, real in enumerate(count))


@property_test
@given(problems(values([0, 1, -2], [NAN, INF, -INF], [NAN, INF, -INF])))
def test_non_finite_costs_are_matched_last_and_counted(problem: tuple[Tensor, list[int]]) -> None:
    cost, count = problem
    counter = torch.full((1,), 1000, device=DEVICE)
    totals = [assert_least_broken(cost, count, solve(cost, count, each, nonfinite=counter)) for each in BACKENDS]
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5, atol=1e-10)
    assert counter.item() == 1000 + 2 * number_broken(cost, count)


@each_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (3, 5), (4, 4)])
def test_whole_rows_columns_and_problems_that_are_not_finite(
    queries: int, targets: int, bad: float, backend: str
) -> None:
    cost = torch.randn(4, queries, targets, generator=torch.Generator().manual_seed(1)) * 1e3
    cost[0, 1], cost[1, :, 2], cost[2], cost[3, 0, 0] = bad, bad, bad, bad
    count, counter = [targets] * 4, torch.zeros(1, dtype=torch.int64, device=DEVICE)
    found = solve(cost, count, backend, nonfinite=counter)
    assert counter.item() == queries + targets + queries * targets + 1
    for problem, total in enumerate(assert_least_broken(cost, count, found)):
        table = torch.where(cost[problem].isfinite(), cost[problem], 1e6).double().numpy()
        least = table[linear_sum_assignment(table)]
        assert total == pytest.approx(least[least < 1e6].sum(), rel=1e-9, abs=1e-9)


def test_non_finite_costs_far_from_the_first() -> None:
    """Among more entries than a program looks at together: the last target wants the last query, or else the first."""
    cost = torch.ones(2, 300, 2)
    cost[0, -1], cost[1, 0, 1], cost[1, -1, 1], cost[1, 1:-1, 1] = NAN, -1e6, -2e6, INF
    for backend in BACKENDS:
        counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        found = solve(cost, [2, 2], backend, nonfinite=counter)
        assert counter.item() == 2 + 298 and found[1, 1] == 299
        assert_least_broken(cost, [2, 2], found)


def test_penalty_of_costs_at_both_ends_of_float32() -> None:
    """A fixed penalty would be cheaper than the first problem's costs, and hide the difference of the second's."""
    cost = torch.tensor([[[3e38, NAN], [NAN, 3e38]], [[1e-30, NAN], [2e-30, NAN]], [[NAN, 0], [0, NAN]]])
    for backend in BACKENDS:
        assert solve(cost, [2, 2, 2], backend).tolist() == [[0, 1], [0, 1], [1, 0]]


@each_backend
def test_padding_changes_nothing_and_is_not_counted(backend: str) -> None:
    cost, _ = random_problems(6, 5, 7)
    count, counter = [0, 1, 3, 5, 6, 7], torch.zeros(1, dtype=torch.int64, device=DEVICE)
    padded = cost.clone()
    for problem, real in enumerate(count):
        padded[problem, :, real:] = torch.tensor([NAN, INF, -INF] * 3)[: 7 - real]
    found = solve(padded, count, backend, nonfinite=counter)
    assert counter.item() == 0
    assert_optimal(cost, count, found)
    np.testing.assert_array_equal(found, solve(cost, count, backend))


@each_backend
def test_a_number_of_targets_out_of_range_is_clamped(backend: str) -> None:
    cost, _ = random_problems(4, 3, 2)
    clamped = solve(cost, [0, 0, 2, 2], backend)
    np.testing.assert_array_equal(solve(cost, [-1, 1 - 2**40, 9, 2**40], backend), clamped)


@each_backend
@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0), (2, 0, 0), (2, 1, 1)])
def test_empty_sides(shape: tuple[int, int, int], backend: str) -> None:
    count, counter = [shape[2]] * shape[0], torch.zeros(1, dtype=torch.int64, device=DEVICE)
    found = solve(torch.zeros(shape), count, backend, nonfinite=counter)
    assert (found == (0 if shape[1] else -1)).all()
    assert counter.item() == 0


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_as_it_is(dtype: torch.dtype, backend: str) -> None:
    cost, count = random_problems(6, 5, 4)
    half = cost.to(dtype)
    np.testing.assert_array_equal(solve(half, count, backend), solve(half.float(), count, backend))


def test_no_values_make_it_run_for_ever() -> None:
    """The extremes of float32 and nothing finite, on both sides' excess: each is solved before the alarm rings."""
    for queries, targets in [(3, 8), (8, 3)]:
        for value in (NAN, INF, -INF, 3.4e38, -3.4e38, 1e-45, -0.0):
            cost = torch.full((2, queries, targets), value)
            cost[1, ::2] *= -1
            found = solve(cost, [targets, targets - 1])
            pairs(found[0], queries, targets), pairs(found[1], queries, targets - 1)


def test_the_reference_is_scipy() -> None:
    cost, count = random_problems(6, 5, 4)
    number, counter = torch.tensor(count, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    cost[0, 0, 0] = NAN
    found = batched_assignment_ref(cost.to(DEVICE), number, counter)
    assert torch.equal(found, batched_assignment(cost.to(DEVICE), number, backend="scipy"))
    assert counter.item() == number_broken(cost, count)


@pytest.mark.parametrize("queries", [3350, 32769])
def test_all_tokens_of_an_image_are_matched(queries: int) -> None:
    """Those of 800 x 1066 at stride 16 by the kernel, more than it takes by SciPy."""
    cost = torch.randn(2, queries, 8, generator=torch.Generator().manual_seed(0))
    assert_optimal(cost, [8, 5], solve(cost, [8, 5]), relative=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    cost, number = torch.zeros(2, 5, 3), torch.ones(2, dtype=torch.int64)
    for bad, message in [
        ((cost[0], number), r"\(5, 3\)"),
        ((cost, number[:1]), r"\(1,\)"),
        ((cost, number.to("meta")), "meta"),
        ((cost.double(), number), "float64"),
        ((cost, number.float()), "got torch.float32 and torch.float32"),
        ((cost, number, "auto", torch.zeros(1)), "one int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            batched_assignment(*bad)


@each_backend
def test_fake_tensors_of_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_kernels.launch.INTERPRETED", False)
    with FakeTensorMode():
        cost, number = torch.empty(6, 100, 63, device="cuda"), torch.empty(6, dtype=torch.int64, device="cuda")
        counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        found = batched_assignment(cost, number, backend, counter)
        assert (found.shape, found.dtype, found.device.type) == ((6, 63), torch.int64, "cuda")


@each_backend
def test_compiles_without_a_graph_break(backend: str) -> None:
    cost, count = random_problems(4, 5, 3)
    cost[0, 0] = NAN

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(cost: Tensor, number: Tensor, counter: Tensor) -> Tensor:
        return batched_assignment(cost * 2, number, backend, counter) + 1

    counter = torch.full((1,), 5, device=DEVICE)
    found = step(cost.to(DEVICE).requires_grad_(), torch.tensor(count, device=DEVICE), counter)
    np.testing.assert_array_equal(found.cpu() - 1, solve(cost * 2, count, backend))
    assert counter.item() == 5 + number_broken(cost, count)


@pytest.mark.skipif(DEVICE == "cpu", reason="a graph is captured on a GPU")
def test_a_captured_graph_solves_what_lies_there_at_its_replay() -> None:
    (cost, count), (later, later_count) = random_problems(6, 5, 4), random_problems(6, 5, 4)
    here, number = cost.to(DEVICE), torch.tensor(count, device=DEVICE)
    batched_assignment(here, number, "triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = batched_assignment(here, number, "triton")
    here.copy_(later.flip(1))
    number.copy_(torch.tensor(later_count).flip(0))
    graph.replay()
    np.testing.assert_array_equal(found.cpu(), solve(later.flip(1), later_count[::-1]))
