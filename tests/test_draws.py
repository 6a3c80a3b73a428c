"""Numbers known by their place: SplitMix64's own, even, and without relation between images, epochs and seeds."""

from types import SimpleNamespace

import numpy as np
import pytest

from detr_fast.data.draws import NUMBERS_A_STREAM, Draws

IMAGES = 20_000
NUMBERS = (*range(NUMBERS_A_STREAM), NUMBERS_A_STREAM, 5 * NUMBERS_A_STREAM + 3)
"""All of the first stream, and two of others."""


def test_they_are_splitmix64s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first five of seed 1234567, as published with the C implementation."""
    published = (
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    )
    starts_there = SimpleNamespace(generate_state=lambda *_: np.array([1234567], dtype=np.uint64))
    monkeypatch.setattr(np.random, "SeedSequence", lambda place: starts_there)
    draws = Draws(0, 0, [0])
    assert [draws.fraction(number).item() for number in range(5)] == [(bits >> 11) / 2**53 for bits in published]


def test_numbers_stay_what_they_were() -> None:
    """Pins those of seed 42, epoch 3, image 5: a resumed run goes on with them; those past the eighth came later."""
    draws = Draws(42, 3, [5])
    first = [draws.fraction(number).item() for number in (0, 7, 8)]
    assert first == [0.051055396779440376, 0.6350263813167444, 0.3228254583889548]


def test_an_images_numbers_depend_on_its_place_alone() -> None:
    whole = Draws(7, 3, range(100))
    for some in ([5], [99, 0, 5], range(40, 60)):
        for number in NUMBERS:
            expected = whole.fraction(number)[list(some)]
            assert np.array_equal(Draws(7, 3, some).fraction(number), expected)
            assert np.array_equal(whole[np.array(some)].fraction(number), expected)
    assert np.array_equal(Draws(-1, 0, [4]).fraction(0), Draws(2**64 - 1, 0, [4]).fraction(0))


@pytest.mark.parametrize("seed", [0, 42])
def test_they_are_even_and_unrelated(seed: int) -> None:
    """Looks at two epochs and two seeds, ten numbers each: means, and correlations with one another and with the image
    before, within what chance allows."""
    rows = [
        Draws(*place, range(IMAGES)).fraction(number)
        for place in ((seed, 0), (seed, 1), (seed + 1, 0))
        for number in NUMBERS
    ]
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in rows])
    chi_square = ((counts - IMAGES / 20) ** 2 / (IMAGES / 20)).sum(1)  # 19 degrees of freedom
    assert chi_square.max() < 50 and chi_square.mean() == pytest.approx(19, abs=6)
    shifted = [np.roll(row, 1) for row in rows]
    correlations = np.corrcoef(rows + shifted)[np.triu_indices(2 * len(rows), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(IMAGES)


def test_limits_are_each_images_own() -> None:
    limits = np.arange(1, IMAGES + 1) % 7 + 1
    found = Draws(1, 0, range(IMAGES)).below(2, limits)
    assert found.dtype == np.int64 and (found >= 0).all() and (found < limits).all()
    for limit in range(1, 8):
        assert set(found[limits == limit]) == set(range(limit))
    assert set(Draws(1, 0, range(100)).choice(0, (400, 500, 600))) == {400, 500, 600}
