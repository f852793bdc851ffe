"""Which column plays which role, and what type the remaining ones have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from interlace.errors import UserError, suggest

# First match wins, so a table with both a caption and a title keeps the title as the item's name.
ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "filepath", "file_name", "filename", "image_path", "img_path", "picture", "path", "file", "img",
              "image_file", "photo", "jpg", "png"),
    "caption": ("caption", "captions", "text", "title", "sentence", "description", "txt"),
    "id": ("id", "item_id", "product_id", "image_id", "key", "__key__", "sku"),
    "group": ("group", "group_id", "product_group"),
    "split": ("split", "subset", "fold"),
    "name": ("name", "title", "product_name", "item_name"),
    "hash": ("phash",),
}  # fmt: skip
QUESTION_ALIASES: dict[str, tuple[str, ...]] = {
    "image": ALIASES["image"],
    "question_id": ("question_id", "id"),
    "pair_id": ("pair_id",),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "kind": ("kind", "question_type"),
    "split": ALIASES["split"],
}


def resolve(
    have: Sequence[str],
    wanted: dict[str, str] | None,
    where: str,
    required: Iterable[str] = ("image",),
    aliases: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, str]:
    """Role -> column name. `wanted` overrides the aliases, which are compared without regard to case.

    Raises UserError for a role or a column that does not exist, naming those that do and the nearest.
    """
    aliases = ALIASES if aliases is None else aliases
    roles: dict[str, str] = {}
    for role, column in (wanted or {}).items():
        if role not in ALIASES and role not in QUESTION_ALIASES:
            raise UserError(f"No role {role!r} for a column; roles are {', '.join(ALIASES)}.{suggest(role, ALIASES)}")
        if role not in aliases:
            continue
        if column not in have:
            raise UserError(
                f"{where}: no column {column!r} for {role}; it has {', '.join(map(repr, have))}.{suggest(column, have)}"
            )
        roles[role] = column
    lower = {column.strip().lower(): column for column in reversed(have)}
    for role, names in aliases.items():
        if role in roles:
            continue
        free = [lower[name] for name in names if name in lower and lower[name] not in roles.values()]
        if free:
            roles[role] = free[0]
    for role in required:
        if role not in roles:
            near = next((hint for name in have if (hint := suggest(name.lower(), aliases[role]))), "")
            close = f" Near one of them:{near.removesuffix('?').removeprefix(' Did you mean')}." if near else ""
            raise UserError(
                f"{where}: no column for {role}. Expected one of {', '.join(aliases[role][:6])}, ...; "
                f"it has {', '.join(map(repr, have))}.{close} Name it with --column {role}=NAME "
                f"(data.columns.{role}=NAME in a config, columns={{{role!r}: NAME}} in Python)."
            )
    return roles


def caption_hint(have: Sequence[str], wanted: dict[str, str] | None, roles: dict[str, str], name: str) -> list[str]:
    """A line when the caption was chosen among several likely columns, and nobody said which."""
    chosen = roles.get("caption")
    if chosen is None or "caption" in (wanted or {}) or chosen.strip().lower() in ("caption", "captions"):
        return []
    taken = set(roles.values())
    others = [c for c in have if c.strip().lower() in ALIASES["caption"] and c not in taken]
    if not others:
        return []
    rest = f"{others[0]!r} is an attribute" if len(others) == 1 else f"{' and '.join(map(repr, others))} are attributes"
    return [
        f"NOTE: the captions of {name} are its column {chosen!r}, and {rest}. "
        f"To change that: --column caption={others[0]} (data.columns.caption={others[0]} in a config)."
    ]


class Kind:
    """Watches a column's values go by and says at the end whether it is "text", "number" or "boolean"."""

    NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

    def __init__(self) -> None:
        self.boolean = self.number = True
        self.seen = False

    def watch(self, values: Iterable[Any]) -> None:
        if not (self.boolean or self.number):
            return
        for value in set(values):
            if value is None or value == "":
                continue
            self.seen = True
            if isinstance(value, bool):
                self.number = False
                continue
            if isinstance(value, (int, float)):
                self.boolean = False
                continue
            text = str(value).strip()
            self.boolean = self.boolean and text.lower() in ("true", "false", "yes", "no")
            self.number = self.number and self._is_number(text)
            if not (self.boolean or self.number):
                return

    def _is_number(self, text: str) -> bool:
        # an article number such as 0042 or a long barcode is a name made of digits, not a quantity
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
            return False
        return len(digits) <= 15 and self.NUMBER.fullmatch(text) is not None and math.isfinite(float(text))

    @property
    def name(self) -> str:
        if not self.seen:
            return "text"
        return "boolean" if self.boolean else "number" if self.number else "text"
