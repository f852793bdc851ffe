"""`open_source`: from what a user names to a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from interlace.data.pictures import SUFFIXES
from interlace.data.rows import SPLITS, Source
from interlace.data.sources.arrow_files import read_parquet, read_saved
from interlace.data.sources.build import Raw, build
from interlace.data.sources.chain import chain, keep_only_telling_splits, split_in_name
from interlace.data.sources.folder import read_pictures
from interlace.data.sources.imagefolder import metadata_files, read_imagefolder
from interlace.data.sources.join import join
from interlace.data.sources.json_files import read_json, read_jsonl
from interlace.data.sources.questions import read_questions
from interlace.data.sources.tables import read_csv
from interlace.data.sources.vqa import as_questions, is_question_table, read_vqa2
from interlace.data.sources.webdataset import braces, read_shards
from interlace.errors import UserError, shown, suggest

TABLES: dict[str, Callable[[Path, str], Raw]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}
COMPANY = {
    "questions.jsonl",
    "dataset_infos.json",
    "dataset_info.json",
    "state.json",
}  # files beside a table, not tables


def open_source(
    source: str | Path | list,
    columns: dict[str, str] | None = None,
    split: str | None = None,
    pictures: str | Path | None = None,
) -> Source:
    """A sample set's name, a path of any supported form, or several of them joined.

    Forms: a folder of pictures with texts beside them; CSV, TSV, JSON, JSONL and Parquet tables; a Hugging Face image
    folder, or data set saved to disk; WebDataset shards (`shards/{0000..0099}.tar`, a folder of them, one .tar); VQAv2
    question files with their annotations; tables of questions (image, question, answer). A folder may hold one table,
    or one per split (train.csv, val.csv).

    `columns` says which column plays which role (`{"image": "filepath", "caption": "title"}`) where the usual names do
    not fit; columns without a role become attributes. `split` puts every row into that split; without it the data's own
    split column counts, then file names when they name two splits or more (train.csv, val.csv); other rows are divided
    80/10/10 by a hash of their group. `pictures` is the folder that relative picture paths start from, when it is not
    the table's own.

    Raises UserError for an unknown form, a missing path or column, an empty table, or no picture at all, and for an
    argument of another type. Rows that cannot be used are skipped and listed in `source.problems`.
    """
    for part in source if isinstance(source, list | tuple) else [source]:
        if not isinstance(part, str | Path):
            raise UserError(
                f"Expected a sample's name, a path to pictures and texts, or a list of these; got {shown(part)}."
            )
    if columns is not None and not isinstance(columns, Mapping):
        raise UserError(
            f"Expected columns as a mapping of roles to names, such as {{'caption': 'title'}}; got {shown(columns)}."
        )
    if split is not None and split not in SPLITS:
        raise UserError(f"No split {split!r}; the splits are {', '.join(SPLITS)}.{suggest(split, SPLITS)}")
    parts = source if isinstance(source, (list, tuple)) else _names(source) if str(source) else []
    if not parts:
        raise UserError("No data given: expected a sample's name or a path to pictures and texts (data.source=... in a "
                        "config).")
    folder = Path(pictures).expanduser().absolute() if pictures is not None else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"pictures={str(pictures)!r} is not a folder.")
    raws = [find(part, columns, folder) for part in parts]
    keep_only_telling_splits(raws)
    opened = [build(raw, columns, split, folder) for raw in raws]
    return opened[0] if len(opened) == 1 else join(opened)


def _names(source: str | Path) -> list[str | Path]:
    """ "furniture,food" and "furniture+food" are two samples, unless a file really has that name."""
    if isinstance(source, Path) or Path(source).expanduser().exists() or "{" in source:
        return [source]
    parts = [part.strip() for part in source.replace("+", ",").split(",") if part.strip()]
    return list(parts) if len(parts) > 1 else [source]


def find(source: str | Path, wanted: dict[str, str] | None = None, pictures: Path | None = None) -> Raw:
    """The raw table behind one name or path."""
    from interlace.data.samples import SAMPLES, sample_folder

    path = Path(source).expanduser()
    if str(source) in SAMPLES and not path.exists():
        path = sample_folder(str(source))
        if not (path / "pairs.csv").exists():
            raise UserError(
                f"The sample set {str(source)!r} is not here yet. Get it with `interlace data get {source}`."
            )
    if not path.exists() and "{" in str(source):
        shards = [Path(name) for name in braces(str(path))]
        return _asked(read_shards(shards, path.parent.name or "shards", str(source)), wanted)
    if not path.exists():
        near = suggest(str(source), SAMPLES) or _near_path(path)
        raise UserError(
            f"No such file or folder: {str(source)!r}, and no sample set of that name "
            f"(there are {', '.join(SAMPLES)}).{near}"
        )
    path = path.absolute()
    if path.is_file():
        return read_file(path, wanted, pictures, path.stem)
    return read_folder(path, wanted, pictures)


def _near_path(path: Path) -> str:
    return suggest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


def read_file(path: Path, wanted: dict[str, str] | None, pictures: Path | None, name: str) -> Raw:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _asked(read_shards([path], name, str(path)), wanted)
    if suffix == ".json" and _is_vqa2(path):
        return read_vqa2(path, name, pictures)
    if suffix not in TABLES:
        near = suggest(suffix, TABLES)
        kind = "one picture" if suffix in SUFFIXES else f"{suffix or 'a file without a suffix'}"
        raise UserError(f"{path}: expected {', '.join(TABLES)}, .tar or a folder; this is {kind}.{near}")
    raw = TABLES[suffix](path, name)
    raw.split = split_in_name(path.stem)
    return _with_company(_asked(raw, wanted), path.parent)


def _is_vqa2(path: Path) -> bool:
    with open(path, "rb") as file:
        return "questions" in path.stem.lower() and b'"questions"' in file.read(4096)


def _asked(raw: Raw, wanted: dict[str, str] | None) -> Raw:
    return as_questions(raw, wanted) if is_question_table(raw, wanted) else raw


def read_folder(path: Path, wanted: dict[str, str] | None, pictures: Path | None) -> Raw:
    """Looks for the most specific form first; a folder with pictures and no table is a folder of pictures."""
    for suffix in TABLES:
        if (path / f"pairs{suffix}").is_file():
            raw = TABLES[suffix](path / f"pairs{suffix}", path.name)
            return _with_company(_asked(raw, wanted), path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _with_company(_asked(read_saved(path, path.name, wanted), wanted), path)
    names = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    questions = [file for file in names if file.suffix.lower() == ".json" and _is_vqa2(file)]
    if questions:
        return _one_vqa2(questions, path, pictures)
    if metadata := metadata_files(path):
        return _with_company(_asked(read_imagefolder(metadata, path, wanted), wanted), path)
    if shards := [file for file in names if file.suffix.lower() == ".tar"]:
        return _asked(read_shards(shards, path.name, str(path)), wanted)
    tables = _tables(names) or sorted(path.glob("data/*.parquet")) or sorted(path.glob("*/*.parquet"))
    if tables:
        return _with_company(_read_tables(tables, path, wanted), path)
    return _with_company(read_pictures(path, path.name), path)


def _tables(names: list[Path]) -> list[Path]:
    """The tables of a folder; a .json (or .csv) named like a picture belongs to that picture."""
    pictures = {file.stem for file in names if file.suffix.lower() in SUFFIXES}
    return [
        file
        for file in names
        if file.suffix.lower() in TABLES and file.name not in COMPANY and file.stem not in pictures
    ]


def _read_tables(tables: list[Path], folder: Path, wanted: dict[str, str] | None) -> Raw:
    shards = {file.suffix for file in tables} == {".parquet"}
    if len(tables) > 1 and not shards and any(split_in_name(file.stem) is None for file in tables):
        listed = ", ".join(file.name for file in tables[:8])
        raise UserError(
            f"{folder} holds {len(tables)} tables: {listed}. Name the one you mean, or name them by split "
            "(train.csv, val.csv)."
        )
    raws = []
    for file in tables:
        raw = TABLES[file.suffix.lower()](file, file.stem)
        raw.split = split_in_name(file.stem)
        raws.append(raw)
    return _asked(chain(raws, folder.name, folder, wanted), wanted)


def _one_vqa2(questions: list[Path], folder: Path, pictures: Path | None) -> Raw:
    if len(questions) > 1:
        listed = ", ".join(file.name for file in questions)
        raise UserError(
            f"{folder} holds several question files: {listed}. Open them as a list, [train questions, val questions]: "
            "each has pictures of its own."
        )
    return read_vqa2(questions[0], folder.name, pictures)


def _with_company(raw: Raw, folder: Path) -> Raw:
    """Adds what lies beside the table: questions and a licence."""
    if (folder / "questions.jsonl").is_file() and raw.questions is None:
        raw.questions = lambda: read_questions(folder / "questions.jsonl", raw.problems)
    for name in ("LICENCE.txt", "LICENSE.txt", "LICENSE", "LICENCE"):
        if (folder / name).is_file():
            raw.licence = (folder / name).read_text(encoding="utf-8", errors="replace")
            break
    return raw
