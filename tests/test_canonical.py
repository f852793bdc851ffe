"""Canonical correlations find what two kinds of vectors agree on, however quiet it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace.canonical import canonical
from interlace.errors import UserError
from interlace.tasks.baselines import ridge_alignment
from interlace.tasks.metrics import Cosine, text_image_recall


def quiet_agreement(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 20) and texts (N, 16) that agree on 6 quiet directions, and are loud in others of their own."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1)
    to_image, to_text = (np.linalg.qr(mixing.standard_normal((size, size)))[0] for size in (20, 16))
    shared = rng.standard_normal((rows, 6))
    image = np.concatenate([shared + 0.2 * rng.standard_normal((rows, 6)), 5 * rng.standard_normal((rows, 14))], 1)
    text = np.concatenate([shared + 0.2 * rng.standard_normal((rows, 6)), 5 * rng.standard_normal((rows, 10))], 1)
    return image @ to_image + 3, text @ to_text - 1


def recall(said: np.ndarray, seen: np.ndarray) -> float:
    groups = list(range(len(said)))
    return text_image_recall(Cosine(said, seen), groups, groups).text_to_image.at[1]


def test_partners_find_each_other_where_they_agree_quietly():
    image, text = quiet_agreement(600)
    found = canonical(image[:500], text[:500], ridges=[(1e-3, 1e-3), (0.1, 0.1)])
    assert found.chosen[:2] == (1e-3, 1e-3)  # more would drown what is quiet
    seen, said = (image[500:] - image[:500].mean(0)) @ found.image, (text[500:] - text[:500].mean(0)) @ found.text
    ridge = ridge_alignment(image[:500], text[:500], image[500:], text[500:])
    assert recall(said, seen) > 0.8
    assert recall(ridge.texts, ridge.pictures) < 0.3  # which compares the loud directions, that nobody can see
    assert (found.correlations[:6] > 0.9).all() and (found.correlations[6:] < 0.4).all()


def test_without_ridges_and_weights_the_mapped_vectors_are_white_and_correlate_one_by_one():
    image, text = quiet_agreement(400)
    found = canonical(image, text, ridges=[(1e-9, 1e-9)], powers=[0])
    seen, said = (image - image.mean(0)) @ found.image, (text - text.mean(0)) @ found.text
    np.testing.assert_allclose(seen.T @ seen, np.eye(16), atol=1e-6)
    np.testing.assert_allclose(said.T @ said, np.eye(16), atol=1e-6)
    np.testing.assert_allclose(seen.T @ said, np.diag(found.correlations), atol=1e-6)
    assert (np.diff(found.correlations) <= 1e-12).all()


def test_the_power_weighs_directions_by_how_well_they_agree():
    image, text = quiet_agreement(400)
    plain, weighted = (canonical(image, text, ridges=[(0.1, 0.1)], powers=[power]) for power in (0, 2))
    np.testing.assert_allclose(weighted.image, plain.image * plain.correlations**2)
    np.testing.assert_allclose(weighted.text, plain.text * plain.correlations**2)


def test_whole_groups_are_held_out():
    image, text = quiet_agreement(60)
    copies = np.repeat(np.arange(60), 5)
    rng = np.random.default_rng(2)
    many = image[copies] + 1e-3 * rng.standard_normal((300, 20)), text[copies] + 1e-3 * rng.standard_normal((300, 16))
    honest, fooled = (canonical(*many, groups=by, ridges=[(1e-3, 1e-3)], powers=[1, 2]) for by in (copies, None))
    assert min(fooled.held_out.values()) > max(honest.held_out.values()) + 0.1


def test_more_numbers_than_rows_and_a_direction_without_any_variance():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((30, 50)), rng.standard_normal((30, 40))
    image[:, 0], text[:, :2] = 7, 0
    found = canonical(image, text)
    assert np.isfinite(found.image).all() and np.isfinite(found.text).all()
    assert found.image.shape == (50, 40) and found.text.shape == (40, 40) and found.chosen in found.held_out


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected paired vectors"):
        canonical(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(UserError, match="group"):
        canonical(torch.randn(30, 4).numpy(), torch.randn(30, 4).numpy(), groups=["one"] * 30)
