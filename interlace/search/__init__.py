"""Search over pictures: build an index with a run, then find pictures by words, by a picture, or by both.

    index = Index.open("runs/demo/index", run)
    for hit in search(index, run, text="a red chair", where="width_cm < 80"):
        print(hit.score, hit.name)

LanceDB, which holds the rows, is imported when an index is opened: it takes seconds to import.
"""

from interlace.search.build import IndexReport, build_index
from interlace.search.calibrate import recall_against_exact
from interlace.search.index import Index, Upserted
from interlace.search.rows import Item
from interlace.search.search import Hit, Result, search
from interlace.search.show import print_hits, print_report, to_dicts

__all__ = [
    "Hit",
    "Index",
    "IndexReport",
    "Item",
    "Result",
    "Upserted",
    "build_index",
    "print_hits",
    "print_report",
    "recall_against_exact",
    "search",
    "to_dicts",
]
