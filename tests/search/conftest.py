"""Fixtures: an encoder, and pictures of coloured squares."""

from __future__ import annotations

import pytest
from squares import ColourEncoder, square


@pytest.fixture
def run(tmp_path) -> ColourEncoder:
    return ColourEncoder(tmp_path / "run")


@pytest.fixture
def squares(tmp_path):
    """A function that gives the first n pairs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    return lambda n, start=0: [square(folder, i) for i in range(start, n)]
