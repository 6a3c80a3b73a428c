"""Display of a run's progress: a bar with the figures that matter; plain lines where there is no terminal."""

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from detr_fast.console import Console

FIGURES = "loss {loss:.3f}  {images_per_second:.0f} img/s  wait {data_wait_fraction:.0%}  {memory_mib:.0f} MiB"


class TrainingDisplay:
    """Context manager that shows a bar; `update` is called with every log line's values."""

    def __init__(self, console: Console, total_steps: int, done_steps: int, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self.total_steps = total_steps
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  {task.fields[figures]}"),
            TextColumn("ETA {task.fields[eta]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._progress.add_task(
            "train", total=total_steps, completed=done_steps, epoch=f"0/{epochs}", figures="", eta="-:--"
        )

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def plan(self, total_steps: int, epochs: int) -> None:
        """Show another end from now on."""
        self.total_steps, self.epochs = total_steps, epochs
        self._progress.update(self._task, total=total_steps)

    def update(self, epoch: float, step: int, values: dict[str, float], eta_seconds: float) -> None:
        figures = FIGURES.format(**values)
        shown_epoch = f"{min(int(epoch) + 1, self.epochs)}/{self.epochs}"
        minutes, seconds = divmod(max(0, int(eta_seconds)), 60)
        eta = f"{minutes}:{seconds:02d}"
        self._progress.update(self._task, completed=step, epoch=shown_epoch, figures=figures, eta=eta)
        if not self.console.is_terminal:
            self.console.print(f"epoch {shown_epoch}  step {step}/{self.total_steps}  {figures}  ETA {eta}")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text)
