"""Post-processing against numbers worked out by hand; tests of the whole model hold it against DETR's own outputs."""

import math

import torch

from detr_fast.postprocess import postprocess


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_boxes_are_scaled_by_width_and_height() -> None:
    logits = logits_of([0.2, 0.7, 0.1]).expand(1, 1, 3)
    boxes_cxcywh = torch.tensor([[[0.5, 0.25, 0.2, 0.1]]])
    _, _, boxes = postprocess(logits, boxes_cxcywh, torch.tensor([[100, 400]]))
    torch.testing.assert_close(boxes, torch.tensor([[[160.0, 20.0, 240.0, 30.0]]]))


def test_each_image_has_its_own_size() -> None:
    boxes_cxcywh = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(2, 3, 4)
    _, _, boxes = postprocess(torch.zeros(2, 3, 4), boxes_cxcywh, torch.tensor([[10, 20], [30, 40]]))
    assert boxes[0, 2].tolist() == [0, 0, 20, 10]
    assert boxes[1, 0].tolist() == [0, 0, 40, 30]


def test_no_object_takes_part_in_the_softmax_but_is_never_the_label() -> None:
    logits = logits_of([0.15, 0.05, 0.8]).expand(1, 1, 3)
    scores, labels, _ = postprocess(logits, torch.full((1, 1, 4), 0.5), torch.tensor([[1, 1]]))
    assert labels.tolist() == [[0]]
    assert labels.dtype == torch.int64
    assert math.isclose(scores.item(), 0.15, rel_tol=1e-6)


def test_every_query_is_kept_even_where_two_agree() -> None:
    logits = torch.zeros(1, 100, 92)
    scores, labels, boxes = postprocess(logits, torch.full((1, 100, 4), 0.5), torch.tensor([[8, 8]]))
    assert (scores.shape, labels.shape, boxes.shape) == ((1, 100), (1, 100), (1, 100, 4))


def test_of_sigmoid_scores_each_class_of_a_query_is_a_detection() -> None:
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 0, 1], logits[0, 0, 2], logits[0, 1, 0] = 2.0, 1.0, 3.0
    boxes_cxcywh = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]])
    scores, labels, boxes = postprocess(logits, boxes_cxcywh, torch.tensor([[10, 20]]), "sigmoid")
    assert labels[0, :3].tolist() == [0, 1, 2] and boxes[0, :3, 0].tolist() == [10, 0, 0]
    torch.testing.assert_close(scores[0, :3], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert scores.shape == (1, 6) and boxes.shape == (1, 6, 4)  # as many as there are
    best, _, _ = postprocess(torch.randn(1, 60, 6), torch.rand(1, 60, 4), torch.tensor([[8, 8]]), "sigmoid")
    assert best.shape == (1, 100) and torch.equal(best, best.sort(descending=True).values)
