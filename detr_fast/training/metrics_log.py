"""Log of a run's numbers as CSV and TensorBoard: a row for each log line or evaluation."""

import csv
import io
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from detr_fast.config import UserError, require
from detr_fast.files import explained, open_growing, write_text
from detr_fast.paths import kind_of

TRAIN_COLUMNS = (
    *("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error", "grad_norm", "lr"),
    *("images_per_second", "data_wait_fraction", "padding_overhead", "memory_mib"),
)
POSITION_COLUMNS = ("kind", "epoch", "step", "seconds")


class MetricsLog:
    """Appends rows to `csv_file` and TensorBoard; a resumed run first drops the rows after its step."""

    def __init__(self, csv_file: Path, tensorboard: Path, val_columns: tuple[str, ...], resumed_step: int) -> None:
        self.columns = (*POSITION_COLUMNS, *TRAIN_COLUMNS, *val_columns)
        kept = [row for row in read_rows(csv_file) if int(row["step"]) <= resumed_step] if resumed_step else []
        self._path = csv_file
        begun = io.StringIO()
        writer = csv.DictWriter(begun, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_text(csv_file, begun.getvalue())
        self._file = io.TextIOWrapper(io.BufferedWriter(open_growing(csv_file, append=True)), "utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, restval="", extrasaction="ignore")
        self._board = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, kind: str, epoch: float, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append one row; `kind` is train or val, `seconds` since the run began."""
        numbers = {name: f"{value:.6g}" for name, value in values.items()}
        position = {"kind": kind, "epoch": f"{epoch:.4g}", "step": step, "seconds": f"{seconds:.1f}"}
        with explained(self._path):
            self._writer.writerow(position | numbers)
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_rows(csv_file: Path) -> list[dict[str, str]]:
    """Read the rows of an earlier log; none where there is no file. A killed run's torn last row is left out.

    Raises UserError for a file that was changed since, so that no row is lost.
    """
    if kind_of(csv_file) == "nothing":
        return []
    advice = "Was it saved by another program? Undo that, or move it away to go on without its rows."
    try:
        with csv_file.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{csv_file} cannot be read as a run's metrics: {error}. {advice}") from error
    require(
        not rows or set(POSITION_COLUMNS) <= rows[0].keys(),
        f"{csv_file} has not the columns {', '.join(POSITION_COLUMNS)}. {advice}",
    )
    whole = [row for row in rows if (row["step"] or "").isdigit() and None not in row.values()]
    torn = [row["step"] for row in rows if row not in whole]
    require(
        whole == rows[: len(whole)] and len(torn) <= 1,
        f"{csv_file} has {len(torn)} rows that no run writes, the first of step {torn[0] if torn else ''}. {advice}",
    )
    return whole
