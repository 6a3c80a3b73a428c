"""The report's section on what `tune` tried on this machine, and what `auto` takes since."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detr_fast.tuning import Case, Trial, Tuning
from detr_profiling.pages import formats
from detr_profiling.pages.blocks import (
    BAD,
    GOOD,
    Block,
    Cell,
    Paragraph,
    Section,
    Table,
    cells,
    figures,
    sentence,
    words,
)

TONES = {"won": GOOD, "not close": BAD, "failed": BAD}


def tuning_sections(entries: Mapping[str, Any]) -> Iterator[Section]:
    """Yield, for each mode, what won and every candidate beside the best before it; then on what machine."""
    blocks: list[Block] = []
    machines: list[dict[str, str]] = []
    for entry in map(Tuning.from_dict, entries.values()):
        case = Case.from_dict(entry.case)
        blocks += [Paragraph(sentence([case.text(), outcome(entry)])), trials_table(entry.parsed_trials(), case.mode)]
        facts = entry.environment | {"commit": entry.commit, "date": entry.date}
        machines.append({name: str(value) for name, value in facts.items() if value is not None})
    for number, machine in enumerate(machines):
        if machine not in machines[:number]:
            facts_text = ", ".join(f"{name} {value}" for name, value in machine.items())
            blocks.append(Paragraph(f"Measured on: {facts_text}."))
    yield Section("Tuning", blocks)


def trials_table(trials: Sequence[Trial], mode: str) -> Table:
    columns = [
        *words("switch", "value"),
        *figures("ms", "best so far, ms", "IQR, ms", "error", "of allowed, %"),
        *words("outcome"),
    ]
    return Table(f"Candidates in {mode}, in turns", columns, [trial_cells(trial) for trial in trials])


def outcome(entry: Tuning) -> str:
    if not entry.choices:
        return f"the first guess stays, {formats.number(entry.first_guess_ms)} ms a step, {entry.date}"
    chosen = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in entry.choices.items())
    return f"{chosen}: {entry.summary()}"


def trial_cells(trial: Trial) -> list[Cell]:
    times = (formats.number(each) for each in (trial.ms, trial.against_ms, trial.iqr_ms))
    errors = ("", "")
    if trial.error is not None:
        errors = (formats.error(trial.error), formats.used(trial.error, trial.allowed))
    name, judged = trial.switch.replace("_", " "), Cell(trial.outcome(), TONES.get(trial.verdict, ""))
    return cells(name, str(trial.value), *times, *errors, judged)
