"""What a scene is called: short names, its caption, and questions whose answers are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interlace.data.samples.write import choose
from interlace.data.scenes.draw import PLACES, Scene
from interlace.data.sources.build import hash64

# what ends the part of a name that names the thing: "chair with cushion", "rice, raw", "window (double)"
ENDS = re.compile(r"[,;:(\[/]| - | (?:with|without|of|for|in|on|at|under|and|from|by|to) ")
MASS = {"bread", "butter", "cheese", "coffee", "flour", "furniture", "ghee", "honey", "juice", "meat", "milk", "oil",
        "rice", "salt", "starch", "sugar", "tea", "water", "wheat", "wood"}  # fmt: skip

WHERE = ("Where do you see {x}?", "In which place do you see {x}?")
WHAT = ("What do you see at the {p}?", "What stands at the {p}?")
EXISTS = ("Do you see {x}?", "Does the picture show {x}?")
LEFT = ("Do you see {x} to the left of {y}?", "Does the picture show {x} left of {y}?")
ABOVE = ("Do you see {x} above {y}?", "Does the picture show {x} higher up than {y}?")
COUNT = ("How many things do you see?", "How many things does the picture show?")


def noun(name: str) -> str:
    """The word a person would answer with: "chair" for "Oak chair with cushion" and for "Chair 2"; empty for a name
    that has none."""
    first = next((part for part in ENDS.split(name.lower()) if part.strip()), "")
    words = first.split()
    while words and (len(words[-1]) < 2 or not re.fullmatch(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", words[-1])):
        words.pop()  # a number, a size, one letter
    return words[-1] if words else ""


def phrase(name: str) -> str:
    """ "a chair", "an armchair", "shelves", "rice"."""
    last = name.split()[-1]
    if last in MASS or (last.endswith("s") and not last.endswith(("ss", "us", "is", "as"))):
        return name
    return f"{'an' if re.match(r'(?!uni|use|eu|one)[aeiou]', name) else 'a'} {name}"


def caption(scene: Scene) -> str:
    """ "a chair at the top left and a lamp at the bottom right", in the order in which the scene names its things."""
    parts = [f"{phrase(thing.name)} at the {PLACES[place]}" for thing, place in zip(scene.things, scene.places)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class Asked:
    kind: str
    question: str
    answer: str


def ask(pairs: Sequence[tuple[str, Scene]], count: bool,
        rng: np.random.Generator) -> list[tuple[list[Asked], list[Asked]]]:  # fmt: skip
    """Questions about each scene and about its twin, for all (id, scene) of one split.

    A twin is asked in the same words: what depends on the two exchanged places has another answer there, so no wording
    has a more frequent answer. `exists`: every name is asked for as often where it is as where it is not. `count`: ask
    how many things there are.
    """
    present = [scene.things[int(rng.integers(len(scene.things)))].name for _, scene in pairs]
    absent = _elsewhere(present, [{t.name for t in scene.things} for _, scene in pairs], rng)
    asked_for = present[:]
    # a name that found no scene without it is asked for once less where it is
    spare = Counter(present) - Counter(name for name in absent if name)
    for n, name in enumerate(present):
        if spare[name]:
            spare[name] -= 1
            asked_for[n] = ""
    out = []
    for (key, scene), yes, no in zip(pairs, asked_for, absent):
        shared = [Asked("exists", choose("e" + key, EXISTS).format(x=phrase(name)), answer)
                  for name, answer in ((yes, "yes"), (no, "no")) if name]  # fmt: skip
        if count:
            shared.append(Asked("count", choose("c" + key, COUNT), str(len(scene.things))))
        out.append((_places(key, scene) + shared, _places(key, scene.twin()) + shared))
    return out


def _places(key: str, scene: Scene) -> list[Asked]:
    """What is asked of the two exchanged places. Worded by `key` alone, so a scene and its twin are asked the same."""
    i, j = scene.swap
    place = {thing.name: where for thing, where in zip(scene.things, scene.places)}
    at = {where: name for name, where in place.items()}
    p, q = scene.places[i], scene.places[j]
    x, y = sorted((at[p], at[q]), key=lambda name: hash64(key + name))
    asked = [Asked("where", choose("w" + key, WHERE).format(x=phrase(x)), PLACES[place[x]]),
             Asked("what", choose("o" + key, WHAT).format(p=PLACES[p]), at[p])]  # fmt: skip
    words = {"x": phrase(x), "y": phrase(y)}
    if p % 2 != q % 2:
        answer = "yes" if place[x] % 2 < place[y] % 2 else "no"
        asked.append(Asked("left of", choose("l" + key, LEFT).format(**words), answer))
    if p // 2 != q // 2:
        answer = "yes" if place[x] // 2 < place[y] // 2 else "no"
        asked.append(Asked("above", choose("a" + key, ABOVE).format(**words), answer))
    return asked


def _elsewhere(names: list[str], inside: list[set[str]], rng: np.random.Generator) -> list[str]:
    """The same names in another order, so that none falls to a scene that has it; "" where that cannot be done."""
    order = rng.permutation(len(names))
    drawn = [names[n] for n in order]
    for n in range(len(drawn)):
        if drawn[n] in inside[n]:
            for m in rng.permutation(len(drawn)).tolist():
                if drawn[m] not in inside[n] and drawn[n] not in inside[m]:
                    drawn[n], drawn[m] = drawn[m], drawn[n]
                    break
    return ["" if name in inside[n] else name for n, name in enumerate(drawn)]


def priors(asked: Sequence[Asked]) -> dict[str, tuple[int, int, float]]:
    """Kind -> (questions, different answers, share of the most frequent one): what is right without looking."""
    by_kind: dict[str, Counter[str]] = {}
    for one in asked:
        by_kind.setdefault(one.kind, Counter())[one.answer] += 1
    return {kind: (c.total(), len(c), c.most_common(1)[0][1] / c.total()) for kind, c in by_kind.items()}
