"""Plans in words and bytes, against numbers worked out by hand."""

import pytest

from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan_words import channel_bits, level_words, mean_bits, mean_bytes, scale_bytes, segment_bytes, slab_words

DIM = 32


@pytest.mark.parametrize(
    ("slabs", "words", "bits", "scales", "mean", "of_512"),
    [
        (Slabs(DIM), "raw", 16, 0, 0, 512 * 64),
        (Slabs(), "mean", 0, 0, 64, 64),
        (Slabs(8), "8×16", 4, 0, 64, 512 * 16 + 64),
        (Slabs(8, 8, 16), "8×16 8×8 16×4", 8, 48, 64, 512 * 32 + 48 + 64),
        (Slabs(0, DIM, 0), "32×8", 8, 64, 64, 512 * 32 + 64 + 64),
        (Slabs(0, 0, 16), "16×4", 2, 32, 64, 512 * 8 + 32 + 64),
    ],
)
def test_one_side_of_a_head(slabs, words, bits, scales, mean, of_512):
    assert (slab_words(slabs, DIM), channel_bits(slabs, DIM)) == (words, bits)
    assert (scale_bytes(slabs), mean_bytes(slabs, DIM), segment_bytes(slabs, DIM, 512)) == (scales, mean, of_512)


def test_levels_belong_to_no_width():
    assert [level_words(Slabs(*level)) for level in ((), (32,), (0, 8), (0, 0, 64))] == ["mean", "32×16", "8×8", "64×4"]


def test_bits_are_weighted_by_channels():
    assert mean_bits([(Slabs(32), 32), (Slabs(), 96)]) == 4
    assert mean_bits([]) == 0
