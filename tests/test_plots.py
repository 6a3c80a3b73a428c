"""Curves and pictures: what is drawn where, and that every name is shown as it is."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from detr_fast.config import UserError
from detr_fast.evaluation.coco_metrics import Evaluation, evaluate_detections
from detr_fast.evaluation.pictures import Picture, draw_detections, draw_picture
from detr_fast.evaluation.plots import column, draw_ap_curves, draw_loss_curves, draw_precision_recall, read_metrics

HOSTILE_NAMES = ("<script>alert(1)</script>", "$\\frac{$", "a_b $x$")
"""The second is no valid formula: drawn as one, it raises."""
ROWS = """kind,epoch,step,seconds,loss,loss_ce,AP,APs,APl
train,0,20,1.5,9.0,2.0,,,
train,0,40,3.0,nan,1.5,,,
val,1,40,4.0,8.5,,0.25,0.5,-1.0
train,1,60,5.0,7.0,1.0,,,
val,2,60,6.0,6.5,,0.75,0.6,-1.0
"""


@pytest.fixture
def metrics_csv(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    path.write_text(ROWS)
    return path


def picture(side: int = 64) -> Picture:
    return Picture(
        image=np.full((side, side, 3), 90, dtype=np.uint8),
        title=HOSTILE_NAMES[1],
        true_boxes=np.array([[4.0, 8, 30, 40]]),
        true_names=[HOSTILE_NAMES[1]],
        boxes=np.array([[5.0, 9, 31, 41], [40, 2, 60, 20]]),
        names=HOSTILE_NAMES[1:],
        scores=[0.912, 0.5],
    )


def evaluation(names: tuple[str, ...], objects: bool = True) -> Evaluation:
    """One object a class on one image; all but the last class's is found."""
    boxes = [[10 + 30 * i, 10, 20, 20] for i in range(len(names))]
    document = {
        "images": [{"id": 1, "width": 640, "height": 480}],
        "annotations": [{"image_id": 1, "category_id": i, "bbox": box, "area": 400} for i, box in enumerate(boxes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    if not objects:
        document["annotations"] = []
    rows = np.array([[1, *box, 0.9, i] for i, box in enumerate(boxes[:-1])])
    return evaluate_detections(document, rows)


def test_a_column_holds_the_rows_that_have_a_value(metrics_csv: Path) -> None:
    rows = read_metrics(metrics_csv)
    epochs, precision = column(rows, "val", "epoch", "AP")
    assert (epochs.tolist(), precision.tolist()) == ([1, 2], [0.25, 0.75])
    steps, losses = column(rows, "train", "step", "loss")
    assert steps.tolist() == [20, 40, 60]
    np.testing.assert_array_equal(losses, [9, np.nan, 7])
    assert len(column(rows, "val", "step", "no such column")[0]) == 0


@pytest.mark.parametrize("draw", [draw_loss_curves, draw_ap_curves])
@pytest.mark.parametrize("rows", [ROWS, ROWS.splitlines()[0]], ids=["a run", "a run that logged nothing"])
def test_curves_are_drawn(draw, rows: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "metrics.csv").write_text(rows)
    draw(tmp_path / "metrics.csv", tmp_path / "plots" / "curve.png")
    assert Image.open(tmp_path / "plots" / "curve.png").width == 1200


def test_more_values_draw_another_curve(metrics_csv: Path, tmp_path: Path) -> None:
    draw_ap_curves(metrics_csv, tmp_path / "before.png")
    metrics_csv.write_text(ROWS + "val,3,80,8.0,5,,0.1,0.2,-1.0\n")
    draw_ap_curves(metrics_csv, tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


def test_metrics_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.csv"):
        draw_loss_curves(tmp_path / "metrics.csv", tmp_path / "loss.png")


def test_a_folder_that_cannot_be_made_is_named(metrics_csv: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.csv/loss\.png cannot be written"):
        draw_loss_curves(metrics_csv, metrics_csv / "loss.png")


@pytest.mark.parametrize("names", [HOSTILE_NAMES, tuple(f"$\\frac{{$ {i}" for i in range(30))], ids=["few", "many"])
def test_precision_and_recall_of_classes_with_any_name(names: tuple[str, ...], tmp_path: Path) -> None:
    draw_precision_recall(evaluation(names), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (900, 624)


@pytest.mark.parametrize(("objects", "title"), [(True, "recall 0"), (False, "no object to find")])
def test_precision_and_recall_without_objects(
    objects: bool, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    savefig = Figure.savefig

    def saved(self: Figure, *given: object, **options: object) -> None:
        titles.append(self.axes[0].get_title())
        savefig(self, *given, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    draw_precision_recall(evaluation(HOSTILE_NAMES, objects=objects), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file() and title in titles[0]


def test_names_are_shown_as_they_are() -> None:
    axes = Figure().subplots()
    draw_picture(axes, picture(), scale=6, colours=dict.fromkeys(HOSTILE_NAMES, "red"))
    assert [text.get_text() for text in axes.texts] == ["$\\frac{$", "$\\frac{$ 0.91", "a_b $x$ 0.50"]
    assert axes.get_title(loc="left") == "$\\frac{$"
    assert not any(text.get_parse_math() for text in axes.findobj(Text) if text.get_text())


def test_true_boxes_are_dashed_and_predicted_ones_are_not() -> None:
    axes = Figure().subplots()
    draw_picture(axes, picture(), scale=6, colours=dict.fromkeys(HOSTILE_NAMES, "red"))
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [(box.get_linestyle() in ("-", "solid"), list(box.get_bbox().extents)) for box in boxes] == [
        (False, [4, 8, 30, 40]),
        (True, [5, 9, 31, 41]),
        (True, [40, 2, 60, 20]),
    ]


@pytest.mark.parametrize(("count", "least_width", "least_height"), [(1, 640, 640), (3, 1200, 400), (6, 1600, 800)])
def test_small_images_are_enlarged(count: int, least_width: int, least_height: int, tmp_path: Path) -> None:
    draw_detections([picture()] * count, tmp_path / "grid.png")
    width, height = Image.open(tmp_path / "grid.png").size
    assert least_width <= width < least_width + 100
    assert least_height <= height < least_height + 130


def test_large_images_are_reduced_and_none_at_all_is_no_error(tmp_path: Path) -> None:
    draw_detections([picture(1700)], tmp_path / "large.png")
    assert 1600 <= Image.open(tmp_path / "large.png").width < 1700
    draw_detections([], tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()


def test_an_image_keeps_its_colours(tmp_path: Path) -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, :32] = (200, 30, 60)
    draw_detections([Picture(image)], tmp_path / "one.png")
    drawn = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    middle = drawn[drawn.shape[0] // 2]
    assert (middle == (200, 30, 60)).all(axis=1).sum() == pytest.approx(320, abs=2)
