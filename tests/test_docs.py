"""What the documents say is so: commands parse, links lead somewhere, tables equal the code, examples run."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import shlex
import shutil
import sqlite3
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image

from interlace.cli import build_parser
from interlace.data.batches import Collate, Samples
from interlace.data.processor import Processor
from interlace.data.sources import open_source
from interlace.data.sources.build import build
from interlace.data.sources.columns import ALIASES
from interlace.data.sources.open import TABLES
from interlace.errors import UserError
from interlace.layers import Kind, Layer
from interlace.learner import Learner
from interlace.model import VLModel
from interlace.objectives import Objective, Views
from interlace.run import Run
from interlace.schedule import fused
from interlace.search import Index, build_index, search
from interlace.search.filters import Column, parse
from interlace.settings import Settings, load_settings
from interlace.streams import Streams, everyone
from interlace.towers import load_tokenizer
from interlace.verbs import columns

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/systems").glob("*.md")])
# written by whoever measures, so a working copy may not have them yet
MEASURED: set[str] = set()


def blocks(page: Path) -> list[tuple[str, str]]:
    """(what stands after the three backticks, the text) of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The command lines of all blocks that are not said to be something else."""
    return [line for what, text in blocks(page) if not what for line in text.splitlines() if line.strip()]


def table(page: Path, header: str) -> list[list[str]]:
    """The rows of the table whose first header cell is `header`, without backticks."""
    lines = page.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def load(name: str) -> ModuleType:
    """An example, imported as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "docs/examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_trace():
    """What the examples add to the library is taken away again: other tests look at all kinds, all objectives."""
    before = [dict(known) for known in (Layer.kinds, Objective.known, TABLES)]
    yield
    for known, kept in zip((Layer.kinds, Objective.known, TABLES), before):
        known.clear()
        known.update(kept)


# ------------------------------------------------------------------------------------------------------------ commands


def ours(line: str) -> list[str] | None:
    """The arguments that reach our parser, whether it is started by name, as a module or through an example."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["interlace"]:
        return words[1:]
    if "interlace.cli" in words:
        return words[words.index("interlace.cli") + 1 :]
    if words[:1] == ["python"] and words[1].startswith("docs/examples/"):
        assert (ROOT / words[1]).is_file(), line
        return words[2:] if not (words[1].endswith("gated_read.py") and words[2] == "train") else None
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_command_parses(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        given = ours(line)
        if given is None:
            continue
        args = build_parser().parse_args(given)
        columns(getattr(args, "column", None))
        if args.verb == "train":  # the keys must exist too
            if "margin" in line:
                load("margin")
            overrides = [args.config, *args.overrides] if "=" in args.config else args.overrides
            shipped = args.config if args.config == "demo" else None
            settings = load_settings(shipped, overrides)
            assert set(settings.objectives) <= set(Objective.known), line


def test_commands_are_found_at_all():
    assert sum(ours(line) is not None for page in PAGES for line in commands(page)) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if str(file.relative_to(ROOT)) in MEASURED and not file.exists():
            continue
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            known = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in known, f"{page.name}: {target}"


# -------------------------------------------------------------------------------------------------------------- tables


def flat(settings: object, at: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value, name = getattr(settings, field.name), f"{at}{field.name}"
        if name in ("objectives", "passes"):
            continue
        out |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return out


def shown(value: object) -> str:
    """As it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def test_the_table_of_keys_is_that_of_the_code():
    rows = {row[0]: row[1] for row in table(ROOT / "docs/training.md", "key")}
    assert rows == {name: shown(value) for name, value in flat(Settings()).items()}


def test_every_key_has_a_meaning():
    assert all(len(row) == 3 and row[2] for row in table(ROOT / "docs/training.md", "key"))


def test_the_table_of_objectives_is_that_of_the_code():
    rows = {row[0]: row[1] for row in table(ROOT / "docs/training.md", "option")}
    options = {
        f"{name}.{option}": shown(p.default)
        for name, objective in Objective.known.items()
        for option, p in inspect.signature(objective).parameters.items()
    }
    assert rows == {key: options[key] for key in rows if key in options}
    assert {key for key in options if key.split(".")[0] in Settings().objectives} <= rows.keys()
    text = (ROOT / "docs/training.md").read_text()
    shipped = [name for name, objective in Objective.known.items() if objective.__module__.startswith("interlace.")]
    assert not [name for name in shipped if f"**{name}**" not in text and f"`{name}`" not in text]


def test_the_recipe_shown_is_the_recipe_shipped():
    page = [text for what, text in blocks(ROOT / "docs/training.md") if what == "yaml"]
    ship = yaml.safe_load((ROOT / "interlace/recipes/demo.yaml").read_text())
    said = yaml.safe_load(page[0])
    for part, keys in said.items():
        for key, value in (keys or {}).items():
            assert ship[part][key] == value, f"{part}.{key}"
    defaults = flat(Settings())
    for part, keys in ship.items():
        for key, value in (keys or {}).items():  # what the page leaves out is a default
            assert key in said[part] or defaults[f"{part}.{key}"] == value, f"{part}.{key}"


def test_the_aliases_listed_are_those_of_the_code():
    rows = {row[0]: tuple(row[1].replace("\\", "").split(", ")) for row in table(ROOT / "docs/data.md", "role")}
    assert rows == ALIASES


def test_the_fusion_table_is_what_the_schedule_builds():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `fusion=")]
    assert len(lines) == 3
    for line in lines:
        fusion, dual, single, _ = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        for streams, cell in (("dual", dual), ("single", single)):
            segments = fused(fusion.removeprefix("fusion="), streams, 4, "post")
            want = [kind.name for kinds in segments.values() for kind in kinds]
            got = []
            for part in cell.split(", "):
                name, _, times = part.partition(" x ")
                got += [name] * int(times or 1)
            assert got == want, line


def test_every_kind_listed_is_known_and_every_basic_kind_is_listed():
    rows = table(ROOT / "docs/architecture.md", "kind")
    listed = {name.strip(" `"): row[2] for row in rows for name in row[0].split(",")}
    basic = {name: kind for name, kind in Layer.kinds.items() if kind.__module__ == "interlace.layers"}
    assert {name: "yes" if kind.crosses else "no" for name, kind in basic.items()} == listed


def test_the_filters_shown_parse():
    kinds = {"category": "text", "name": "text", "caption": "text", "width_cm": "number", "price": "number",
             "width (cm)": "number", "folding": "boolean"}  # fmt: skip
    known = [Column(name, f"f{n}", kind) for n, (name, kind) in enumerate(kinds.items())]
    text = next(text for _, text in blocks(ROOT / "docs/search.md") if text.startswith("category = "))
    for line in text.splitlines():
        assert str(parse(line[:46].strip(), known))
    for page in PAGES:
        for line in commands(page):
            if "--where" in line:
                parse(shlex.split(line)[shlex.split(line).index("--where") + 1], known)


# --------------------------------------------------------------------------------------------------------------- forms

NAMED = [(page, what.split()[1], text) for page in PAGES for what, text in blocks(page) if len(what.split()) == 2]


@pytest.mark.parametrize("page, name, text", NAMED, ids=lambda x: x if isinstance(x, str) and "\n" not in x else None)
def test_every_file_shown_opens_as_it_is(page, name, text, tmp_path):
    if name == "questions.jsonl":  # lies beside the table of the same page
        table_name, rows = next((n, t) for p, n, t in NAMED if p == page and n.endswith(".csv") and "photos/" in t)
        (tmp_path / table_name).write_text(rows)
        text += rows  # for its pictures
    else:
        table_name = name
    for picture in set(re.findall(r"[\w/]+\.jpg", text)):
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (len(picture) * 9 % 256, 120, 60)).save(tmp_path / picture)
    (tmp_path / name).write_text(next(t for p, n, t in NAMED if p == page and n == name))
    odd = {"image": "Foto", "caption": "Blurb", "id": "Artikel"} if name == "goods.csv" else None
    path = tmp_path if table_name in ("metadata.csv", "pairs.csv") else tmp_path / table_name
    source = open_source(path, columns=odd)
    assert len(source) >= 2 and source.n_problems == 0
    if "question" in text:
        assert source.n_questions == 2 and all(q.answers for q in source.questions())
    else:
        assert all(pair.caption for pair in source.pairs())
    if name == "goods.csv":
        assert source.columns == {"Sparte": "text", "Gewicht": "number"} and source.pair(0).id == "0042"
    if name == "captions.json":
        assert len(source) == 3 and source.pair(0).group == source.pair(1).group


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_shown_is_python(page):
    for what, text in blocks(page):
        if what == "python":
            compile(text, f"{page.name}", "exec")


def test_the_config_shown_prints_what_is_shown(capsys):
    page = blocks(ROOT / "docs/add-a-model.md")
    code = next(text for what, text in page if what == "python")
    exec(compile(code, "add-a-model.md", "exec"), {})
    assert capsys.readouterr().out == next(text for what, text in page if what == "text")


EXAMPLES = {"add-a-model": "gated_read", "add-an-objective": "margin", "add-a-dataset": "sqlite_source"}


@pytest.mark.parametrize("page, example", EXAMPLES.items())
def test_the_code_quoted_is_the_code_that_runs(page, example):
    source = (ROOT / f"docs/examples/{example}.py").read_text()
    quoted = [text for what, text in blocks(ROOT / f"docs/{page}.md") if what == "python"]
    text = next(t for t in quoted if re.match(r"class |def ", t))
    real = {line.strip() for line in source.splitlines()}
    assert all(line.strip() in real or line.strip() == "..." for line in text.splitlines())


def test_the_layer_kind(shapes, text_tower, tmp_path):
    example = load("gated_read")
    tokenizer = load_tokenizer(text_tower)
    config = example.config(len(tokenizer), size=48, patch=8, width=32)
    torch.manual_seed(0)
    shut = Layer.kinds["gated_read"](config.text.width, config.image.width).eval()
    words, cells = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    see = everyone(None, None)
    alone = shut(Streams(words, None), see).text
    assert torch.equal(shut(Streams(words, cells), see).text, alone)  # shut: as without a picture
    shut.gate.data.fill_(0.5)
    assert not torch.allclose(shut(Streams(words, cells), see).text, alone)
    assert Kind("gated_read") in config.segments["fuse"] and VLModel(config).fusion_depth == 2

    source, shape = open_source(shapes), {"size": 48, "patch": 8, "width": 32}
    folder = example.train(source, tokenizer, tmp_path / "run", steps=4, batch=16, **shape)
    run = Run.load(folder)
    assert run.model.schedule.fuse[0].gate.item() != 0  # it learnt
    vectors = run.encode_texts(["a red circle", "a blue bar"])
    assert (vectors == Run.load(folder).encode_texts(["a red circle", "a blue bar"])).all() and run.can_match


def test_the_objective(shapes, text_tower, tmp_path):
    from interlace.train import train
    from tests.conftest import toy_settings

    load("margin")
    margin = Objective.known["margin"](margin=0.2)

    class Given:  # vectors chosen by hand in place of a model's
        def __init__(self, text, image):
            self.vectors = {"caption": text, "image": image}

        def vector(self, name):
            return self.vectors[name]

    apart, batch = torch.eye(3), {"group": torch.tensor([1, 2, 3]), "caption_real": torch.ones(3, dtype=torch.bool)}
    assert margin.loss(None, batch, Given(apart, apart)).loss == 0
    turned = apart[[1, 0, 2]]
    assert margin.loss(None, batch, Given(turned, apart)).loss > 0
    one = {**batch, "group": torch.tensor([1, 1, 1])}
    assert margin.loss(None, one, Given(turned, apart)).loss == 0  # of one group: no negatives

    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=4, batch=16, evaluate=False)
    settings.objectives = {"margin": {"size": 32}, "itm": {}}
    run = Run.load(train(settings))
    build_index(run, open_source(shapes), split="test", progress=False)
    assert len(search(Index.open(tmp_path / "run/index", run), run, text="a red circle", k=3)) == 3


def test_the_gradient_of_the_objective_reaches_both_streams(shapes, text_tower):
    load("margin")
    example = load("gated_read")
    tokenizer = load_tokenizer(text_tower)
    margin = Objective.known["margin"]()
    learner = Learner(example.config(len(tokenizer), size=48, patch=8, width=32)).learn_by([(margin, 1.0)])
    processor = Processor(tokenizer, 48)
    samples = Samples(open_source(shapes), "train", processor, [margin], seed=0)
    batch = Collate(processor)([samples[(0, n)] for n in range(0, 96, 8)])
    margin.loss(learner, batch, Views(learner, batch)).loss.backward()
    for stream in (learner.text, learner.image):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stream.parameters())


def test_the_reader(shapes, tmp_path):
    example = load("sqlite_source")
    shutil.copytree(shapes / "pictures", tmp_path / "pictures")
    csv = open_source(shapes / "pairs.csv")
    file = tmp_path / "shop.sqlite"
    db = sqlite3.connect(file)
    db.execute("CREATE TABLE pairs (id TEXT, image TEXT, caption TEXT, colour TEXT, size_px REAL)")
    both = ("colour", "size_px")
    rows = [(p.id, f"pictures/{p.id}.png", p.caption, *map(p.attributes.get, both)) for p in csv.pairs()]
    db.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", rows)
    db.commit()
    db.close()
    source = open_source(file)
    assert [(p.id, p.caption) for p in source.pairs()] == [(p.id, p.caption) for p in csv.pairs()]
    assert source.columns == {"colour": "text", "size_px": "number"} and source.n_problems == 0
    assert build(example.read_sqlite(file, "shop")).fingerprint == source.fingerprint
    (tmp_path / "no.sqlite").write_text("not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(UserError, match="SQLite"):
        open_source(tmp_path / "no.sqlite")
