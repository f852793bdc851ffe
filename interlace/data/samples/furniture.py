"""furniture: rendered objects with sizes and names in several languages, from Debian's sweethome3d-furniture."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from pathlib import Path

from interlace.data.samples.fetch import apt_download, deb_members, one_file
from interlace.data.samples.write import Item, choose, share, write_folder
from interlace.errors import UserError

PACKAGE = "sweethome3d-furniture"
LANGUAGES = ("de", "fr", "es", "it", "ja")
PLACES = {
    "Living room": "the living room", "Kitchen": "the kitchen", "Bedroom": "the bedroom", "Bathroom": "the bathroom",
    "Office": "the office", "Exterior": "outdoors",
}  # fmt: skip
SEATS = {"chair", "armchair", "sofa", "couch", "stool", "bench", "seat", "loveseat", "chaise"}
UNSURE_SEATS = {
    "bed", "toilet", "toilets", "swing", "horse", "bath", "bathtub", "bidet", "box", "table", "rug", "carpet", "tatami",
    "mattress", "hammock", "puff", "pouf", "ottoman", "stairs", "staircase", "escalator", "rock", "wheelchair", "unit",
    "deckchair", "lounger", "pillow", "cushion", "scooter", "bike", "bicycle", "suite", "set", "urinal", "tractor",
}  # fmt: skip
OBJECT = ("What is it?", "What is this object?", "What does the picture show?", "What do you see?")
ROOM = ("Which room does it belong to?", "Where in a home would you find it?", "Where does it belong?")
TALLER = ("Is it taller than it is wide?", "Is its height greater than its width?")
HEIGHT = ("How tall is it?", "About how high is it?", "What is its height?")
SIT = ("Can you sit on it?", "Is it something to sit on?", "Is it a seat?")
OUTSIDE = ("Does it belong outdoors?", "Would you put it outside?")
DOOR = ("Is it a door or a window?", "Is this a window or a door?")
HEIGHTS = ((20, "under 20 cm"), (60, "20 to 60 cm"), (100, "60 to 100 cm"), (200, "1 to 2 m"), (1e9, "over 2 m"))


def fetch(packages: Path) -> None:
    apt_download(PACKAGE, packages, 119.8)


def write(packages: Path, folder: Path) -> None:
    items: list[Item] = []
    notes: list[str] = []
    catalogues = deb_members(one_file(packages, f"{PACKAGE}_*.deb"), ".sh3f")
    for name, data in sorted(catalogues.items()):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found, note = read_catalogue(archive)
        items += found
        notes.append(f"{Path(name).stem}: {len(found)} items. {note}")
    if not items:
        raise UserError("The Debian package holds no furniture catalogue: its form may have changed.")
    ask(items)
    write_folder(folder, items, _licence(notes))


def properties(data: bytes) -> dict[str, str]:
    """A Java .properties file: Latin-1 with \\uXXXX escapes, `=`, `:` or space between key and value, continued
    lines."""
    out: dict[str, str] = {}
    lines = iter(data.decode("latin-1").splitlines())
    for line in lines:
        line = line.lstrip(" \t\f")
        if not line or line[0] in "#!":
            continue
        while len(line) - len(line.rstrip("\\")) & 1:
            line = line[:-1] + next(lines, "").lstrip(" \t\f")
        match = re.match(r"((?:[^\\=:\s]|\\.)*)[ \t\f]*[=: \t\f]?[ \t\f]*(.*)", line, re.DOTALL)
        if match:
            out[_unescape(match[1])] = _unescape(match[2])
    return out


def _unescape(text: str) -> str:
    plain = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
    joined = re.sub(
        r"\\(u[0-9a-fA-F]{4}|.)",
        lambda m: chr(int(m[1][1:], 16)) if len(m[1]) == 5 else plain.get(m[1], m[1]),
        text,
        flags=re.DOTALL,
    )
    # a character beyond 16 bits is written as two escapes, a surrogate pair
    return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_catalogue(archive: zipfile.ZipFile) -> tuple[list[Item], str]:
    """(items, the catalogue's own words about its licence) of one .sh3f file."""
    base = "PluginFurnitureCatalog"
    words = properties(archive.read(f"{base}.properties"))
    present = set(archive.namelist())
    translated = {
        language: properties(archive.read(f"{base}_{language}.properties"))
        for language in LANGUAGES
        if f"{base}_{language}.properties" in present
    }
    licence = " ".join(words.get("license", "not stated").split())
    items = []
    for key in words:
        if not key.startswith("icon#"):
            continue
        number = key.removeprefix("icon#")
        icon = words[key].lstrip("/")
        if icon not in present:
            continue
        facts = _facts(words, number, licence)
        for language, names in translated.items():
            facts[f"name_{language}"] = names.get(f"name#{number}", "").strip() or None
        name = " ".join(words[f"name#{number}"].split())
        slug = re.sub(r"[^a-z0-9]+", "-", words.get(f"id#{number}", icon).lower()).strip("-")
        items.append(
            Item(slug, slug + Path(icon).suffix.lower(), archive.read(icon), _caption(slug, name, facts), name, facts)
        )
    return items, licence


def _facts(words: dict[str, str], number: str, licence: str) -> dict[str, str | float | bool | None]:
    def cell(key: str) -> str:
        return words.get(f"{key}#{number}", "").strip()

    tags = [tag.strip() for tag in cell("tags").split(",")]
    return {
        "category": cell("category"),
        **{f"{side}_cm": float(cell(side)) if cell(side) else None for side in ("width", "depth", "height")},
        "tags": ", ".join(tag for tag in tags if tag and tag not in ("Blend Swap", "SCPTS")) or None,
        "door_or_window": cell("doorOrWindow") == "true",
        "movable": cell("movable") == "true",
        "creator": cell("creator") or None,
        "licence": licence,
    }


def _caption(key: str, name: str, facts: dict[str, str | float | bool | None]) -> str:
    category = str(facts["category"])
    if category == "Exterior":
        options = [f"{name}, for outdoors", f"{name} for the outside", f"{name}, found outdoors"]
    elif category in PLACES:
        place = PLACES[category]
        options = [f"{name} for {place}", f"{name}, as found in {place}", f"{name}, {category.lower()}"]
    elif category == "Vehicles":
        options = [f"{name}, a vehicle", f"A vehicle: {name}"]
    elif category == "Lights":
        options = [f"{name}, a light", f"{name} for lighting"]
    else:
        options = [name, f"A picture of: {name}"]
    return choose(key, options)


def head(name: str) -> str:
    """ "chair" for "Chair with cushion" and "Mid century chair": the noun a person would answer with."""
    noun = re.split(r" with | of | for | in | under | on | and |\(|,| - |/|\d", name.lower())[0].split()
    return noun[-1] if noun else name.lower()


def ask(items: list[Item]) -> None:
    """Questions whose answers show in the picture, or follow from knowing the object; sizes are the catalogue's."""
    heads = Counter(head(item.name) for item in items)
    for item in items:
        key, category, noun = item.id, str(item.facts["category"]), head(item.name)
        width, height = item.facts["width_cm"], item.facts["height_cm"]
        words = set(re.findall(r"[a-z]+", item.name.lower()))
        seat = bool(words & SEATS) or "Seat" in str(item.facts["tags"]).split(", ")
        if heads[noun] >= 4 and noun not in ("unit", "slot", "tool"):  # fewer are answers nobody can learn
            item.asks.append(("object", choose("object" + key, OBJECT), noun))
        if category in PLACES:
            item.asks.append(("room", choose("room" + key, ROOM), PLACES[category].removeprefix("the ")))
            outside = category == "Exterior"
            if outside or share("outside" + key) < 0.25:
                item.asks.append(("outdoors", choose("out" + key, OUTSIDE), "yes" if outside else "no"))
        if width and height and not 0.9 < height / width < 1.1:  # too close to see
            item.asks.append(("taller than wide", choose("taller" + key, TALLER), "yes" if height > width else "no"))
        if height:
            bucket = next(text for limit, text in HEIGHTS if height < limit)
            item.asks.append(("height", choose("height" + key, HEIGHT), bucket))
        if category in ("Vehicles", "Characters"):
            continue  # some cars are Seats, and one sits in them; on people and horses opinions differ
        if seat and not words & {"cushion", "cover"}:
            item.asks.append(("seat", choose("sit" + key, SIT), "yes"))
        elif not seat and not words & UNSURE_SEATS and share("seat" + key) < 0.22:
            item.asks.append(("seat", choose("sit" + key, SIT), "no"))
        if category == "Doors and windows" and words & {"door", "window"} and not {"door", "window"} <= words:
            item.asks.append(("door or window", choose("door" + key, DOOR), "door" if "door" in words else "window"))


def _licence(notes: list[str]) -> str:
    lines = "\n".join(f"  {note}" for note in notes)
    return f"""Objects from the furniture catalogues of Sweet Home 3D, as packaged by Debian ({PACKAGE}).
Their licences ask, public domain apart, to name the creators: columns `creator` and `licence` of pairs.csv say for
every item. Converted by Emmanuel Puybaret / eTeks. Changed here: only the icons are kept, captions and questions are
made from the catalogues' names, categories and sizes.
{lines}
"""
