"""Which pictures share a scene, and where each of them stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

PLACES = ("top left", "top right", "bottom left", "bottom right")
TRIES = 200  # draws for one scene before the split is taken to have no more of them


@dataclass(frozen=True)
class Thing:
    """One picture of the source: its row, its short name, and the group it is of."""

    row: int
    name: str
    group: str


@dataclass(frozen=True)
class Scene:
    """`things` in the order in which the caption names them, each at its place (a position in PLACES); `swap`: the two
    of them that change places in the twin."""

    things: tuple[Thing, ...]
    places: tuple[int, ...]
    swap: tuple[int, int]

    def twin(self) -> Scene:
        """The same pictures, two of them exchanged: its caption has the same words."""
        i, j = self.swap
        things = list(self.things)
        things[i], things[j] = things[j], things[i]
        return replace(self, things=tuple(things))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(thing.name for thing in self.things)

    @property
    def swap_kind(self) -> str:
        p, q = (self.places[n] for n in self.swap)
        return "left-right" if p // 2 == q // 2 else "above-below" if p % 2 == q % 2 else "diagonal"


class Drawer:
    """Draws scenes of one split. `owned`: set of names -> the split that has it, shared by the splits: what stands
    together in a held-out scene never stood together in training."""

    def __init__(self, split: str, things: Sequence[Thing], owned: dict[frozenset[str], str],
                 rng: np.random.Generator):  # fmt: skip
        self.split, self.owned, self.rng = split, owned, rng
        self.by_name: dict[str, list[Thing]] = {}
        for thing in things:
            self.by_name.setdefault(thing.name, []).append(thing)
        self.seen: set[tuple] = set()
        self._weigh()

    def _weigh(self) -> None:
        self.names = list(self.by_name)
        # between every name alike (rare pictures would come again and again) and every picture alike (mostly chairs)
        weight = np.sqrt([len(self.by_name[name]) for name in self.names])
        self.weight = weight / weight.sum() if len(weight) else weight

    def drop(self, thing: Thing) -> None:
        """A picture that cannot be read stands in no further scene."""
        left = [other for other in self.by_name[thing.name] if other.row != thing.row]
        self.by_name.pop(thing.name) if not left else self.by_name.update({thing.name: left})
        self._weigh()

    def draw(self, cells: int, usable: Callable[[Scene], bool]) -> Scene | None:
        """A scene of `cells` things that was not drawn before, nor its twin; None when there seems to be none left."""
        swaps = list(combinations(range(cells), 2))
        for _ in range(TRIES):
            if len(self.names) < cells:
                return None
            names = self.rng.choice(len(self.names), cells, replace=False, p=self.weight)
            of = [self.by_name[self.names[n]] for n in names]
            things = tuple(some[int(self.rng.integers(len(some)))] for some in of)
            places = tuple(self.rng.permutation(len(PLACES))[:cells].tolist())
            scene = Scene(things, places, swaps[int(self.rng.integers(len(swaps)))])
            if len({thing.group for thing in things}) < cells or self._key(scene) in self.seen:
                continue
            if self.owned.get(scene.names, self.split) != self.split or not usable(scene):
                continue
            self.owned[scene.names] = self.split
            self.seen |= {self._key(scene), self._key(scene.twin())}
            return scene
        return None

    @staticmethod
    def _key(scene: Scene) -> tuple:
        return tuple(sorted((thing.row, place) for thing, place in zip(scene.things, scene.places)))
