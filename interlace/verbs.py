"""What each verb of the command line does: thin over the same functions that Python users call. Heavy imports wait
inside them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from interlace.errors import UserError


def columns(given: list[str] | None) -> dict[str, str] | None:
    """`["caption=title"]` -> {"caption": "title"}."""
    out = {}
    for pair in given or []:
        ours, sign, theirs = pair.partition("=")
        if not sign:
            raise UserError(f"--column {pair!r}: write ours=theirs, for instance --column caption=title.")
        out[ours.strip()] = theirs.strip()
    return out or None


def open_table(args: argparse.Namespace, run: str | None = None, tell: bool = True) -> Any:
    """The source on the command line. What is not said of its columns and pictures is taken from the run's config.
    `tell`: say how many rows could not be used."""
    from interlace.data.sources import open_source

    named, pictures = columns(args.column), args.pictures
    data = run_data(run) if run is not None else {}
    reused = {} if named else data.get("columns") or {}
    said = [f"--column {ours}={theirs}" for ours, theirs in reused.items()]
    if pictures is None and data.get("pictures") and args.source in as_list(data.get("source")):
        pictures = data["pictures"]
        said.append(f"--pictures {pictures}")
    if said:
        print(f"as in {run}/config.yaml: {' '.join(said)}")
    try:
        source = open_source(args.source, columns=named or reused or None, pictures=pictures)
    except UserError as error:
        if reused and "no column" in str(error):
            raise UserError(f"{error} The names are the run's; say --column OURS=THEIRS for this source.") from None
        raise
    if tell and (lost := source.left_out()):
        print(lost)
    return source


def run_data(run: str) -> dict[str, Any]:
    """The part `data` of the config a run was trained with; empty for a run that was made without one."""
    from interlace.settings import read_yaml

    file = Path(run).expanduser() / "config.yaml"
    config = read_yaml(file) if file.is_file() else None
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else {}


def as_list(source: str | list[str] | None) -> list[str]:
    return source if isinstance(source, list) else [source] if source else []


def listed(given: str) -> list[str]:
    """`"late,mid"` -> ["late", "mid"]."""
    return [part.strip() for part in given.split(",")]


def seeds(given: str) -> list[int]:
    """`"0,1,2"` -> [0, 1, 2]. Raises UserError for anything but whole numbers."""
    parts = listed(given)
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds: expected whole numbers from 0 up, such as 0,1,2; got {given!r}.")
    return [int(part) for part in parts]


def check_file(flag: str, file: str | None) -> None:
    """That a result can be written there, said before the work that it is the result of. Raises UserError for a folder,
    and for a file in a folder that does not exist."""
    if not file:
        return
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"{flag} {file} is a folder: name a file, which may lie in it.")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {path.parent}. Make it first, or choose another.")


def open_query_picture(path: str | None) -> Any:
    """A picture the person at the keyboard names. Raises UserError when it cannot be read."""
    if path is None:
        return None
    from interlace.data.pictures import BadPicture, open_picture

    if not Path(path).expanduser().is_file():
        raise UserError(f"no picture at {path}.")
    try:
        return open_picture(Path(path).expanduser())
    except BadPicture as bad:
        raise UserError(f"{path} cannot be read as a picture: {bad.reason}.") from None


# --------------------------------------------------------------------------------------------------------------- verbs


def data_get(args: argparse.Namespace) -> int:
    from interlace.data.samples import get_sample

    for name in args.names:
        print(get_sample(name, packages=Path(args.packages) if args.packages else None))
    return 0


def data_show(args: argparse.Namespace) -> int:
    from interlace.data.show import show
    from interlace.towers import load_tokenizer

    processor = None
    if args.run:
        from interlace.data.processor import Processor

        processor = Processor.load(args.run)
    tokenizer = None if processor else load_tokenizer(args.text)
    show(open_table(args, args.run, tell=False), rows=args.rows, processor=processor, tokenizer=tokenizer)
    return 0


def data_check(args: argparse.Namespace) -> int:
    from interlace.data.check import check
    from interlace.towers import load_tokenizer

    check_file("--write-groups", args.write_groups)
    report = check(open_table(args, tell=False), max_length=args.max_length,
                   tokenizer=load_tokenizer(args.text),
                   write_groups=Path(args.write_groups).expanduser() if args.write_groups else None)  # fmt: skip
    return report.exit_status


def data_scenes(args: argparse.Namespace) -> int:
    from interlace.data.scenes import make_scenes, parse_cells, parse_per_split

    cells = parse_cells(args.cells)
    made = make_scenes(open_table(args), args.out, cells, args.size, parse_per_split(args.per_split), args.seed,
                       args.names, args.least)  # fmt: skip
    print("\n".join([*made.lines(), str(made.folder)]))
    return 0


def data_corrupt(args: argparse.Namespace) -> int:
    from interlace.bootstrap import corrupt

    made = corrupt(open_table(args), args.out, args.share, args.seed, args.split)
    print("\n".join([*made.lines(), str(made.folder)]))
    return 0


def train_run(args: argparse.Namespace) -> int:
    from interlace.settings import load_settings

    overrides = list(args.overrides)
    config = args.config
    if config is not None and "=" in config and not Path(config).exists():  # no config, only overrides
        overrides, config = [config, *overrides], None
    settings = load_settings(config, overrides)
    if not settings.data.source:
        raise UserError("no data: set data.source to a sample set's name or a path, for instance "
                        "data.source=furniture.")  # fmt: skip
    from interlace.train import train

    out = train(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        if (out / "metrics.json").is_file():
            from interlace.evaluate import print_metrics

            print_metrics(json.loads((out / "metrics.json").read_text()))
        print(f"run folder: {out}")
    return 0


def examine_config(args: argparse.Namespace) -> int:
    from interlace.doctor import doctor
    from interlace.settings import load_settings

    overrides, config = list(args.overrides), args.config
    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = [config, *overrides], None
    settings = load_settings(config, overrides)
    if not settings.data.source:
        raise UserError("no data: set data.source to a sample set's name or a path.")
    return doctor(settings, args.seconds)


def evaluate_run(args: argparse.Namespace) -> int:
    from interlace.evaluate import evaluate, print_metrics
    from interlace.run import Run, write_json

    check_file("--out", args.out)
    run = Run.load(args.run)
    if args.regions:
        from interlace.regions.open import open_regions

        run.use_regions(open_regions(args.regions))
    metrics = evaluate(run, open_table(args, args.run), args.split, args.limit)
    print_metrics(metrics)
    if args.out:
        write_json(Path(args.out).expanduser(), metrics)
    return 0


def binding_run(args: argparse.Namespace) -> int:
    from interlace.run import Run, write_json
    from interlace.tasks.binding import binding, print_binding

    check_file("--out", args.out)
    result = binding(Run.load(args.run), open_table(args, args.run), args.split, args.limit)
    print_binding(result)
    if args.out:
        write_json(Path(args.out).expanduser(), result)
    return 0


def compare_runs(args: argparse.Namespace) -> int:
    from interlace.compare import compare

    compare(args.config, args.overrides, fusions=listed(args.fusion), streams=listed(args.streams),
            seeds=seeds(args.seeds), out=Path(args.out))  # fmt: skip
    return 0


def bootstrap_captions(args: argparse.Namespace) -> int:
    from interlace.bootstrap import Decision, Finetune, bootstrap
    from interlace.data.sources import open_source

    finetune = None
    if args.finetune:
        finetune = Finetune(args.steps, args.finetune_batch, args.lr, args.set)
    source, data = open_table(args, args.run), run_data(args.run)
    named = {"source": args.source, "columns": columns(args.column) or data.get("columns") or {},
             "pictures": args.pictures or data.get("pictures") or "", "regions": data.get("regions") or ""}  # fmt: skip
    clean = None
    if args.clean:
        clean, named = open_source(args.clean), {"source": args.clean}
    decision = Decision(args.by, args.threshold, args.labels, args.precision, args.both, args.sheet)
    bootstrap(args.run, source, args.out, captioner=args.captioner, filter=args.filter, finetune=finetune, clean=clean,
              named=named, decision=decision, top_p=args.top_p, max_length=args.max_length, seed=args.seed,
              batch=args.batch, write=args.write, folds=args.folds)  # fmt: skip
    return 0


def index_source(args: argparse.Namespace) -> int:
    from interlace.run import Run
    from interlace.search import build_index

    run = Run.load(args.run)
    where = Path(args.index) if args.index else None
    build_index(run, open_table(args, args.run), where=where, rebuild=args.rebuild)
    return 0


def search_index(args: argparse.Namespace) -> int:
    from interlace.run import Run
    from interlace.search import Index, print_hits, search, to_dicts

    picture = open_query_picture(args.image)
    run = Run.load(args.run)
    index = Index.open(Path(args.index) if args.index else run.folder / "index", run)
    result = search(index, run, text=args.text, picture=picture, where=args.where, k=args.k, weight=args.weight,
                    mode=args.mode, rerank=args.rerank)  # fmt: skip
    print(json.dumps(to_dicts(result), ensure_ascii=False, indent=2)) if args.json else print_hits(result)
    return 0


def answer_question(args: argparse.Namespace) -> int:
    from interlace.run import Run

    picture = open_query_picture(args.image)
    allowed = [a.strip() for a in args.allowed.split(",")] if args.allowed else None
    run = Run.load(args.run)
    if run.can_write_answers and not run.can_answer and allowed is None:  # in its own words, which have no list
        written = run.write_answer(picture, args.question)
        print(json.dumps([{"answer": written}], ensure_ascii=False) if args.json else written)
        return 0
    answers = run.answer(picture, args.question, allowed)[: args.k]
    if args.json:
        print(json.dumps([{"answer": a, "probability": p} for a, p in answers], ensure_ascii=False, indent=2))
    else:
        for answer, probability in answers:
            print(f"{probability:6.1%}  {'#' * round(30 * probability):30s}  {answer}")
    return 0


def write_captions(args: argparse.Namespace) -> int:
    from interlace.captioner import is_captioner, load_captioner
    from interlace.run import Run

    pictures = [open_query_picture(path) for path in args.images]
    writer = load_captioner(args.run) if is_captioner(args.run) else Run.load(args.run)
    captions = writer.caption(pictures, prompt=args.prompt, beams=args.beams, max_length=args.max_length,
                              sample=args.sample, top_p=args.top_p, seed=args.seed)  # fmt: skip
    if args.json:
        print(json.dumps([{"image": i, "caption": c} for i, c in zip(args.images, captions)], ensure_ascii=False,
                         indent=2))  # fmt: skip
    else:
        for image, text in zip(args.images, captions):
            print(text if len(captions) == 1 else f"{image}\t{text}")
    return 0


def demo(args: argparse.Namespace) -> int:
    from interlace.demo.app import check_address, serve
    from interlace.run import Run
    from interlace.search import Index

    check_address(args.host, args.port, args.token)  # before the seconds that loading takes
    run = Run.load(args.run)
    index = Index.open(Path(args.index) if args.index else run.folder / "index", run)
    serve(run, index, host=args.host, port=args.port, token=args.token, open_browser=not args.no_browser)
    return 0


def list_presets(args: argparse.Namespace) -> int:
    from interlace.presets import print_table

    print_table()
    return 0


def draw_figure(args: argparse.Namespace) -> int:
    from interlace.draw import draw

    draw(args.what, args.out, words=args.words, cells=args.cells)
    if args.out:
        print(f"figure: {args.out}")
    return 0


def extract_regions(args: argparse.Namespace) -> int:
    from interlace.regions.extract import Extractor, extract

    extractor: Extractor
    if args.detector:
        if args.tower or args.fit:
            raise UserError("--tower and --fit are for grid cells, --detector for a detector's boxes: give one.")
        from interlace.regions.detector import DetectorExtractor

        extractor = DetectorExtractor(args.detector, 36 if args.regions is None else args.regions, args.size)
    else:
        if args.regions is not None:
            raise UserError("--regions is for a detector. A tower has as many cells as --size gives it: 224 pixels are "
                            "49 of efficientnet-lite0, 192 are 36.")  # fmt: skip
        from interlace.regions.grid import GridExtractor

        extractor = GridExtractor(args.tower or "efficientnet-lite0", args.size, args.fit or "pad")
    extract(open_table(args), extractor, args.out, batch=args.batch, split=args.split)
    return 0


def convert_release(args: argparse.Namespace) -> int:
    from interlace.convert import convert

    convert(args.source, args.out, args.preset, tokenizer=args.tokenizer, answers=args.answers)
    print(f"written: {args.out}")
    return 0
