"""`predict`: every kind of input, the boxes' frame, the threshold, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast.config import MODELS, UserError
from detr_fast.data.coco import Category, build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.detector import Detector
from detr_fast.evaluation.inference import CATEGORY_ID, IMAGE_ID, SCORE, collect_detections
from detr_fast.model.backends import Selectable
from detr_fast.model.detr import DETR
from detr_fast.options import DataOptions, RuntimeOptions
from detr_fast.prediction import Detections
from detr_fast.runtime import choose_runtime
from detr_fast.weights import build_model


class Constant(Selectable):
    """Finds the same on every image: class 1 at 0.9, class 0 at 0.5, class 2 at 0.7, each on another quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = MODELS["detr_tiny"]
        self.weight = nn.Parameter(torch.zeros(()))
        self.logits = torch.tensor([[0.02, 0.9, 0.02, 0.06], [0.5, 0.1, 0.1, 0.3], [0.1, 0.1, 0.7, 0.1]]).log()
        self.boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.5, 0.75, 1.0, 0.5]])
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        self.shapes.append(tuple(images.shape))
        self.modes.append(self.training)
        batch = len(images)
        return {
            "pred_logits": self.logits.expand(batch, -1, -1),
            "pred_boxes": self.boxes.expand(batch, -1, -1),
        }


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(build_model("detr_tiny").eval())


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(48, 96, 3), dtype=np.uint8)


def same(a: Detections, b: Detections) -> bool:
    return a.names == b.names and torch.equal(a.scores, b.scores) and torch.equal(a.boxes_xyxy_px, b.boxes_xyxy_px)


def test_boxes_are_in_pixels_of_the_image_that_was_given(pixels: np.ndarray) -> None:
    constant = Constant()
    (found,) = Detector(constant).predict(np.repeat(pixels, 2, axis=0), threshold=0.0)
    assert constant.shapes == [(1, 3, 64, 64)]  # resized from 96 x 96
    assert found.boxes_xyxy_px[0].tolist() == [0, 0, 48, 48]
    (found,) = Detector(constant).predict(pixels, threshold=0.0)
    assert constant.shapes[1] == (1, 3, 32, 64)
    assert found.boxes_xyxy_px.tolist() == [[0, 0, 48, 24], [0, 24, 96, 48], [48, 0, 96, 24]]


@pytest.mark.parametrize(("threshold", "labels"), [(0.0, [1, 2, 0]), (0.6, [1, 2]), (0.8, [1]), (0.95, [])])
def test_the_threshold_keeps_the_best_first(threshold: float, labels: list[int], pixels: np.ndarray) -> None:
    (found,) = Detector(Constant()).predict(pixels, threshold)
    assert found.labels.tolist() == labels
    assert len(found) == len(labels)


def test_a_score_equal_to_the_threshold_is_kept(pixels: np.ndarray) -> None:
    (found,) = Detector(Constant()).predict(pixels, threshold=0.0)
    assert len(Detector(Constant()).predict(pixels, threshold=found.scores[1].item())[0]) == 2


def test_names_are_the_models(pixels: np.ndarray) -> None:
    constant = Constant()
    assert Detector(constant).predict(pixels)[0].names == ["1", "2"]
    categories = (Category(3, "cat"), Category(7, "<script>"), Category(8, "$x$"))
    assert Detector(constant, categories).predict(pixels)[0].to_dict() == {
        "detections": [
            {"label": 1, "name": "<script>", "score": pytest.approx(0.9), "box_xyxy_px": [0, 0, 48, 24]},
            {"label": 2, "name": "$x$", "score": pytest.approx(0.7), "box_xyxy_px": [0, 24, 96, 48]},
        ]
    }


def test_the_models_mode_is_restored_also_after_an_error(pixels: np.ndarray) -> None:
    constant = Constant().train()
    Detector(constant).predict(pixels)
    assert constant.modes == [False]
    assert constant.training
    constant.logits[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        Detector(constant).predict(pixels)
    assert constant.training
    assert Detector(constant.eval()).predict([]) == []
    assert not constant.training


def test_a_part_that_is_in_another_mode_stays_in_it(pixels: np.ndarray) -> None:
    """Fine-tuning keeps batch norm in evaluation mode, or trains one part alone."""
    for training in (True, False):
        network = Constant().train(training)
        network.part = nn.Dropout().train(not training)
        during: list[bool] = []
        network.register_forward_pre_hook(lambda module, _, during=during: during.append(module.part.training))
        Detector(network).predict(pixels)
        assert during == [False] and (network.training, network.part.training) == (training, not training)


def test_paths_pil_images_and_arrays_give_the_same(detector: Detector, pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(pixels).save(file)
    flipped_view = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]  # negative strides, as BGR turned to RGB has
    several = detector.predict([file, str(file), Image.open(file), pixels, flipped_view], threshold=0.0)
    assert len(several) == 5
    assert all(same(one, several[0]) for one in several)
    assert same(detector.predict(file, threshold=0.0)[0], several[0])
    assert len(several[0]) == 10


def test_a_batch_gives_what_single_images_give(detector: Detector, pixels: np.ndarray) -> None:
    images = [pixels, 255 - pixels, pixels[::-1]]
    singly, together = detector.predict(images, 0.0), detector.predict(images, 0.0, batch_size=2)
    for one, other in zip(singly, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.boxes_xyxy_px, other.boxes_xyxy_px, rtol=1e-4, atol=1e-3)
    assert not same(singly[0], singly[1])


def test_images_of_like_shape_share_a_batch_and_answers_keep_the_order(tmp_path: Path) -> None:
    """Four wide and three tall ones in turns, of which batches by arrival would be padded to squares."""
    constant, images = Constant(), []
    for number in range(7):
        height, width = (32, 64) if number % 2 == 0 else (64, 32)
        images.append(np.full((height, width + number, 3), 9, dtype=np.uint8))
    Image.fromarray(images[2]).save(tmp_path / "2.png")
    given = [*images[:2], tmp_path / "2.png", Image.fromarray(images[3]), *images[4:]]
    found = Detector(constant).predict(given, 0.0, batch_size=2)
    assert [one.boxes_xyxy_px[1].tolist() for one in found] == [
        [0, height / 2, width, height] for height, width in (image.shape[:2] for image in images)
    ]
    assert len(constant.shapes) == 4 and all(min(shape[2:]) < 40 for shape in constant.shapes)


def test_a_file_that_is_none_is_named_in_a_batch_too(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"no/such/image\.jpg"):
        Detector(Constant()).predict([pixels, "no/such/image.jpg", pixels], batch_size=2)


def test_prediction_is_evaluation(detector: Detector, shapes_root: Path) -> None:
    """The same image gives the same scores and classes either way."""
    dataset = build_dataset(DataOptions(data=str(shapes_root)), "val", detector.config)
    rows = collect_detections(detector, evaluation_loader(dataset, 1, workers=0), None)
    found = detector.predict([record.path for record in dataset.records], threshold=0.0)
    for record, one in zip(dataset.records, found, strict=True):
        mine = rows[rows[:, IMAGE_ID] == record.id]
        mine = mine[np.argsort(-mine[:, SCORE], kind="stable")]
        np.testing.assert_array_equal(mine[:, SCORE], one.scores.double().numpy())
        np.testing.assert_array_equal(mine[:, CATEGORY_ID], one.labels.numpy())


def test_exif_rotation_is_ignored(pixels: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees for display
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    for image in (tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")):
        assert Detector(Constant()).predict(image)[0].boxes_xyxy_px[1].tolist() == [0, 24, 96, 48]


def test_it_is_called_like_its_network(detector: Detector) -> None:
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 60:] = True
    with torch.no_grad():
        found, expected = detector(images, mask), detector.network(images, mask)
    assert torch.equal(found["pred_boxes"], expected["pred_boxes"]) and len(found["aux_outputs"]) == 2


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
@pytest.mark.parametrize("optimize", [False, True])
def test_it_runs_where_and_as_it_was_moved(
    optimize: bool, dtype: torch.dtype, close: float, pixels: np.ndarray
) -> None:
    torch.manual_seed(0)
    made = Detector(build_model("detr_tiny").eval())
    (expected,) = made.predict(pixels, threshold=0.0)
    if optimize:
        made.optimize(choose_runtime(RuntimeOptions(device="cpu", precision="fp32", channels_last=False)))
    (found,) = made.to(dtype).predict(pixels, threshold=0.0)
    assert made.runtime.dtype == dtype and len(found) == len(expected)
    torch.testing.assert_close(found.scores.float(), expected.scores, rtol=2 * close, atol=close)


@pytest.mark.filterwarnings("error")
def test_pixels_that_may_not_be_written_are_read(detector: Detector, pixels: np.ndarray) -> None:
    """NumPy makes such ones of bytes, or of a PIL image."""
    (expected,) = detector.predict(pixels, threshold=0.0)
    torch.set_warn_always(True)  # once a process otherwise
    try:
        (found,) = detector.predict(np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape), threshold=0.0)
    finally:
        torch.set_warn_always(False)
    assert same(found, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), r"not array \(8, 8, 3\) float32"),
        (np.zeros((8, 8), dtype=np.uint8), r"not array \(8, 8\) uint8"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), "not array"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "8x0 pixels"),
        (Image.new("RGB", (0, 5)), "0x5 pixels"),
        ("no/such/image.jpg", r"no/such/image\.jpg"),
        (3, "not int"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Detector(Constant()).predict([image])


def test_html_named_jpg_and_a_torn_pil_image_are_named(pixels: np.ndarray, tmp_path: Path) -> None:
    html, torn = tmp_path / "page.jpg", tmp_path / "torn.png"
    html.write_text("<html></html>")
    Image.fromarray(pixels).save(torn)
    torn.write_bytes(torn.read_bytes()[:2000])
    for image, name in ((html, "page.jpg"), (Image.open(torn), "torn.png")):
        with pytest.raises(UserError, match=name):
            Detector(Constant()).predict(image)


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": float("nan")}, {"batch_size": 0}])
def test_senseless_options_are_refused(options: dict[str, Any], pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="must be"):
        Detector(Constant()).predict(pixels, **options)


@pytest.mark.parametrize(("scores", "least"), [("softmax", 0.7), ("sigmoid", 0.35)])
def test_the_usual_threshold_is_that_of_the_scores(scores: str, least: float, pixels: np.ndarray) -> None:
    detector = Detector(DETR(replace(MODELS["detr_tiny"], scores=scores)))
    assert detector.least_score(None) == least and detector.least_score(0.0) == 0.0
    (all_,), (usual,) = detector.predict(pixels, threshold=0.0), detector.predict(pixels)
    assert len(usual) == int((all_.scores >= least).sum())
