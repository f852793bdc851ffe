"""`interlace data get NAME`: fetch once, normalise, and from then on work without a network."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from interlace.data.cache import cache_folder
from interlace.data.samples import food, furniture, interiors
from interlace.errors import UserError, suggest


@dataclass(frozen=True)
class Sample:
    about: str
    fetch: Callable[[Path], None]  # downloads the packages into a folder
    write: Callable[
        [Path, Path], None
    ]  # reads them there and writes pairs.csv, questions.jsonl, pictures/, LICENCE.txt


SAMPLES = {
    "furniture": Sample(
        "820 rendered pictures of furniture and other objects, with sizes", furniture.fetch, furniture.write
    ),
    "food": Sample("463 photographs of foods of India, with groups and local names", food.fetch, food.write),
    "interiors": Sample("39 photographs of rooms without captions, to search in", interiors.fetch, interiors.write),
}


def sample_folder(name: str) -> Path:
    """Where a sample set lies or would lie. Raises UserError for an unknown name."""
    if name not in SAMPLES:
        raise UserError(f"No sample set {name!r}; there are {', '.join(SAMPLES)}.{suggest(name, SAMPLES)}")
    return cache_folder() / "data" / name


def get_sample(name: str, packages: str | Path | None = None) -> Path:
    """The folder of a sample set, fetched and built when it is not there yet; prints its licence either way.

    `packages` is a folder with the packages already downloaded (the .deb, .tgz or .whl), for machines without a network
    or without the client program. A broken download leaves nothing behind: the set is built aside and renamed.

    Raises UserError when the client program is missing or fails, with its last lines.
    """
    folder = sample_folder(name)
    console = Console(highlight=False, soft_wrap=True)
    if not (folder / "pairs.csv").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not (folder / "pairs.csv").exists():
                _build(SAMPLES[name], folder, Path(packages).expanduser() if packages is not None else None, console)
    console.print(f"[bold]{name}[/bold]: {SAMPLES[name].about}\n{folder}\n")
    console.print((folder / "LICENCE.txt").read_text(encoding="utf-8").split("\n\n====", 1)[0], markup=False)
    return folder


def _build(sample: Sample, folder: Path, packages: Path | None, console: Console) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if packages is None:
            packages = aside / "packages"
            packages.mkdir()
            sample.fetch(packages)
        elif not packages.is_dir():
            raise UserError(f"No folder {str(packages)!r} with downloaded packages.")
        built = aside / folder.name
        (built / "pictures").mkdir(parents=True)
        console.print(f"Preparing {folder.name} ...")
        sample.write(packages, built)
        if folder.exists():  # an earlier attempt of some other program; ours are renamed only when whole
            shutil.rmtree(folder)
        os.replace(built, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
