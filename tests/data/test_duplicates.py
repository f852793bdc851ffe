"""Copies are found, look-alikes on white are not, and no pair within reach of the search is lost."""

import io
from collections import Counter

import numpy as np
import pytest
from makers import drawing, encoded
from PIL import Image, ImageDraw

from interlace.data import duplicates
from interlace.data.duplicates import connected, equal_pairs, near_pairs, perceptual_hash, signature, thumbnail
from interlace.data.pictures import open_picture


def photo(seed: int, side: int = 400) -> Image.Image:
    """Noise whose strength falls with frequency as in photographs: there is something to hash at every scale."""
    rng = np.random.default_rng(seed)
    image = np.zeros((side, side, 3))
    for octave in range(1, 8):
        small = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        image += np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), float) / 2**octave
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def signs(pictures):
    return np.array([perceptual_hash(p) for p in pictures], np.uint64), np.stack([thumbnail(p) for p in pictures])


def icon(shape: str, colour: str) -> Image.Image:
    """A product on white, as shops show them."""
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    if shape == "sofa":
        draw.rounded_rectangle((14, 50, 114, 90), 8, fill=colour)
        draw.rectangle((14, 40, 114, 60), fill=colour)
    elif shape == "lamp":
        draw.polygon([(64, 20), (40, 50), (88, 50)], fill=colour)
        draw.rectangle((61, 50, 67, 110), fill=colour)
    elif shape == "stick":
        draw.rectangle((61, 12, 67, 116), fill=colour)
    return image


def test_copies_are_near():
    original = photo(1)
    copies = [
        original,
        Image.open(io.BytesIO(encoded(original, "JPEG", quality=60))),
        original.resize((200, 200), Image.Resampling.LANCZOS),
        Image.open(io.BytesIO(encoded(original.resize((333, 333)), "WEBP", quality=70))).convert("RGB"),
        original.point(lambda value: min(255, value + 2)),
        open_picture(encoded(original, "JPEG"), size_hint=64),  # as the check reads it
    ]
    hashes, thumbs = signs(copies)
    assert connected(len(copies), near_pairs(hashes, thumbs)).tolist() == [0] * len(copies)


def test_other_photographs_and_other_colours_are_not_near():
    hashes, thumbs = signs([drawing(seed, side=128) if seed % 2 else photo(seed, 128) for seed in range(300)])
    assert len(near_pairs(hashes, thumbs)) == 0
    icons = [icon("sofa", "grey"), icon("sofa", "firebrick"), icon("lamp", "black"), icon("stick", "black")]
    hashes, thumbs = signs(icons)
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= duplicates.NEAR_BITS  # the hash alone would call the sofas equal
    assert len(near_pairs(hashes, thumbs)) == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 6, 7])
def test_the_search_finds_what_comparing_all_finds(limit):
    rng = np.random.default_rng(limit)
    base = rng.integers(0, 2**64, 150, dtype=np.uint64)
    hashes = np.concatenate([base, base])
    for i in range(150):  # a partner for each, up to 9 bits away
        for bit in rng.choice(64, int(rng.integers(0, 10)), replace=False):
            hashes[150 + i] ^= np.uint64(1) << np.uint64(bit)
    first, second = np.triu_indices(300, 1)
    near = np.bitwise_count(hashes[first] ^ hashes[second]) <= limit
    expected = connected(300, np.stack([first[near], second[near]], axis=1))
    found = near_pairs(hashes, bits=limit)
    assert (np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]]) <= limit).all()
    assert connected(300, found).tolist() == expected.tolist()


def test_equal_hashes_with_thumbnails_still_connect():
    hashes = np.array([5, 5, 5, 5], np.uint64)
    thumbs = np.zeros((4, duplicates.THUMB), np.uint8)
    thumbs[:, ::2] = 200
    thumbs[1] += 1  # a copy with another brightness
    thumbs[3] = 255 - thumbs[3]  # same hash, other picture
    assert connected(4, near_pairs(hashes, thumbs)).tolist() == [0, 0, 0, 3]


def test_work_grows_far_slower_than_the_square(monkeypatch):
    looked = Counter()
    confirm = duplicates._confirmed

    def count(pairs, *rest):
        looked[n] += len(pairs)
        return confirm(pairs, *rest)

    monkeypatch.setattr(duplicates, "_confirmed", count)
    rng = np.random.default_rng(0)
    for n in (4000, 40_000):
        near_pairs(rng.integers(0, 2**64, n, dtype=np.uint64), bits=6)
    assert looked[40_000] < 40_000**2 / 2 / 5000


def test_groups():
    assert connected(6, np.array([[4, 1], [1, 5], [2, 3]])).tolist() == [0, 1, 2, 2, 1, 1]
    assert connected(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]
    assert sorted(map(tuple, equal_pairs(np.array([7, 3, 7, 7])).tolist())) == [(0, 2), (2, 3)]


def test_signature_of_a_file():
    data = encoded(drawing(3))
    sign = signature(drawing(3), data)
    assert len(sign.sha) == 64 and sign.thumb.shape == (192,) and 0 <= sign.bits < 2**64
    assert signature(drawing(3), data).bits == sign.bits
