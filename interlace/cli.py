"""The command line: thin over the same functions that Python users call. Heavy imports wait inside the verbs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interlace import __version__
from interlace.errors import Stopped, UserError, suggest

SOURCE_HELP = ("a sample set (furniture, food, interiors), a folder of pictures, a CSV/TSV/JSON/JSONL/Parquet file, an "
               "HF dataset on disk, WebDataset shards; several joined by commas")  # fmt: skip


def columns(given: list[str] | None) -> dict[str, str] | None:
    """`["caption=title"]` -> {"caption": "title"}."""
    out = {}
    for pair in given or []:
        ours, sign, theirs = pair.partition("=")
        if not sign:
            raise UserError(f"--column {pair!r}: write ours=theirs, for instance --column caption=title.")
        out[ours.strip()] = theirs.strip()
    return out or None


def open_table(args: argparse.Namespace, run: str | None = None) -> Any:
    """The source on the command line. What is not said of its columns and pictures is taken from the run's config."""
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
        return open_source(args.source, columns=named or reused or None, pictures=pictures)
    except UserError as error:
        if reused and "no column" in str(error):
            raise UserError(f"{error} The names are the run's; say --column OURS=THEIRS for this source.") from None
        raise


def run_data(run: str) -> dict[str, Any]:
    """The part `data` of the config a run was trained with; empty for a run that was made without one."""
    import yaml

    file = Path(run).expanduser() / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.is_file() else None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else {}


def as_list(source: str | list[str] | None) -> list[str]:
    return source if isinstance(source, list) else [source] if source else []


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
    show(open_table(args, args.run), rows=args.rows, processor=processor, tokenizer=tokenizer)
    return 0


def data_check(args: argparse.Namespace) -> int:
    from interlace.data.check import check
    from interlace.towers import load_tokenizer

    report = check(open_table(args), max_length=args.max_length,
                   tokenizer=load_tokenizer(args.text),
                   write_groups=Path(args.write_groups) if args.write_groups else None)  # fmt: skip
    return report.exit_status


def data_scenes(args: argparse.Namespace) -> int:
    from interlace.data.scenes import make_scenes, parse_per_split

    cells = [int(n) if n.isdigit() else 0 for n in args.cells.split(",")]
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

    metrics = evaluate(Run.load(args.run), open_table(args, args.run), args.split, args.limit)
    print_metrics(metrics)
    if args.out:
        write_json(Path(args.out), metrics)
    return 0


def binding_run(args: argparse.Namespace) -> int:
    from interlace.run import Run, write_json
    from interlace.tasks.binding import binding, print_binding

    result = binding(Run.load(args.run), open_table(args, args.run), args.split, args.limit)
    print_binding(result)
    if args.out:
        write_json(Path(args.out), result)
    return 0


def compare_runs(args: argparse.Namespace) -> int:
    from interlace.compare import compare

    compare(args.config, args.overrides, fusions=args.fusion.split(","), streams=args.streams.split(","),
            seeds=[int(s) for s in args.seeds.split(",")], out=Path(args.out))  # fmt: skip
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
    from interlace.run import Run

    pictures = [open_query_picture(path) for path in args.images]
    captions = Run.load(args.run).caption(pictures, prompt=args.prompt, beams=args.beams, max_length=args.max_length,
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


# -------------------------------------------------------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    """Suggests the nearest verb or flag instead of listing all of them."""

    def error(self, message: str) -> Any:
        if "invalid choice" in message:
            given = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            verbs = [v for a in self._actions if isinstance(a, argparse._SubParsersAction) for v in a.choices]
            message += suggest(given, verbs)
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="interlace", description="From a table of pictures and texts to a search box.")
    parser.add_argument("--version", action="version", version=f"interlace {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str,
             to: Any = verbs) -> argparse.ArgumentParser:  # fmt: skip
        sub = to.add_parser(name, help=help, description=help)
        sub.set_defaults(run_verb=run)
        return sub

    def source(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("source", help=SOURCE_HELP)
        sub.add_argument("--column", action="append", metavar="OURS=THEIRS",
                         help="name a column, for instance caption=title; repeat for more")  # fmt: skip
        sub.add_argument("--pictures", metavar="FOLDER",
                         help="where relative picture paths start from, if not beside the table")  # fmt: skip

    data = verbs.add_parser("data", help="get, show and check pictures and texts")
    parts = data.add_subparsers(dest="part", required=True, metavar="get|show|check|scenes|corrupt")
    sub = verb("get", data_get, "bring sample sets to this machine", parts)
    sub.add_argument("names", nargs="+", metavar="NAME", help="furniture, food, interiors")
    sub.add_argument("--packages", metavar="FOLDER",
                     help="packages downloaded elsewhere, for a machine without network")  # fmt: skip
    sub = verb("show", data_show, "print rows, batch shapes and the words the model sees", parts)
    source(sub)
    sub.add_argument("--rows", type=int, default=3)
    sub.add_argument("--run", help="show what this run's processor makes of the rows")
    sub.add_argument("--text", default="minilm", help="text tower whose tokenizer to use without --run")
    sub = verb("check", data_check, "find unreadable files, leaks, duplicates, cut captions; exits 1 on errors", parts)
    source(sub)
    sub.add_argument("--max-length", type=int, default=40, help="tokens a caption may have before it is cut")
    sub.add_argument("--text", default="minilm", help="text tower whose tokenizer counts")
    sub.add_argument("--write-groups", metavar="FILE", help="write the rows with the groups their pictures suggest")

    sub = verb("scenes", data_scenes, "compose scenes that teach what stands where: twins with two pictures exchanged, "
               "captions true and swapped, questions", parts)  # fmt: skip
    source(sub)
    sub.add_argument("out", help="the folder to write; train, check and open it like any source")
    sub.add_argument("--cells", default="2", help="pictures in a scene, 2 to 4; several in turn: 2,3,4")
    sub.add_argument("--size", type=int, default=256, help="side of a scene in pixels")
    sub.add_argument("--per-split", default="4", metavar="N",
                     help="scenes for each picture of a split, or numbers: train=2000,val=200,test=400")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--names", default="name", metavar="COLUMN",
                     help="column with the things' names (default: the noun of the source's name column)")  # fmt: skip
    sub.add_argument("--least", type=int, default=2,
                     help="a held-out picture is used if this many training pictures have its name")  # fmt: skip

    sub = verb("corrupt", data_corrupt, "exchange a known share of the captions, to measure what finds the wrong ones",
               parts)  # fmt: skip
    source(sub)
    sub.add_argument("out", help="the folder to write; the truth is in its columns caption_true and corrupted")
    sub.add_argument("--share", type=float, default=0.3, help="of the captions that go to pictures of other groups")
    sub.add_argument("--split", default="train", choices=["train", "val", "test"], help="whose captions")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("train", train_run, "train, or resume, a run")
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")

    sub = verb("doctor", examine_config, "before a run: can it work? texts, batches, gradients, eight rows by heart, "
               "time and memory")  # fmt: skip
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped recipe, as for train")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--seconds", type=float, default=120, help="at most so long on learning by heart")

    sub = verb("evaluate", evaluate_run, "score a run on held-out rows, beside chance and blind")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--split", default="test", choices=["train", "val", "test"])
    sub.add_argument("--limit", type=int, default=10_000, help="rows at the most, sampled with a fixed seed")
    sub.add_argument("--out", help="write the numbers as JSON")

    sub = verb("binding", binding_run, "does a run know what stands where: scenes, their captions true and swapped")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--split", default="test", choices=["train", "val", "test"])
    sub.add_argument("--limit", type=int, default=10_000, help="scenes at the most, sampled with a fixed seed")
    sub.add_argument("--out", help="write the numbers as JSON")

    sub = verb("compare", compare_runs, "late, mid and early fusion at the same budget, one table")
    sub.add_argument("config", help="a YAML file or a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--fusion", default="late,mid,early")
    sub.add_argument("--streams", default="dual")
    sub.add_argument("--seeds", default="0,1,2")
    sub.add_argument("--out", default="runs/compare")

    sub = verb("bootstrap", bootstrap_captions, "clean a table's captions by what learnt from them: write one for each "
               "picture, judge old and new, keep, replace or leave out (CapFilt)")  # fmt: skip
    sub.add_argument("run", help="a pre-trained run with contrast, match and a decoder (blip-small)")
    source(sub)
    sub.add_argument("--out", required=True, metavar="NEW", help="folder of the new table; a killed command goes on")
    sub.add_argument("--captioner", default="", metavar="RUN", help="another run to write the texts")
    sub.add_argument("--filter", default="", metavar="RUN", help="another run to judge them: any with a match head")
    sub.add_argument("--write", action=argparse.BooleanOptionalAction, default=True,
                     help="write texts; without it those that are there are kept or left out")  # fmt: skip
    sub.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True,
                     help="train both on from their runs first")  # fmt: skip
    sub.add_argument("--clean", metavar="SOURCE", help="what to fine-tune on (default: the source itself)")
    sub.add_argument("--folds", type=int, default=0, metavar="K",
                     help="K filters, each judges only rows that it did not learn from: for tables so small that a "
                     "filter knows them by heart")  # fmt: skip
    sub.add_argument("--steps", type=int, default=200, help="of each fine-tuning")
    sub.add_argument("--finetune-batch", type=int, default=32)
    sub.add_argument("--lr", type=float, default=1e-4)
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further keys of both trainings")
    sub.add_argument("--top-p", type=float, default=0.9, help="share of the probability that words are drawn from")
    sub.add_argument("--max-length", type=int, default=0, help="tokens of a text (default: as many as in training)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--batch", type=int, default=32, help="pictures judged at once")
    sub.add_argument("--by", default="match", choices=["match", "cosine"], help="the score that decides")
    sub.add_argument("--threshold", type=float, help="a text passes from here on (default: fitted)")
    sub.add_argument("--labels", default="", metavar="COLUMN[=VALUE]",
                     help="fit the threshold on rows whose column says that the caption is right")  # fmt: skip
    sub.add_argument("--precision", type=float, default=0.0,
                     help="fit the lowest threshold of that precision (default: the most texts judged right)")
    sub.add_argument("--both", action="store_true",
                     help="where both texts pass, add the synthetic one as a row of its own")  # fmt: skip
    sub.add_argument("--sheet", type=int, default=300, help="rows on the page to review")

    sub = verb("index", index_source, "embed a source so that it can be searched; only what changed the next time")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--rebuild", action="store_true", help="start over, for instance after training the run again")

    sub = verb("search", search_index, "search an index by words, by a picture, or both")
    sub.add_argument("run")
    sub.add_argument("text", nargs="?", help="words")
    sub.add_argument("--image", help="a picture to search by")
    sub.add_argument("--where", help='a filter: "category = Kitchen and width_cm < 80"')
    sub.add_argument("-k", type=int, default=20)
    sub.add_argument("--weight", type=float, default=0.5, help="share of the picture when words and picture are given")
    sub.add_argument("--mode", default="vector", choices=["vector", "text", "hybrid"])
    sub.add_argument("--rerank", action=argparse.BooleanOptionalAction, default=None,
                     help="second stage by the fusion layers (default: where the run has them)")  # fmt: skip
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--json", action="store_true")

    sub = verb("answer", answer_question, "ask a question about a picture")
    sub.add_argument("run")
    sub.add_argument("image")
    sub.add_argument("question")
    sub.add_argument("--allowed", help='only these answers: "Kitchen,Bathroom"')
    sub.add_argument("-k", type=int, default=5)
    sub.add_argument("--json", action="store_true")

    sub = verb("caption", write_captions, "write about pictures, by a run that learnt to (lm, prefix_lm)")
    sub.add_argument("run")
    sub.add_argument("images", nargs="+", metavar="PICTURE")
    sub.add_argument("--prompt", default="", help='words each caption begins with: "a photo of"')
    sub.add_argument("--beams", type=int, default=3)
    sub.add_argument("--sample", action="store_true", help="draw the words instead of searching for the likeliest")
    sub.add_argument("--top-p", type=float, default=0.9, help="share of the probability that is drawn from")
    sub.add_argument("--seed", type=int, default=0, help="of the draw")
    sub.add_argument("--max-length", type=int, default=0, help="tokens (default: as many as in training)")
    sub.add_argument("--json", action="store_true")

    sub = verb("demo", demo, "open the search page in the browser")
    sub.add_argument("run")
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=int, default=7860)
    sub.add_argument("--token", help="ask visitors for this token; needed on any host but localhost")
    sub.add_argument("--no-browser", action="store_true")

    verb("list", list_presets, "the published systems that ship as presets")

    sub = verb("draw", draw_figure, "a model's figure: who reads whom, where the streams meet, what each part costs")
    sub.add_argument("what", help="a preset (interlace list), a run folder, or a recipe")
    sub.add_argument("--out", metavar="FILE.svg", help="write the figure as SVG, too")
    sub.add_argument("--words", type=int, default=16, help="length of the text whose FLOPs are counted")
    sub.add_argument("--cells", type=int, default=0, help="length of the image stream (default: the model's own)")

    sub = verb("extract", extract_regions, "features and boxes of a source's pictures, for models that read regions")
    source(sub)
    sub.add_argument("out", help="folder of the store; what it has already is not extracted again")
    sub.add_argument("--tower", help="an image tower whose grid cells are the regions (default: efficientnet-lite0)")
    sub.add_argument("--detector", metavar="FOLDER", help="or an object detector of transformers, its weights there")
    sub.add_argument("--regions", type=int, help="boxes per picture, with --detector (default: 36)")
    sub.add_argument("--size", type=int, help="side of the pictures in pixels (default: the tower's or detector's own)")
    sub.add_argument("--fit", choices=["pad", "squash", "crop"], help="how a picture becomes square (default: pad)")
    sub.add_argument("--batch", type=int, default=32)
    sub.add_argument("--split", choices=["train", "val", "test"], help="only this one")

    sub = verb("convert", convert_release, "bring a published model's weights over, as a run that other commands take")
    sub.add_argument("source", help="a local .bin, .pth, .pt or .safetensors file, or a folder of transformers")
    sub.add_argument("out", help="the folder to write")
    sub.add_argument("--preset", required=True, metavar="NAME", help="whose weights they are (interlace list)")
    sub.add_argument("--tokenizer", default="", metavar="NAME",
                     help="folder or name of its tokenizer (default: what lies beside the weights)")  # fmt: skip
    sub.add_argument("--answers", default="", metavar="FILE.json", help="the answer list of its answer head")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run_verb(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:  # `interlace search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
