"""Schema of a run's checkpoints: each key is a field of a class here, or of the model's description.

last.pt holds a `TrainingState`, with which a run goes on as if it had not stopped; best.pt holds weights to use.
"""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from detr_fast.config import Checked, ModelConfig, UserError, require
from detr_fast.data.annotations import Category
from detr_fast.options import TrainOptions
from detr_fast.weights.container import read_container, write_container
from detr_fast.weights.files import ModelDescription
from detr_fast.weights.pickles import listed

VERSION = 1
"""The version of `TrainingState`; counts up whenever an older state cannot be resumed."""
ADVICE = (
    "Free some space or give another --output; the previous checkpoint is kept and --resume auto continues from it."
)


@dataclass
class Progress:
    """Progress of a run: with the seed, all that data order, augmentation, schedule and dropout depend on."""

    step: int = 0
    """Optimizer steps done."""
    evaluated_step: int = 0
    """The step after which the model was evaluated last."""
    best_ap: float = -math.inf
    """Below 0 as long as none was measured: best.pt then has the latest weights."""
    nonfinite_readings: int = 0
    seconds: float = 0.0
    """Time of the run before this process."""
    trained_seconds: float = 0.0
    """That time without its evaluations."""
    planned_steps: int = 0
    """Steps that are to fit into --minutes, as it was planned last; 0: not planned yet."""


@dataclass(frozen=True)
class SplitDigest(Checked):
    """The content of a split's annotations, whatever their file is called and wherever it lies."""

    images: int
    objects: int
    digest: str

    def __str__(self) -> str:
        return f"{self.images} images with {self.objects} objects"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run that hold from its first step to its last."""

    model_config: ModelConfig
    categories: tuple[Category, ...] | None
    """In label order."""
    options: TrainOptions
    tuning: dict[str, Any] | None = None
    """A `Tuning`, as plain values: those of another version are void."""
    data: dict[str, SplitDigest]
    """Digests of the splits train and val."""
    processes: int

    def description(self) -> ModelDescription:
        return ModelDescription.of(self.model_config, self.categories)

    def about(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {"options": self.options.to_dict(), **vars(self.description())}

    def save_model(self, path: Path, weights: dict[str, Tensor], step: int) -> None:
        """Write the model as it is after optimizer step `step`, for use, to `path` in one step.

        Raises UserError where it cannot be written.
        """
        write_container(path, {**self.description().with_weights(weights), "step": step}, ADVICE)


@dataclass(frozen=True, kw_only=True)
class TrainingState(RunFacts):
    """All that a run needs to go on."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    """Weights of the EMA model, where the run has one."""
    optimizer: dict[str, Any]
    """The optimizer's state_dict."""
    scaler: dict[str, Any]
    """The gradient scaler's state_dict, empty where it is off."""
    progress: Progress
    query_sets: dict[str, Tensor] | None = None
    """Weights of the further sets of queries, which training alone has."""
    version: int = VERSION

    def save(self, path: Path) -> None:
        """Write the state to `path` in one step. Raises UserError where it cannot be written."""
        content = {
            **vars(self),
            **self.about(),
            "data": {split: digest.to_dict() for split, digest in self.data.items()},
            "progress": vars(self.progress),
        }
        write_container(path, content, ADVICE)

    @classmethod
    def load(cls, path: Path, advice: str) -> Self:
        """Read what `save` wrote. Raises UserError that ends with `advice` where no run can be resumed from it."""
        content = read_container(path)
        require("optimizer" in content, f"--resume {path} has the weights alone. Resume a last.pt. {advice}")
        missing = list(lacking(content))
        another = f"--resume {path} was written by another version of detr_fast"
        require(not missing, f"{another}: it lacks {listed(missing, shown=9)}. Continue it with that version. {advice}")
        version = content.get("version", VERSION)
        require(version == VERSION, f"{another}, {version} of checkpoints. Continue it with that version. {advice}")
        categories = content["categories"]
        plain = [each.name for each in fields(cls) if each.name not in PARSED]
        try:
            return cls(
                **{name: content[name] for name in plain if name in content},
                model_config=ModelConfig.from_dict(content["model_config"]),
                categories=None if categories is None else tuple(Category(**each) for each in categories),
                options=TrainOptions.from_dict(content["options"]),
                data={split: SplitDigest.from_dict(digest) for split, digest in content["data"].items()},
                progress=Progress(**content["progress"]),
            )
        except (UserError, TypeError) as error:  # a word that only a later version knows
            raise UserError(f"{another}: {error} Continue it with that version. {advice}") from error


PARSED = ("model_config", "categories", "options", "data", "progress")
"""Fields that are classes of ours, and plain values in the file."""
READ_OF = {
    "optimizer": ("state", "param_groups"),
    "data": ("train", "val"),
    "model_config": tuple(each.name for each in fields(ModelConfig)),
}
"""Keys that are read of the parts that are dictionaries. Options may lack some, which came later: these keep their
defaults, with which a run goes on as it did without them."""


def lacking(content: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of a `TrainingState` that `content` lacks; where it lacks none, those that its parts lack."""
    needed = [each.name for each in fields(TrainingState) if each.default is MISSING]
    absent = [name for name in needed if name not in content]
    yield from absent
    for part, keys in READ_OF.items() if not absent else ():
        values = content[part]
        yield from (f"{part}.{key}" for key in keys if not (isinstance(values, dict) and key in values))
