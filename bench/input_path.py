"""How fast pictures become tensors, against plain Pillow in the same run.

    python -m bench.input_path furniture food interiors --out docs/bench/input_path.json

ours   open_picture(file, size_hint=size), then Processor.picture: a (3, S, S) uint8 tensor
plain  Image.open(file).convert("RGB").resize((S, S), BICUBIC), then the same array: no checks, full decode
draft  the same by someone who knows Pillow: a JPEG decoded at a fraction of its size, resize with a reducing gap

All squash to the square, so that all make the same thing; how far ours differs from plain is printed beside the speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.common import alternating, faster, keep, load, machine, parser, show
from interlace.data.cache import cache_folder
from interlace.data.pictures import SUFFIXES, open_picture
from interlace.data.processor import Processor

COLUMNS = [
    "set", "pictures", "Mpx", "threads", "ours/s", "plain/s", "draft/s", "vs plain", "range", "vs draft",
    "decode share", "differs",
]  # fmt: skip


def pictures_of(name: str, limit: int) -> list[Path]:
    """At most `limit` pictures, evenly spaced over the set: a folder, or a sample set by name."""
    folder = Path(name) if Path(name).is_dir() else cache_folder() / "data" / name
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f"no pictures under {folder}; get the sample first: interlace data {name}")
    return [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(limit, len(files))).astype(int))]


def ours(processor: Processor) -> Callable[[Path], torch.Tensor]:
    return lambda file: processor.picture(open_picture(file, size_hint=processor.size))


def plain(size: int) -> Callable[[Path], torch.Tensor]:
    def read(file: Path) -> torch.Tensor:
        with Image.open(file) as image:
            return tensor(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    return read


def draft(size: int) -> Callable[[Path], torch.Tensor]:
    def read(file: Path) -> torch.Tensor:
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))
            return tensor(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))

    return read


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def over(files: list[Path], read: Callable[[Path], Any], threads: int) -> Callable[[], None]:
    """All files through `read`, each result dropped at once as a loader's would be after its batch."""

    def one(file: Path) -> None:
        read(file)

    def run() -> None:
        if threads == 1:
            for file in files:
                one(file)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(one, files))

    return run


def decode_share(files: list[Path], processor: Processor) -> float:
    """Part of our time that goes into opening and decoding, the rest being resize and copy. One thread."""
    decode = rest = 0.0
    for file in files:
        start = time.perf_counter()
        picture = open_picture(file, size_hint=processor.size)
        decoded = time.perf_counter()
        processor.picture(picture)
        decode, rest = decode + decoded - start, rest + time.perf_counter() - decoded
    return decode / (decode + rest)


def difference(files: list[Path], processor: Processor) -> float:
    """Mean absolute difference between both results, in grey levels of 255."""
    mine, other = ours(processor), plain(processor.size)
    return float(np.mean([(mine(f).float() - other(f).float()).abs().mean().item() for f in files[:50]]))


def measure(name: str, files: list[Path], size: int, threads: list[int], repeats: int) -> list[dict[str, Any]]:
    processor = Processor(tokenizer=None, size=size, fit="squash")
    mpx = float(np.mean([np.prod(Image.open(f).size) / 1e6 for f in files]))
    share, apart = decode_share(files, processor), difference(files, processor)
    rows = []
    for count in threads:
        before = load()
        times = alternating([over(files, read, count) for read in (ours(processor), plain(size), draft(size))], repeats)
        (to_plain, spread), (to_draft, _) = faster(times[0], times[1]), faster(times[0], times[2])
        rows.append({
            "set": name, "pictures": len(files), "Mpx": mpx, "threads": count,
            **{f"{who}/s": len(files) / median(took) for who, took in zip(("ours", "plain", "draft"), times)},
            "vs plain": to_plain, "range": spread, "vs draft": to_draft, "decode share": share, "differs": apart,
            "load": before, "seconds": dict(zip(("ours", "plain", "draft"), times)),
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument("sets", nargs="*", default=["furniture", "food", "interiors"], help="sample names or folders")
    options.add_argument("--size", type=int, default=224, help="side of the square in pixels")
    options.add_argument("--limit", type=int, default=300, help="pictures per set")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = options.parse_args(argv)
    torch.set_num_threads(1)
    facts, rows = machine("pillow", "numpy", "torch"), []
    for name in given.sets:
        files = pictures_of(name, given.limit)
        rows += measure(Path(name).name, files, given.size, given.threads, given.repeats)
    notes = [
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']} at the start",
        f"Pillow {facts['packages']['pillow']}, size {given.size}, median of {given.repeats} alternating rounds, "
        "files in the page cache",
        "vs: pictures per second, ours over the other's, with the range over the rounds; decode share: of our time, "
        "one thread; differs: mean absolute difference of ours from plain, of 255 (much where pictures are "
        "transparent: ours puts them on white, plain drops the transparency)",
    ]
    show("Pictures to tensors", COLUMNS, rows, notes)
    keep(given.out, {"machine": facts, "size": given.size, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
