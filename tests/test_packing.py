"""Packing: real tokens first in their images' order, and back, without a shape that depends on the mask."""

import pytest
import torch
from detr_kernels.attention.packing import Packing, ZeroRows, images_of_rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernel_inputs import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")

MASKS = {
    "right": [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]],  # flattened rows of a padded image end like this
    "scattered": [[0, 1, 0, 1], [1, 0, 0, 1]],  # and a padded map of several rows like this
    "an image without tokens": [[0, 0, 1], [1, 1, 1], [0, 1, 1]],
    "nothing real": [[1, 1], [1, 1]],
    "nothing padded": [[0, 0], [0, 0]],
    "one token": [[0]],
}


def mask(name: str) -> Tensor:
    return torch.tensor(MASKS[name], dtype=torch.bool, device=DEVICE)


@pytest.mark.parametrize("name", MASKS)
def test_real_tokens_come_first_in_their_images_order(name: str) -> None:
    padding = mask(name)
    packing = Packing.of(padding)
    x = torch.randn(*padding.shape, 5, device=DEVICE)
    packed = packing.pack(x)
    real, lengths = x[~padding], (~padding).sum(1)
    assert packed.shape == (padding.numel(), 5)
    assert torch.equal(packed[: len(real)], real)
    assert sorted(packed[:, 0].tolist()) == sorted(x[..., 0].flatten().tolist())
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert (packing.images, packing.max_seqlen) == padding.shape
    assert torch.equal(packing.unpack(packed), x)
    padded = len(x) * x.shape[1] - len(real)
    expected = torch.arange(len(x), device=DEVICE).repeat_interleave(lengths).tolist() + [len(x)] * padded
    assert images_of_rows(packing.cu_seqlens, padding.numel()).tolist() == expected


def test_gradients_are_the_other_permutation_exactly() -> None:
    packing = Packing.of(mask("scattered"))
    x = torch.randn(2, 4, 3, device=DEVICE, requires_grad=True)
    weighting = torch.randn(8, 3, device=DEVICE)
    (packing.pack(x) * weighting).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, packing.unpack(weighting))
    packed = weighting.clone().requires_grad_()
    (packing.unpack(packed) * x.detach()).sum().backward()
    assert packed.grad is not None
    assert torch.equal(packed.grad, packing.pack(x.detach()))


def test_second_derivatives() -> None:
    packing = Packing.of(mask("scattered"))
    x = torch.randn(2, 4, 1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: packing.pack(x) ** 3, x)


def test_without_padding_nothing_moves() -> None:
    packing = Packing.uniform(3, 4, DEVICE)
    x = torch.randn(3, 4, 5, device=DEVICE)
    assert packing.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.pack(x).data_ptr() == x.data_ptr() == packing.unpack(packing.pack(x)).data_ptr()
    same = Packing.of(torch.zeros(3, 4, dtype=torch.bool, device=DEVICE))
    assert torch.equal(same.cu_seqlens, packing.cu_seqlens)
    assert torch.equal(same.pack(x), packing.pack(x))


def test_no_images_and_no_tokens() -> None:
    for shape in ((0, 4), (3, 0)):
        for packing in (
            Packing.of(torch.zeros(shape, dtype=torch.bool, device=DEVICE)),
            Packing.uniform(*shape, DEVICE),
        ):
            assert packing.cu_seqlens.tolist() == [0] * (shape[0] + 1)
            assert packing.unpack(packing.pack(torch.zeros(*shape, 2, device=DEVICE))).shape == (*shape, 2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packing = Packing.of(mask("right"))
    with pytest.raises(ValueError, match=r"\(4, 3, 2\)"):
        packing.pack(torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=r"\(11, 2\)"):
        packing.unpack(torch.zeros(11, 2))


def test_nothing_is_read_on_the_host() -> None:
    with FakeTensorMode():  # has no values to read
        packing = Packing.of(torch.zeros(16, 850, dtype=torch.bool, device="cuda"))
        x = packing.pack(torch.zeros(16, 850, 256, device="cuda"))
        assert (x.shape, packing.unpack(x).shape, x.device.type) == ((13600, 256), (16, 850, 256), "cuda")
        assert packing.cu_seqlens.shape == (17,)


def test_compiles_without_a_graph_break() -> None:
    def double(x: Tensor, padding: Tensor) -> Tensor:
        packing = Packing.of(padding)
        return packing.unpack(packing.pack(x) * 2)

    x = torch.randn(2, 4, 3, device=DEVICE, requires_grad=True)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")(x, mask("scattered"))
    assert torch.equal(compiled, x * 2)
    compiled.sum().backward()
    assert x.grad is not None
    assert (x.grad == 2).all()


def test_a_packing_goes_in_and_out_of_a_compiled_function() -> None:
    make = torch.compile(Packing.of, fullgraph=True, backend="aot_eager")
    pack = torch.compile(lambda packing, x: packing.pack(x), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 3, device=DEVICE)
    packing = make(mask("scattered"))
    assert torch.equal(pack(packing, x), Packing.of(mask("scattered")).pack(x))


@pytest.mark.parametrize("ends", [([3, 0, 4], [3, 0, 4]), ([3, 0, 4], [5, 1, 0]), ([5, 5, 5], [3, 0, 4])])
def test_zero_rows_are_those_that_any_cu_seqlens_give(ends: tuple[list[int], list[int]]) -> None:
    """Also of images that have no token on one side, or on both."""
    queries, keys = (
        Packing.of(torch.arange(5, device=DEVICE) >= torch.tensor(each, device=DEVICE)[:, None]) for each in ends
    )
    for left, right in ((queries, keys), (keys, queries), (queries, queries)):
        expected = ZeroRows.from_cu_seqlens(left.cu_seqlens, right.cu_seqlens, 15, 15)
        for found, rows in zip(left.zero_rows(right), expected, strict=True):
            assert found is not None and torch.equal(found, rows)


def test_without_padding_only_an_image_without_keys_has_zero_rows() -> None:
    uniform, keys = Packing.uniform(3, 4, DEVICE), Packing.of(mask("an image without tokens"))
    assert uniform.zero_rows(Packing.uniform(3, 9, DEVICE)) == (None, None)
    zero_rows, padding = uniform.zero_rows(keys)
    assert zero_rows is not None and torch.equal(zero_rows, mask("an image without tokens").all(1).repeat_interleave(4))
    assert padding is keys.padding
