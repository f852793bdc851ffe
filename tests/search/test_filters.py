"""Filters: three independent evaluations agree on random rows and random filters, and errors point at their place."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from interlace.errors import UserError
from interlace.search.filters import (
    And,
    Column,
    Compare,
    Contains,
    Missing,
    Not,
    OneOf,
    Or,
    arrow,
    matches,
    parse,
    where_text,
)

COLUMNS = [
    Column("category", "a_category", "text"),
    Column("Made in (country)", "a_made_in_country", "text"),
    Column("width_cm", "a_width_cm", "number"),
    Column("price", "a_price", "number"),
    Column("foldable", "a_foldable", "boolean"),
]
C = {c.name: c for c in COLUMNS}
# fmt: off
TEXTS = ["Kitchen", "kitchen", "Living room", "it's", "''", '"', "50%", "_", "%", "a\\b", "\\", "", " ", "x' OR '1'='1",
         "É", "é", "漢字", "ß", "🪑", "; DROP TABLE items; --", "null", "NULL", "and", "a_category", "-- comment",
         "/* x */", "${x}", "tab\there", "new\nline", "') OR true OR ('", "\\' OR true --", "{0}", "?", "`a_price`"]
# fmt: on
NUMBERS = [0.0, -0.0, 1.0, -1.5, 79.99, 80.0, 1e-7, 1e300, 123456789.0, 0.1, 1 / 3]


def random_rows(rng: random.Random, n: int) -> list[dict]:
    def cell(kind: str):
        if rng.random() < 0.2:
            return None
        return rng.choice(TEXTS) if kind == "text" else rng.choice(NUMBERS) if kind == "number" else rng.random() < 0.5

    return [{c.name: cell(c.type) for c in COLUMNS} for _ in range(n)]


def random_tree(rng: random.Random, depth: int = 0):
    if depth < 3 and rng.random() < 0.55:
        kind = rng.choice([And, Or, Not])
        if kind is Not:
            return Not(random_tree(rng, depth + 1))
        return kind(tuple(random_tree(rng, depth + 1) for _ in range(rng.randint(2, 3))))
    column = rng.choice(COLUMNS)

    def value():
        if column.type == "number":
            return rng.choice(NUMBERS) + 0.0
        return rng.choice(TEXTS) if column.type == "text" else rng.random() < 0.5

    if rng.random() < 0.15:
        return Missing(column)
    if rng.random() < 0.2:
        return OneOf(column, tuple(dict.fromkeys(value() for _ in range(rng.randint(1, 4)))))
    if column.type == "text" and rng.random() < 0.3:
        return Contains(column, rng.choice([t for t in TEXTS if t]))
    return Compare(
        column, rng.choice(["=", "!=", "<", "<=", ">", ">="][: 6 if column.type == "number" else 2]), value()
    )


def as_table(rows: list[dict]) -> pa.Table:
    types = {"text": pa.string(), "number": pa.float64(), "boolean": pa.bool_()}

    def stored(value):  # -0.0 is stored as 0.0, as the index does
        return value + 0.0 if isinstance(value, float) else value

    columns = {c.field: pa.array([stored(row[c.name]) for row in rows], types[c.type]) for c in COLUMNS}
    return pa.table({"n": pa.array(range(len(rows))), **columns})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same rows as Python dicts, as an arrow table, and in LanceDB without and with scalar indexes."""
    import lancedb
    from lancedb.index import Bitmap, BTree

    rows = random_rows(random.Random(0), 300)
    table = as_table(rows)
    db = lancedb.connect(tmp_path_factory.mktemp("filters"))
    plain = db.create_table("plain", table)
    indexed = db.create_table("indexed", table.slice(0, 200))
    for c in COLUMNS:
        indexed.create_index(c.field, config=BTree() if c.type == "number" else Bitmap())
    indexed.add(table.slice(200))  # some rows lie outside the scalar indexes, as after an upsert
    return rows, table, plain, indexed


def test_python_arrow_and_lancedb_agree(stored):
    rows, table, plain, indexed = stored
    rng = random.Random(1)
    sizes = set()
    for _ in range(250):
        tree = random_tree(rng)
        expected = [i for i, row in enumerate(rows) if matches(tree, row)]
        assert table.filter(arrow(tree))["n"].to_pylist() == expected, str(tree)
        for lance in (plain, indexed):
            found = lance.search().where(where_text(tree)).select(["n"]).limit(len(rows)).to_arrow()["n"].to_pylist()
            assert sorted(found) == expected, (str(tree), where_text(tree))
        sizes.add(len(expected))
    assert len(sizes) > 30  # the expressions do discriminate


def test_what_is_printed_parses_back_to_the_same_rows():
    rng = random.Random(2)
    rows = random_rows(rng, 60)
    for _ in range(200):
        tree = random_tree(rng)
        again = parse(str(tree), COLUMNS)
        assert [matches(again, r) for r in rows] == [matches(tree, r) for r in rows], str(tree)


@pytest.mark.parametrize(
    "text, tree",
    [
        ("category = Kitchen", Compare(C["category"], "=", "Kitchen")),
        (
            "category = Living room and width_cm < 80",
            And((Compare(C["category"], "=", "Living room"), Compare(C["width_cm"], "<", 80.0))),
        ),
        ('category="living room"', Compare(C["category"], "=", "living room")),
        ("category != 'it''s'", Compare(C["category"], "!=", "it's")),
        ("category = children's", Compare(C["category"], "=", "children's")),
        ("category = Made in Italy", Compare(C["category"], "=", "Made in Italy")),
        ("width cm >= -1.5e2", Compare(C["width_cm"], ">=", -150.0)),
        ("WIDTH_CM == 3", Compare(C["width_cm"], "=", 3.0)),
        ("foldable = Yes", Compare(C["foldable"], "=", True)),
        ("not foldable = false", Not(Compare(C["foldable"], "=", False))),
        ("category in (Kitchen, 'a, b', Dining room)", OneOf(C["category"], ("Kitchen", "a, b", "Dining room"))),
        ("price not in (1, 2)", Not(OneOf(C["price"], (1.0, 2.0)))),
        ("price is missing", Missing(C["price"])),
        ("price IS NOT MISSING", Not(Missing(C["price"]))),
        ("category contains oak wood", Contains(C["category"], "oak wood")),
        ("'Made in (country)' = Italy", Compare(C["Made in (country)"], "=", "Italy")),
    ],
)
def test_parse(text, tree):
    assert parse(text, COLUMNS) == tree


def test_and_binds_tighter_than_or():
    tree = parse("price = 1 or price = 2 and (foldable = yes or price is missing)", COLUMNS)
    assert isinstance(tree, Or) and isinstance(tree.parts[1], And) and isinstance(tree.parts[1].parts[1], Or)


@pytest.mark.parametrize(
    "text, says",
    [
        ("categori = x", "Did you mean 'category'?"),
        ("colour = x", "The columns are: category (text)"),
        ("width_cm = abc", "width_cm is a number, got 'abc'"),
        ("width_cm < 80 cm", "got '80 cm'"),
        ("width_cm < nan", "is a number"),
        ("width_cm < 1e999", "too large"),
        ("foldable = maybe", "foldable is yes or no, got 'maybe'"),
        ("category < x", "has no order"),
        ("price contains 3", "looks inside text"),
        ("category contains ''", "at least one character"),
        ("category = salt and pepper", "needs quotes"),
        ("category", "expected =, !=, <"),
        ("category =", "expected a text, got the end"),
        ("category = a b) or price = 1", "expected 'and', 'or' or the end"),
        ("(category = a", "expected ')'"),
        ("category is kitchen", "after 'is' comes"),
        ("category in Kitchen", "expected '('"),
        ("price in ()", "expected a number"),
        ("price = 1,5", "Decimals are written with a point"),
        ("category = 'open", "never closed"),
        ("price ! 3", "not understood"),
        ("", "The filter is empty"),
        ("   ", "The filter is empty"),
        ("(" * 40 + "price = 1" + ")" * 40, "levels"),
        ("not " * 40 + "price = 1", "levels"),
        ("price = 1 or " * 400 + "price = 1", "at most 2,000"),
    ],
)
def test_errors_say_what_and_where(text, says):
    with pytest.raises(UserError) as error:
        parse(text, COLUMNS)
    assert says in str(error.value), str(error.value)


def test_the_caret_points_at_the_place():
    with pytest.raises(UserError) as error:
        parse("price = 1 and width_cm < wide", COLUMNS)
    line, caret = str(error.value).splitlines()[-2:]
    assert line[caret.index("^") :].startswith("wide")


def test_broken_filters_give_a_user_error_and_nothing_else():
    """One token of a good filter is dropped, doubled or replaced by an odd one: a tree comes out, or a UserError."""
    rng = random.Random(3)
    odd = [
        "=",
        "<",
        "(",
        ")",
        ",",
        "and",
        "not",
        "in",
        "is",
        "'",
        '"',
        "x'",
        "--",
        ";",
        "\udc80",
        "\x00",
        "🪑",
        "%",
        "\n",
    ]
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        tokens = str(random_tree(rng)).split(" ")
        i = rng.randrange(len(tokens))
        tokens[i : i + 1] = rng.choice([[], [tokens[i]] * 2, [rng.choice(odd)], [tokens[i] + rng.choice(odd)]])
        try:
            where_text(parse(" ".join(tokens), COLUMNS))
            outcomes[True] += 1
        except UserError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100


def test_a_field_name_of_our_table_is_the_only_identifier_written():
    with pytest.raises(ValueError):
        where_text(Missing(Column("x", "a; drop", "text")))


def test_the_deepest_and_longest_filters_run(stored):
    _, _, plain, _ = stored
    deep = "price = 1"
    for i in range(14):
        deep = f"(foldable = yes {'or' if i % 2 else 'and'} {deep})"
    plain.count_rows(where_text(parse(deep, COLUMNS)))
    plain.count_rows(where_text(parse("not " * 15 + "price = 1", COLUMNS)))
    plain.count_rows(where_text(parse(" or ".join(["price=1"] * 180), COLUMNS)))
