"""What the page shows before anyone searched: filters from the columns, a few pictures, a few queries."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from interlace.demo.schemas import Column, ValueCount
from interlace.run import Run
from interlace.search import Index, Item

LOOK = 20_000  # rows looked at for frequent values and ranges: enough to choose from, quick on 10 million
MOST = 40  # values listed per column
