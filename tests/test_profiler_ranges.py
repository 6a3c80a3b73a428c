"""The parts of a step have names in a profiler's trace, and cost nothing in a compiled graph."""

import re
import warnings
from pathlib import Path

import torch
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import WorkloadOptions
from torch.profiler import profile

import detr_fast
from detr_fast.profiler_ranges import PROFILER_RANGES, current_range, profiler_range

TINY = WorkloadOptions.of(model="detr_tiny", size="32x32", batch_size=2, device="cpu", precision="fp32", objects=2)


def test_a_step_opens_every_range_but_waiting_for_data() -> None:
    run = build_workload(TINY).run
    with profile(acc_events=True) as profiler:
        run()
    ranges = {event.name: event.time_range for event in profiler.events() if event.name in PROFILER_RANGES}
    assert ranges.keys() == set(PROFILER_RANGES) - {"data wait", "postprocess", "queries"}
    for inner, outer in [("backbone", "forward"), ("encoder", "forward"), ("decoder", "forward"), ("heads", "forward")]:
        assert ranges[outer].start <= ranges[inner].start and ranges[inner].end <= ranges[outer].end


def test_every_range_that_is_opened_is_listed() -> None:
    """Holds the list complete: a range that is not in it is left out of every count."""
    sources = [path.read_text() for path in Path(detr_fast.__file__).parent.rglob("*.py")]
    opened = {name for source in sources for name in re.findall(r'profiler_range\("([^"]+)"\)', source)}
    assert opened == set(PROFILER_RANGES)


def test_the_innermost_open_range_is_known_also_after_an_error() -> None:
    assert current_range() is None
    with profiler_range("forward"):
        try:
            with profiler_range("encoder"):
                assert current_range() == "encoder"
                raise ValueError
        except ValueError:
            assert current_range() == "forward"
    assert current_range() is None


def test_no_break_and_no_word_in_a_compiled_graph() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with profiler_range("encoder"):
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(doubled, fullgraph=True, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [2, 2]
