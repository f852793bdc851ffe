from pathlib import Path

import pytest

from tests.regions.makers import write_photographs, write_vit


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTERLACE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    return write_vit(tmp_path_factory.mktemp("towers") / "vit")


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Wide, tall, square and two more."""
    return write_photographs(tmp_path / "photographs", [(96, 48), (40, 80), (64, 64), (50, 70), (33, 120)])
