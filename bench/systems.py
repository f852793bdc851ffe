"""What the small recipe of every system learns from the sample pictures, and what its pre-training is worth.

    python -m bench.systems --seeds 0,1
    python -m bench.systems uniter blip --seeds 0 --pages docs

For each system and seed: its recipe SYSTEM-small; then the recipe `finetune` twice, from that run and from the same
parts without it (text and image towers as they ship): same steps, same seed, same rows. Where the system writes, the
recipes `finetune-captions` and `finetune-answers` likewise. Everything is scored on the test split, in one gallery of
all sources.

hidden words   40% hidden, share guessed right beside the own picture / another row's / a white one; and how much more
               they cost (cross-entropy) beside another's than beside the own
match          balanced accuracy of "does this text belong here" over each row's own text and eight of other groups; by
               head and cosine together, and by the head alone
R@1            text to image and image to text, by vectors and re-ranked by matching; times chance beside it
probes         loss of hidden words beside the own, another, a white picture; of hidden pictures beside the own,
               another, no text (MLIM)

With and without pre-training are compared query by query: mean difference, 95% interval and p over groups of rows,
scores averaged over the seeds. What is finished is found again: the command goes on where it was stopped. Seeds that
were trained elsewhere or earlier are taken from the file of --out and the values beside it, as long as their recipes
are what they were.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import archive
from bench.common import keep, machine, parser
from bench.pages import onto_page
from interlace.card import read_log
from interlace.compare import load_kept, paired, save_kept
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.evaluate import evaluate, markdown, rows_of
from interlace.held import Kept, Score
from interlace.presets import PRESETS
from interlace.run import MARK, Run, write_json
from interlace.settings import Settings, load_settings
from interlace.tasks.probes import probe
from interlace.train import train

# share of the words, and of the picture, hidden in the probes: the paper's heavy rate, and all cells of a tower, which
# know of each other
HIDDEN = {"mlim": (0.8, 1.0)}
FINETUNED = ("finetune",)
WRITES = {"blip": ("finetune-captions", "finetune-answers"), "vision_encoder_decoder": ("finetune-captions",)}
WHICH = ("after", "without")
RESCORED = "matching beside eight wrong texts of each row"  # of seeds scored before, the rest still counts
ONLY_WRITES = ("vision_encoder_decoder",)
KINDS = {"finetune": "retrieval and answers", "finetune-captions": "captions", "finetune-answers": "written answers"}
HEADLINES = ("text to image R@1", "image to text R@1", "text to image R@1 re-ranked top 20",
             "image to text R@1 re-ranked top 20", "match or not, balanced accuracy",
             "match or not, by the match head alone", "answers, accuracy", "captions, CIDEr",
             "written answers, accuracy")  # fmt: skip


def recipes_of(system: str) -> tuple[str, ...]:
    return () if system in ONLY_WRITES else FINETUNED


def fine_tuned(system: str) -> list[tuple[str, str]]:
    """Each recipe of fine-tuning, after pre-training and without."""
    return [(recipe, which) for recipe in (*recipes_of(system), *WRITES.get(system, ())) for which in WHICH]


def measure(system: str, seed: int, source: Source, work: Path, more: list[str]) -> dict[str, Any]:
    """Trains and scores what is not there yet: {"pretrained": scores, "finetune": {"after", "without"}, ...}."""
    folder = work / f"{system}-{seed}"
    small = load_settings(f"{system}-small", [f"train.seed={seed}", f"train.out={folder / 'pretrained'}",
                                              "train.evaluate=false", *more])  # fmt: skip
    found: dict[str, Any] = {"pretrained": scored(small, source, probes=HIDDEN.get(system, (0.4, 0.4)))}
    for recipe in (*recipes_of(system), *WRITES.get(system, ())):
        tuned = load_settings(recipe, [f"train.seed={seed}", "train.evaluate=false", *more])
        found[recipe] = {
            "after": scored(from_run(tuned, folder / "pretrained", folder / f"{recipe}-after"), source),
            "without": scored(from_parts(tuned, small, folder / f"{recipe}-without"), source),
        }
    return found


def from_run(tuned: Settings, start: Path, out: Path) -> Settings:
    settings = copy.deepcopy(tuned)
    settings.model.start, settings.train.out = str(start), str(out)
    return settings


def from_parts(tuned: Settings, small: Settings, out: Path) -> Settings:
    """The same fine-tuning of the model that the small recipe began with."""
    settings = copy.deepcopy(tuned)
    settings.model, settings.train.out = copy.deepcopy(small.model), str(out)
    return settings


def scored(settings: Settings, source: Source, probes: tuple[float, float] | None = None) -> dict[str, Any]:
    """The run's scores on the test split, kept in its folder with the value of each query."""
    out = Path(settings.train.out)
    file = out / "bench.json"
    if not file.is_file():
        train(settings)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        run = Run.load(out)
        metrics = evaluate(run, source, "test")
        kept = {(source.name, name): score.kept for name, score in rows_of(metrics)
                if isinstance(score, Score) and score.kept}  # fmt: skip
        save_kept(out / "bench.npz", kept)
        facts = json.loads((out / MARK).read_text())
        content = {"seconds": facts["train_seconds"], "steps": facts["steps"], "parameters": facts["parameters"],
                   "scores": dict(rows_of(metrics)), "table": markdown(metrics)}  # fmt: skip
        if probes:
            content["probes"] = probe(run, source, rate=probes[0], cells=probes[1])
        write_json(file, content)
    return json.loads(file.read_text())


# ------------------------------------------------------------------------------------------------------------- tables


def values_of(work: Path, system: str, seed: int, source: str) -> archive.Archive:
    """What the finished runs of a seed said of each query, by measure."""
    out: archive.Archive = {}
    for recipe, which in fine_tuned(system):
        kept = load_kept(work / f"{system}-{seed}" / f"{recipe}-{which}" / "bench.npz")
        out[system, seed, recipe, which] = {name: kept[source, name] for name in HEADLINES if (source, name) in kept}
    return out


def gains(values: archive.Archive, system: str, seeds: list[int]) -> dict[str, dict[str, Any]]:
    """{recipe: {measure: after pre-training minus without, on the same queries}}."""
    out: dict[str, dict[str, Any]] = {}
    for recipe in dict.fromkeys(recipe for recipe, _ in fine_tuned(system)):
        both = [tuple(values[system, seed, recipe, which] for which in WHICH) for seed in seeds]
        out[recipe] = {}
        for name in HEADLINES:
            pairs: list[tuple[Kept, Kept]] = [(after[name], without[name]) for after, without in both
                                              if name in after and name in without]  # fmt: skip
            if not pairs:
                continue
            difference, by_seed = paired(pairs)
            if difference is not None:
                out[recipe][name] = {"mean": difference.mean, "low": difference.low, "high": difference.high,
                                     "p": difference.p, "by seed": by_seed}  # fmt: skip
    return out


def per_cent(values: list[float]) -> str:
    """ "41.2 [38 to 44]": mean, lowest and highest seed."""
    spread = f" [{100 * min(values):.0f} to {100 * max(values):.0f}]" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def learnt(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: what each pre-training has learnt."""
    lines = ["| system | seeds | minutes | hidden words right: own picture / another's / white | "
             "another's costs more, each seed | match or not, balanced | blind |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for system, seeds in results.items():
        runs = [one["pretrained"] for one in seeds.values()]
        minutes = mean(run["seconds"] for run in runs) / 60
        right, lost = ([run.get("probes", {}).get(name) for run in runs] for name in ("mlm_accuracy", "mlm_loss"))
        words = " / ".join(per_cent([r[c]["value"] for r in right]) for c in right[0]) if all(right) else ""
        more = "; ".join(interval(one["random"]) for one in lost) if all(lost) else ""
        match = [run["scores"].get("match or not, balanced accuracy") for run in runs]
        told = per_cent([m["value"] for m in match]) if all(match) else ""
        head = [run["scores"].get("match or not, by the match head alone") for run in runs]
        told += f"; the head alone {per_cent([h['value'] for h in head])}" if all(head) else ""
        blind = f"{100 * mean(m['blind'] for m in match):.1f}" if all(match) else ""
        lines.append(f"| {system} | {len(runs)} | {minutes:.1f} | {words} | {more} | {told} | {blind} |")
    return "\n".join(lines)


def interval(other: dict[str, float]) -> str:
    return (f"{other['difference']:+.3f} ({other['difference_low']:+.3f} to {other['difference_high']:+.3f}, "
            f"p {other['p']:.3f})")  # fmt: skip


def gained(results: dict[str, dict[int, dict[str, Any]]], more: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: fine-tuned after pre-training, and without it."""
    lines = ["| system | measure | chance | after pre-training | times chance | blind | without | difference | "
             "95% interval | p |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | :---: | ---: |"]  # fmt: skip
    for system, seeds in results.items():
        for recipe in (*recipes_of(system), *WRITES.get(system, ())):
            both = [one[recipe] for one in seeds.values()]
            for name in HEADLINES:
                after, without = ([s for one in both if (s := one[which]["scores"].get(name))] for which in WHICH)
                if not after or unasked(name, recipe):
                    continue
                chance = after[0].get("chance")
                value = mean(a["value"] for a in after)
                blind = [a["blind"] for a in after if a.get("blind") is not None]
                few = f" ({len(after)} of {len(both)} seeds)" if len(after) < len(both) else ""
                cells = [system, name + few, "" if chance is None else f"{100 * chance:.1f}",
                         per_cent([a["value"] for a in after]),
                         f"{value / chance:.0f}x" if chance and "R@1" in name else "",
                         f"{100 * mean(blind):.1f}" if blind else "",
                         per_cent([w["value"] for w in without]) if len(without) == len(after) else ""]  # fmt: skip
                gain = more[system][recipe].get(name)
                cells += ["", "", ""] if gain is None else [
                    f"{100 * gain['mean']:+.1f}", f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}",
                    f"{gain['p']:.3f}"]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def probed(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: the two probes of systems that draw the picture again; losses, so lower is better."""
    lines = ["| system | seed | loss of | own | another row's, more than own | white, or no text, more than own |",
             "| --- | ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    for system, seeds in results.items():
        for seed, one in seeds.items():
            probes = one["pretrained"].get("probes", {})
            for name, what in (("mlm_loss", "hidden words, beside a picture"),
                               ("recon_loss", "hidden picture, beside a text")):  # fmt: skip
                if "recon_loss" in probes:
                    own, *others = probes[name].values()
                    more = " | ".join(interval(other) for other in others)
                    lines.append(f"| {system} | {seed} | {what} | {own['value']:.4f} | {more} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def report(results: dict[str, dict[int, dict[str, Any]]], more: dict[str, dict[str, dict[str, Any]]], source: Source,
           facts: dict[str, Any], command: str) -> str:  # fmt: skip
    test, train_rows = len(source.indices("test")), len(source.indices("train"))
    asked = len(source.question_indices("test"))
    parts = [f"`{command}`; {source.name}: {train_rows:,} training pairs, {test} test pairs, {asked} test questions; "
             f"{facts['cpu']}, {facts['cores']} cores, one thread, other work beside it. Mean, in brackets lowest to "
             "highest seed; per cent, CIDEr times 100.", "### What each pre-training learnt",
             learnt(results), "### What it is worth", gained(results, more)]  # fmt: skip
    if table := probed(results):
        parts += ["### MLIM's probes", table]
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------- a page per system


def on_its_page(system: str, seeds: dict[int, dict[str, Any]], work: Path, docs: Path) -> None:
    """The run of the first seed onto the system's page: commands, losses by step, what it ended with."""
    seed = next(iter(seeds))
    folder, one = work / f"{system}-{seed}", seeds[seed]
    pre, picture = one["pretrained"], docs / f"images/systems/{system}-loss.png"
    shutil.copyfile(folder / "pretrained/loss.png", picture)
    commands, said = [f"interlace train {system}-small"], []
    for recipe in (*recipes_of(system), *WRITES.get(system, ())):
        name = f"runs/{system}-{recipe.removeprefix('finetune').strip('-') or 'tuned'}"
        commands.append(f"interlace train {recipe} model.start=runs/{system}-small train.out={name}")
        said += headlines(one[recipe]["after"], one[recipe]["without"], recipe)
    log = [entry for entry in read_log(folder / "pretrained/log.jsonl") if "loss" in entry]
    told = ", ".join(f"{name} {first:.3g} to {last:.3g}" for name, first, last in losses(log))
    intro = (f"{pre['steps']} steps, seed {seed}, {pre['parameters'] / 1e6:.1f} M parameters, "
             f"{pre['seconds'] / 60:.1f} minutes on one core of a busy machine; first and last log: {told}. Tuned, "
             f"on the test split (in brackets the same without pre-training): {', '.join(said)}. "
             f"[All figures](../runs.md#{system}), with chance and blind.")  # fmt: skip
    figure = f"![Losses by step](../images/systems/{system}-loss.png)"
    text = "\n".join(["```", *commands, "```", "", intro, "", figure])
    page = docs / f"systems/{system}.md"
    head, _, _ = page.read_text(encoding="utf-8").partition("\n## A run on the sample pictures")
    page.write_text(head.rstrip() + "\n\n## A run on the sample pictures\n", encoding="utf-8")
    onto_page(page, text, f"python -m bench.systems {system}")


def tables(system: str, seeds: dict[int, dict[str, Any]]) -> str:
    """All figures of the first seed, for the page of all runs."""
    one = next(iter(seeds.values()))
    pre, parts = one["pretrained"], [f"## {system}"]
    if pre["table"]:
        parts.append(f"After pre-training, {pre['steps']} steps:\n\n{pre['table']}")
    for recipe in (*recipes_of(system), *WRITES.get(system, ())):
        after, without = one[recipe]["after"], one[recipe]["without"]
        lasted = f"{after['steps']} steps, {after['seconds'] / 60:.1f} minutes"
        parts.append(f"Fine-tuned for {KINDS[recipe]}, {lasted}:\n\n{beside(after, without, recipe)}")
    return "\n\n".join(parts)


def headlines(after: dict[str, Any], without: dict[str, Any], recipe: str) -> list[str]:
    """ "answers, accuracy 58.7 (47.8)" """
    out = []
    for name in HEADLINES:
        if name in after["scores"] and not unasked(name, recipe) and "re-ranked" not in name:
            other = without["scores"].get(name, {}).get("value")
            bracket = "" if other is None else f" ({100 * other:.1f})"
            out.append(f"{name} {100 * after['scores'][name]['value']:.1f}{bracket}")
    return out


def unasked(name: str, recipe: str) -> bool:
    """A decoder that came with the run scores captions after any fine-tuning; only one of them was for captions."""
    return name.startswith("captions") and recipe != "finetune-captions"


def beside(after: dict[str, Any], without: dict[str, Any], recipe: str) -> str:
    lines = ["| measure, test split | score | 95% interval | chance | blind | without |",
             "| --- | ---: | :---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, s in after["scores"].items():
        if name.startswith(("answers: ", "written answers: ")) or "R@5" in name or unasked(name, recipe):
            continue
        other = without["scores"].get(name, {}).get("value")
        cells = [f"{100 * s['value']:.1f}", f"{100 * s['low']:.1f} to {100 * s['high']:.1f}" if "low" in s else "",
                 *("" if s.get(k) is None else f"{100 * s[k]:.1f}" for k in ("chance", "blind")),
                 "" if other is None else f"{100 * other:.1f}"]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses(log: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Each objective's loss at its first and last log."""
    from interlace.objectives.base import Objective

    names = dict.fromkeys(k for entry in log for k in entry if k.rpartition("/")[2] in Objective.known)
    return [(name, *[[e[name] for e in log if name in e][at] for at in (0, -1)]) for name in names]  # type: ignore


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("systems", nargs="*", default=list(PRESETS), help=f"default {' '.join(PRESETS)}")
    options.add_argument("--seeds", default="0,1")
    options.add_argument("--work", type=Path, default=Path("runs/systems"))
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `interlace train` takes")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--pages", type=Path, metavar="DOCS", help="put the tables onto the pages of this folder")
    options.add_argument("--found", action="store_true", help="train nothing, report what is there")
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    facts, seeds = machine("torch", "transformers"), [int(s) for s in given.seeds.split(",")]
    source = open_source(["furniture", "food"])
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in seeds:  # all systems with the first seed before any with the second
        for system in given.systems:
            if not given.found or all_there(system, seed, given.work):
                print(f"\n=== {system}, seed {seed}", flush=True)
                results.setdefault(system, {})[seed] = measure(system, seed, source, given.work, given.set)
    trained = {system: list(one) for system, one in results.items()}
    values: archive.Archive = {}
    for system, one in trained.items():
        for seed in one:
            values |= values_of(given.work, system, seed, source.name)
    if given.out:
        add_earlier(given.out, results, values, source.name)
    results = {system: dict(sorted(results[system].items())) for system in PRESETS if system in results}
    more = {system: gains(values, system, list(one)) for system, one in results.items()}
    all_seeds = sorted({seed for one in results.values() for seed in one})
    text = report(results, more, source, facts, f"python -m bench.systems --seeds {','.join(map(str, all_seeds))}")
    print(text)
    keep(given.out, {"machine": facts, "source": source.name,
                     "recipes": {system: archive.digest(names(system), scored_by(system)) for system in results},
                     "results": {s: {str(k): v for k, v in one.items()} for s, one in results.items()}})  # fmt: skip
    if given.out:
        archive.save(given.out.with_suffix(".npz"), values)
    if given.pages:
        onto_page(given.pages / "results.md", text, "python -m bench.systems")
        for system, one in trained.items():
            on_its_page(system, {seed: results[system][seed] for seed in one}, given.work, given.pages)
        runs = [tables(system, one) for system, one in results.items()]
        onto_page(given.pages / "runs.md", "\n\n".join(runs), "python -m bench.systems")
    return {"results": results}


def names(system: str) -> list[str]:
    """All recipes that a system's figures come from."""
    return [f"{system}-small", *recipes_of(system), *WRITES.get(system, ())]


def scored_by(system: str) -> tuple[str, ...]:
    """What measures have become since the first figures."""
    return (RESCORED,) if recipes_of(system) else ()


def forget_matching(one: dict[str, Any], runs: list[dict[str, Kept]]) -> None:
    """Takes what was scored in another way from a seed's figures and values."""
    tuned = [one[recipe][which]["scores"] for recipe in FINETUNED for which in WHICH]
    for scores in [one["pretrained"]["scores"], *tuned]:
        for name in [name for name in scores if name.startswith("match or not")]:
            del scores[name]
    for measures in runs:
        for name in [name for name in measures if name.startswith("match or not")]:
            del measures[name]


def add_earlier(file: Path, results: dict[str, dict[int, dict[str, Any]]], values: archive.Archive,
                source: str) -> None:  # fmt: skip
    """Adds the seeds that `file` and the values beside it have and this folder of runs has not, asked for or not: what
    is written back must lose none."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    known = archive.load(file.with_suffix(".npz"))
    for system, one in before.get("results", {}).items() if before.get("source") == source else ():
        for seed in [seed for seed in map(int, one) if seed not in results.get(system, {})]:
            runs = [(system, seed, recipe, which) for recipe, which in fine_tuned(system)]
            digest, scored = before.get("recipes", {}).get(system), scored_by(system)
            if digest not in (archive.digest(names(system), scored), archive.digest(names(system))):
                print(f"{system}, seed {seed}: its recipes have changed since; it is left out")
            elif all(run in known for run in runs):
                if digest != archive.digest(names(system), scored):
                    print(f"{system}, seed {seed}: its matching was scored beside one wrong text; that is left out")
                    forget_matching(one[str(seed)], [known[run] for run in runs])
                results.setdefault(system, {})[seed] = one[str(seed)]
                values |= {run: known[run] for run in runs}


def all_there(system: str, seed: int, work: Path) -> bool:
    folder = work / f"{system}-{seed}"
    parts = [f"{recipe}-{which}" for recipe in (*recipes_of(system), *WRITES.get(system, ()))
             for which in ("after", "without")]  # fmt: skip
    return all((folder / part / "bench.json").is_file() for part in ("pretrained", *parts))


if __name__ == "__main__":
    main()
