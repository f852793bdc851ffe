"""The command line: its words and flags; what they do is in verbs.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from interlace import __version__
from interlace import verbs as do
from interlace.errors import Stopped, UserError, suggest

SOURCE_HELP = ("a sample set (furniture, food, interiors), a folder of pictures, a CSV/TSV/JSON/JSONL/Parquet file, an "
               "HF dataset on disk, WebDataset shards; several joined by commas")  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Suggests the nearest verb or flag instead of listing all of them."""

    def error(self, message: str) -> Any:
        if "invalid choice" in message:
            given = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            verbs = [v for a in self._actions if isinstance(a, argparse._SubParsersAction) for v in a.choices]
            message += suggest(given, verbs)
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number from `least` up."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
        return value

    return number


def seconds(text: str) -> float:
    """For argparse: a number from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # as NaN is not
        raise argparse.ArgumentTypeError(f"expected a number of seconds from 0 up, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="interlace", description="From a table of pictures and texts to a search box.")
    parser.add_argument("--version", action="version", version=f"interlace {__version__}")
    actions = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str,
             to: Any = actions) -> argparse.ArgumentParser:  # fmt: skip
        sub = to.add_parser(name, help=help, description=help)
        sub.set_defaults(run_verb=run)
        return sub

    def source(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("source", help=SOURCE_HELP)
        sub.add_argument("--column", action="append", metavar="OURS=THEIRS",
                         help="name a column, for instance caption=title; repeat for more")  # fmt: skip
        sub.add_argument("--pictures", metavar="FOLDER",
                         help="where relative picture paths start from, if not beside the table")  # fmt: skip

    data = actions.add_parser("data", help="get, show and check pictures and texts")
    parts = data.add_subparsers(dest="part", required=True, metavar="get|show|check|scenes|corrupt")
    sub = verb("get", do.data_get, "bring sample sets to this machine", parts)
    sub.add_argument("names", nargs="+", metavar="NAME", help="furniture, food, interiors")
    sub.add_argument("--packages", metavar="FOLDER",
                     help="packages downloaded elsewhere, for a machine without network")  # fmt: skip
    sub = verb("show", do.data_show, "print rows, batch shapes and the words the model sees", parts)
    source(sub)
    sub.add_argument("--rows", type=at_least(1), default=3)
    sub.add_argument("--run", help="show what this run's processor makes of the rows")
    sub.add_argument("--text", default="minilm", help="text tower whose tokenizer to use without --run")
    sub = verb("check", do.data_check, "find unreadable files, leaks, duplicates, cut texts; exits 1 on errors", parts)
    source(sub)
    sub.add_argument("--max-length", type=at_least(3), default=40, help="tokens a caption may have before it is cut")
    sub.add_argument("--text", default="minilm", help="text tower whose tokenizer counts")
    sub.add_argument("--write-groups", metavar="FILE", help="write the rows with the groups their pictures suggest")

    sub = verb("scenes", do.data_scenes, "compose scenes that teach what stands where: twins with two pictures "
               "exchanged, captions true and swapped, questions", parts)  # fmt: skip
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

    sub = verb("corrupt", do.data_corrupt, "exchange a known share of the captions, to measure what finds the wrong "
               "ones", parts)  # fmt: skip
    source(sub)
    sub.add_argument("out", help="the folder to write; the truth is in its columns caption_true and corrupted")
    sub.add_argument("--share", type=float, default=0.3, help="of the captions that go to pictures of other groups")
    sub.add_argument("--split", default="train", choices=["train", "val", "test"], help="whose captions")
    sub.add_argument("--seed", type=at_least(0), default=0)

    def short(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--batch", metavar="ROWS", help="the same as train.batch=ROWS")
        sub.add_argument("--memory", metavar="SIZE", help="the same as train.memory=SIZE: 8GB; cuts the batch to fit")

    sub = verb("train", do.train_run, "train, or resume, a run")
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    short(sub)

    sub = verb("doctor", do.examine_config, "before a run: can it work? texts, batches, gradients, eight rows by "
               "heart, time and memory")  # fmt: skip
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped recipe, as for train")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--seconds", type=seconds, default=120, help="at most so long on learning by heart")
    short(sub)

    sub = verb("evaluate", do.evaluate_run, "score a run on held-out rows, beside chance and blind")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--split", default="test", choices=["train", "val", "test"])
    sub.add_argument("--limit", type=at_least(1), default=10_000, help="rows at the most, sampled with a fixed seed")
    sub.add_argument("--regions", help="of a run that reads regions: stored ones of these pictures, which are then not "
                     "looked at")  # fmt: skip
    sub.add_argument("--out", help="write the numbers as JSON")

    sub = verb("binding", do.binding_run, "does a run know what stands where: scenes, their captions true and swapped")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--split", default="test", choices=["train", "val", "test"])
    sub.add_argument("--limit", type=at_least(1), default=10_000, help="scenes at the most, sampled with a fixed seed")
    sub.add_argument("--out", help="write the numbers as JSON")

    sub = verb("compare", do.compare_runs, "late, mid and early fusion at the same budget, one table")
    sub.add_argument("config", help="a YAML file or a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--fusion", default="late,mid,early")
    sub.add_argument("--streams", default="dual")
    sub.add_argument("--seeds", default="0,1,2")
    sub.add_argument("--out", default="runs/compare")

    sub = verb("bootstrap", do.bootstrap_captions, "clean a table's captions by what learnt from them: write one for "
               "each picture, judge old and new, keep, replace or leave out (CapFilt)")  # fmt: skip
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

    sub = verb("index", do.index_source, "embed a source so that it can be searched; only what changed the next time")
    sub.add_argument("run")
    source(sub)
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--rebuild", action="store_true", help="start over, for instance after training the run again")

    sub = verb("search", do.search_index, "search an index by words, by a picture, or both")
    sub.add_argument("run")
    sub.add_argument("text", nargs="?", help="words")
    sub.add_argument("--image", help="a picture to search by")
    sub.add_argument("--where", help='a filter: "category = Kitchen and width_cm < 80"')
    sub.add_argument("-k", type=at_least(1), default=20)
    sub.add_argument("--weight", type=float, default=0.5, help="share of the picture when words and picture are given")
    sub.add_argument("--mode", default="vector", choices=["vector", "text", "hybrid"])
    sub.add_argument("--rerank", action=argparse.BooleanOptionalAction, default=None,
                     help="second stage by the fusion layers (default: where the run's match_weight is above 0; "
                          "asked for where it is 0, matching alone orders)")  # fmt: skip
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--json", action="store_true")

    sub = verb("answer", do.answer_question, "ask a question about a picture")
    sub.add_argument("run")
    sub.add_argument("image")
    sub.add_argument("question")
    sub.add_argument("--allowed", help='only these answers: "Kitchen,Bathroom"')
    sub.add_argument("-k", type=at_least(1), default=5)
    sub.add_argument("--json", action="store_true")

    sub = verb("caption", do.write_captions, "write about pictures, by a run that learnt to (lm, prefix_lm)")
    sub.add_argument("run", help="or the folder of a VisionEncoderDecoder of transformers, with its tokenizer and "
                                 "image processor")  # fmt: skip
    sub.add_argument("images", nargs="+", metavar="PICTURE")
    sub.add_argument("--prompt", default="", help='words each caption begins with: "a photo of"')
    sub.add_argument("--beams", type=int, default=3)
    sub.add_argument("--sample", action="store_true", help="draw the words instead of searching for the likeliest")
    sub.add_argument("--top-p", type=float, default=0.9, help="share of the probability that is drawn from")
    sub.add_argument("--seed", type=int, default=0, help="of the draw")
    sub.add_argument("--max-length", type=int, default=0, help="tokens (default: as many as in training)")
    sub.add_argument("--json", action="store_true")

    sub = verb("demo", do.demo, "open the search page in the browser")
    sub.add_argument("run")
    sub.add_argument("--index", help="folder of the index (default: RUN/index)")
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=int, default=7860)
    sub.add_argument("--token", help="ask visitors for this token; needed on any host but localhost")
    sub.add_argument("--no-browser", action="store_true")

    verb("list", do.list_presets, "the published systems that ship as presets")

    sub = verb("draw", do.draw_figure, "a model's figure: who reads whom, where the streams meet, what each part costs")
    sub.add_argument("what", help="a preset (interlace list), a run folder, or a recipe")
    sub.add_argument("--out", metavar="FILE.svg", help="write the figure as SVG, too")
    sub.add_argument("--words", type=int, default=16, help="length of the text whose FLOPs are counted")
    sub.add_argument("--cells", type=int, default=0, help="length of the image stream (default: the model's own)")

    sub = verb("extract", do.extract_regions, "features and boxes of a source's pictures, for models that read regions")
    source(sub)
    sub.add_argument("out", help="folder of the store; what it has already is not extracted again")
    sub.add_argument("--tower", help="an image tower whose grid cells are the regions (default: efficientnet-lite0)")
    sub.add_argument("--detector", metavar="FOLDER", help="or an object detector of transformers, its weights there")
    sub.add_argument("--regions", type=int, help="boxes per picture, with --detector (default: 36)")
    sub.add_argument("--size", type=int, help="side of the pictures in pixels (default: the tower's or detector's own)")
    sub.add_argument("--fit", choices=["pad", "squash", "crop"], help="how a picture becomes square (default: pad)")
    sub.add_argument("--batch", type=int, default=32)
    sub.add_argument("--split", choices=["train", "val", "test"], help="only this one")

    sub = verb("convert", do.convert_release, "bring a published model's weights over, as a run like any other")
    sub.add_argument("source", help="a local .bin, .pth, .pt or .safetensors file, or a folder of transformers")
    sub.add_argument("out", help="the folder to write")
    sub.add_argument("--preset", required=True, metavar="NAME", help="whose weights they are (interlace list)")
    sub.add_argument("--tokenizer", default="", metavar="NAME",
                     help="folder or name of its tokenizer (default: what lies beside the weights)")  # fmt: skip
    sub.add_argument("--answers", default="", metavar="FILE.json", help="the answer list of its answer head")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """As argparse does, but key=value may stand after a flag, too, and flags for two keys are those keys."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if "=" not in word or word.startswith("-")]
        args.overrides += [f"train.{key}={value}" for key in ("batch", "memory")
                           if (value := getattr(args, key, None)) is not None]  # fmt: skip
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    code = run(parse(argv))
    if leave_group():  # threads of the group's libraries outlive it, and may abort what ends in the ordinary way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(args: argparse.Namespace) -> int:
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


def leave_group() -> bool:
    """Whether this process was a rank among others, and no longer is."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


if __name__ == "__main__":
    sys.exit(main())
