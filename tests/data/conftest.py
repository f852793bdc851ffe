from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of its own for every test, so that none sees another's downloads or the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTERLACE_CACHE", str(folder))
    return folder
