"""Regions of pictures for the models that read regions: where features and boxes come from, and where they are kept.

    interlace extract shop.csv regions/shop             # grid cells of a tower, or a detector's boxes
    regions = open_regions("regions/shop")              # or released features: .npz files, LXMERT's TSV, UNITER's LMDB
    batch = collate_regions([regions.of(pair) for pair in source.pairs("test")], boxes=7)
"""

from interlace.regions.arrays import BadRegions, RegionArrays, check_regions, with_whole
from interlace.regions.base import RegionSource
from interlace.regions.collate import collate_regions, to_regions
from interlace.regions.extract import ExtractReport, extract
from interlace.regions.open import extractor_of, open_regions
from interlace.regions.store import RegionStore

__all__ = [
    "BadRegions",
    "ExtractReport",
    "RegionArrays",
    "RegionSource",
    "RegionStore",
    "check_regions",
    "collate_regions",
    "extract",
    "extractor_of",
    "open_regions",
    "to_regions",
    "with_whole",
]
