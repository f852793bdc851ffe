"""A toy BLIP that learnt from a table of which some captions are wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from interlace.bootstrap import Decision, bootstrap, corrupt
from interlace.data.rows import Source
from interlace.data.sources import open_source
from tests.conftest import toy_settings, write_shapes


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """48 training pictures, 24 to validate, 24 to test."""
    return write_shapes(tmp_path_factory.mktemp("few") / "table", variants=4)


@pytest.fixture(scope="session")
def noisy_folder(few, tmp_path_factory) -> Path:
    return corrupt(open_source(few), tmp_path_factory.mktemp("noisy") / "table", 0.3, seed=3).folder


@pytest.fixture
def noisy(noisy_folder) -> Source:
    return open_source(noisy_folder)


@pytest.fixture(scope="session")
def pretrained(noisy_folder, text_tower, image_tower, tmp_path_factory) -> Path:
    """Contrast, match and a decoder, after some steps on the noisy table."""
    from interlace.train import train

    settings = toy_settings(noisy_folder, text_tower, tmp_path_factory.mktemp("runs") / "blip", steps=15, batch=24,
                            evaluate=False)  # fmt: skip
    settings.model.system, settings.model.image = "blip", str(image_tower)
    settings.objectives, settings.passes = {}, [{"itc": {}, "itm": {"negatives": "hard"}, "lm": {}}]
    return train(settings)


@pytest.fixture(scope="session")
def middle(pretrained, noisy_folder, tmp_path_factory) -> float:
    """A threshold that some texts pass and others do not, whatever the toy has learnt."""
    import numpy as np

    out = tmp_path_factory.mktemp("middle") / "table"
    bootstrap(pretrained, open_source(noisy_folder), out, decision=Decision(threshold=0.0, sheet=0), batch=16,
              progress=False)  # fmt: skip
    lines = read_lines(out / "lineage.jsonl")
    return float(np.quantile([line["match_web"] for line in lines if "match_web" in line], 0.5))


def read_lines(file: Path) -> list[dict]:
    import json

    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def once(pretrained, noisy_folder, middle, tmp_path_factory):
    out = tmp_path_factory.mktemp("once") / "clean"
    return bootstrap(pretrained, open_source(noisy_folder), out, decision=Decision(threshold=middle), batch=16,
                     progress=False)  # fmt: skip


@pytest.fixture
def cleaned(once, tmp_path):
    """(folder, report) of a table decided at the middle; the test's own copy."""
    folder = shutil.copytree(once.folder, tmp_path / "clean")
    return folder, replace(once, folder=folder)
