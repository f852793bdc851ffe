"""`open_source`: from what a user names to a `Source`."""

from __future__ import annotations

from pathlib import Path

from interlace.data.cache import cache_folder
from interlace.data.rows import SPLITS, Source
from interlace.data.sources.build import SPLIT_WORDS, Raw, build
from interlace.data.sources.join import join
from interlace.data.sources.questions import read_questions
from interlace.data.sources.tables import read_csv
from interlace.errors import UserError, suggest

TABLES = {".csv": read_csv, ".tsv": read_csv, ".txt": read_csv}


def open_source(
    source: str | Path | list,
    columns: dict[str, str] | None = None,
    split: str | None = None,
    pictures: str | Path | None = None,
) -> Source:
    """A sample set's name, a path of any supported form, or several of them joined.

    `columns` says which column plays which role (`{"image": "filepath", "caption": "title"}`), where the usual names do
    not fit; what has no role becomes an attribute. `split` puts every row into that split; without it the data's own
    split column or file names count, and data without any is divided 80/10/10 by a hash of each row's group. `pictures`
    is the folder that relative picture paths start from, when it is not the table's own.

    Raises UserError for an unknown form, a missing path or column, an empty table, or no picture at all. Rows that
    cannot be used are skipped and listed in `source.problems`.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"No split {split!r}; the splits are {', '.join(SPLITS)}.{suggest(split, SPLITS)}")
    parts = source if isinstance(source, (list, tuple)) else _names(source)
    if not parts:
        raise UserError("No source given: expected a sample's name or a path to pictures and texts.")
    folder = Path(pictures).expanduser() if pictures is not None else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"pictures={str(pictures)!r} is not a folder.")
    opened = [build(raw, columns, split, folder) for part in parts for raw in find(part)]
    return opened[0] if len(opened) == 1 else join(opened)


def _names(source: str | Path) -> list[str | Path]:
    """ "furniture,food" and "furniture+food" are two samples, unless a file really has that name."""
    if isinstance(source, Path) or Path(source).expanduser().exists() or "{" in source:
        return [source]
    parts = [part.strip() for part in source.replace("+", ",").split(",") if part.strip()]
    return list(parts) if len(parts) > 1 else [source]


def find(source: str | Path) -> list[Raw]:
    """The raw tables behind one name or path: usually one, several when splits lie in files of their own."""
    from interlace.data.samples import SAMPLES, sample_folder

    path = Path(source).expanduser()
    if str(source) in SAMPLES and not path.exists():
        path = sample_folder(str(source))
        if not (path / "pairs.csv").exists():
            raise UserError(
                f"The sample set {str(source)!r} is not here yet. Get it with `interlace data get {source}`."
            )
    if not path.exists():
        near = suggest(str(source), SAMPLES) or _near_path(path)
        raise UserError(
            f"No such file or folder: {str(source)!r}, and no sample set of that name "
            f"(there are {', '.join(SAMPLES)}).{near}"
        )
    if path.is_file():
        return [read_file(path)]
    return read_folder(path)


def _near_path(path: Path) -> str:
    return suggest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


def name_of(path: Path) -> str:
    return path.stem if path.is_file() else path.name


def read_file(path: Path) -> Raw:
    reader = TABLES.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'} as a table of pictures and texts."
        )
    return _with_company(reader(path, path.stem), path.parent)


def read_folder(path: Path) -> list[Raw]:
    for name in ("pairs.csv", "pairs.tsv"):
        if (path / name).exists():
            return [_with_company(read_csv(path / name, path.name), path)]
    raise UserError(f"{path}: found no table of pictures and texts in this folder.")


def _with_company(raw: Raw, folder: Path) -> Raw:
    """Adds what lies beside the table: questions and a licence."""
    if (folder / "questions.jsonl").exists():
        raw.questions = read_questions(folder / "questions.jsonl", raw.problems)
    for name in ("LICENCE.txt", "LICENSE.txt", "LICENSE", "LICENCE"):
        if (folder / name).is_file():
            raw.licence = (folder / name).read_text(encoding="utf-8", errors="replace")
            break
    return raw


def split_in_name(stem: str) -> str | None:
    """ "train" for train.csv and train-00000-of-00002; None for other names."""
    word = stem.lower().replace("_", "-").split("-")[0]
    return SPLITS[SPLIT_WORDS[word]] if word in SPLIT_WORDS else None


__all__ = ["cache_folder", "open_source"]
