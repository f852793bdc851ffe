"""Before a run: can it work? Looks at the data and the settings, learns eight rows by heart, measures a step."""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interlace.data.batches import Collate, Samples
from interlace.data.processor import Processor
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.heads_first import MOST, VISITS
from interlace.learner import Learner
from interlace.objectives.base import Batch, Objective, Scored, Views
from interlace.settings import Settings
from interlace.towers import quiet
from interlace.train import build_passes, make_learner, shape_of, stored_regions, trainer_steps

OK, WARN, FAIL = "ok", "warn", "FAIL"
BY_HEART = 8  # rows
ENOUGH = 0.5  # of its first loss: an objective that gets below has learned the rows by heart, or is about to


@dataclass
class Finding:
    """One line of the report."""

    what: str
    verdict: str  # ok | warn | FAIL
    says: str
    fix: str = ""


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)

    def say(self, what: str, verdict: str, says: str, fix: str = "") -> None:
        self.findings.append(Finding(what, verdict, says, fix))

    @property
    def healthy(self) -> bool:
        return all(finding.verdict != FAIL for finding in self.findings)

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        if not console.is_terminal:  # a file or a pipe has no edge to wrap at
            console = Console(file=console.file, width=140)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("", "what", "found"):
            table.add_column(head)
        colour = {OK: "green", WARN: "yellow", FAIL: "red"}
        for one in self.findings:
            fix = f"\n[dim]{one.fix}[/dim]" if one.fix else ""
            table.add_row(f"[{colour[one.verdict]}]{one.verdict}[/]", one.what, one.says + fix)
        console.print(table)


def examine(settings: Settings, source: Source | None = None, seconds: float = 120.0, progress: bool = True) -> Report:
    """Builds what `train` would and reports, one finding a line: the data's texts against the maximum length, batches
    against objectives, a decoder's ids, gradients, eight rows learned by heart (at most `seconds`), a measured step.

    Raises UserError for what `train` itself would refuse.
    """
    report, t = Report(), settings.train
    source = source or open_source(settings.data.source, columns=settings.data.columns or None,
                                   pictures=settings.data.pictures or None)  # fmt: skip
    rows = len(source.indices("train"))
    enough = rows >= t.batch
    report.say("data", OK if enough else FAIL, f"{rows:,} training rows, {len(source.indices('val')):,} to validate",
               "" if enough else f"fewer than one batch of {t.batch}: lower train.batch")  # fmt: skip
    torch.manual_seed(t.seed)
    passes = build_passes(settings, source)
    for objective in (o for one in passes for o, _ in one.objectives):
        objective.check_augment(settings.augment)
    learner, processor = make_learner(settings, passes)
    learner.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    if enough:
        learner.attach(t.batch, rows)
    texts(report, source, processor)
    batches(report, settings, learner, source)
    ids(report, learner, processor)
    frozen(report, settings, learner)
    regions = stored_regions(settings, source)
    samples = Samples(source, "train", processor, passes, t.seed, augment=False, regions=regions)
    collate = Collate(processor, None, passes, learner.cells_to_hide(), shape_of(processor))
    few = moved(collate([samples[0, n] for n in of_different_groups(source, samples)]), learner.device)
    step(report, settings, learner, samples, collate, rows)
    by_heart(report, learner, processor, few, seconds, progress)
    reloads(report, learner, few)
    return report


# ------------------------------------------------------------------------------------------------------ without a step


def texts(report: Report, source: Source, processor: Processor, most: int = 2000) -> None:
    """Captions and questions that the maximum length cuts."""
    captions = source.captions().to_pylist()
    rows = np.asarray(source.indices("train"))
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
    given = [captions[row] for row in chosen if captions[row].strip()]
    empty = 1 - len(given) / max(len(chosen), 1)
    asked = source.question_indices("train")[:most]
    for name, several in (("captions", given), ("questions", [source.question(int(n)).question for n in asked])):
        if not several:
            continue
        lengths = np.array([processor.length(text) for text in several])
        cut = float((lengths > processor.max_length).mean())
        says = (f"{cut:.1%} longer than {processor.max_length} tokens (median {int(np.median(lengths))}, longest "
                f"{lengths.max()})")  # fmt: skip
        fix = f"model.max_length={int(np.quantile(lengths, 0.99))} would cut 1%" if cut > 0.01 else ""
        report.say(name, FAIL if cut > 0.5 else WARN if cut > 0.01 else OK, says, fix)
    if empty > 0.01:
        report.say("captions", WARN, f"{empty:.1%} are empty: those rows teach nothing that needs a caption")


def batches(report: Report, settings: Settings, learner: Learner, source: Source) -> None:
    """Objectives that compare rows want many of them."""
    t = settings.train
    names = {objective.name for objective, _ in learner.objectives}
    micro = t.batch // t.accumulate
    for contrast in sorted(names & {"itc", "itc_sigmoid"}):
        if t.batch < 32:
            report.say("batch", FAIL if t.batch < 2 else WARN, f"{contrast} chooses among {t.batch} rows, which is "
                       "little to tell apart", "a larger train.batch (train.memory or train.accumulate keep the "
                       "memory), or a queue: itc_momentum in its place")  # fmt: skip
    hard = [o for o, _ in learner.objectives if getattr(o, "negatives", "") in ("hard", "both")]
    if hard and micro < 16:
        report.say("batch", FAIL if micro < 2 else WARN, f"hard negatives are sought among the {micro} rows of a "
                   "micro-batch", "a larger train.batch, less train.accumulate, or itm.negatives=drawn")  # fmt: skip
    groups = {source.group(int(row)) for row in source.indices("train")[:1000]}
    if names & {"itm", "itc"} and len(groups) < 2:
        report.say("batch", FAIL, f"all rows are of one group ({next(iter(groups), '')}), so no pair is ever wrong",
                   "give rows that show different things different groups (data.columns={group: ...})")  # fmt: skip
    if not any(finding.what == "batch" for finding in report.findings):
        report.say("batch", OK, f"{t.batch} rows a step")


def ids(report: Report, learner: Learner, processor: Processor) -> None:
    """A decoder starts, pads and ends texts by the ids its tokenizer means."""
    decoder = learner.decoder
    if decoder is None:
        return
    from interlace.objectives.lm import ends

    tokenizer, config = processor.tokenizer, decoder.config
    start, end = ends(tokenizer)
    own = set(tokenizer.all_special_ids) - {tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id}
    wrong = []
    for name, wanted in (("bos_token_id", start), ("eos_token_id", end), ("pad_token_id", tokenizer.pad_token_id)):
        has, generates = getattr(config, name, None), getattr(decoder.generation_config, name, None)
        if has != generates:
            wrong.append(f"training's {name} is {has}, generation's {generates}")
        if has != wanted and (name == "pad_token_id" or has not in own):  # BLIP starts with a [DEC] of its own
            wrong.append(f"the decoder's {name} is {has}, the tokenizer's {wanted}")
    if config.eos_token_id == config.pad_token_id:
        wrong.append("the end is the padding too: a model trained so never stops")
    fix = "build the decoder with the tokenizer's ids (Decoder(start=..., end=...))" if wrong else ""
    report.say("written ids", FAIL if wrong else OK, "; ".join(wrong) or f"start {config.bos_token_id}, end "
               f"{config.eos_token_id} in training and in generation", fix)  # fmt: skip


def frozen(report: Report, settings: Settings, learner: Learner) -> None:
    """What is frozen knows something: a part that starts from random numbers and may not learn stays random."""
    known, idle = set(learner.started), Counter[str]()
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad and name not in known and ".tower." not in name:
            idle[".".join(name.split(".")[:3])] += parameter.numel()
    if idle:
        named = ", ".join(f"{part} ({n:,})" for part, n in idle.most_common(6))
        report.say("frozen", WARN, f"frozen, though nothing pre-trained is in it: {named}",
                   f"take it out of train.freeze ({', '.join(settings.train.freeze)})")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- with steps


def moved(batch: Any, device: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return [moved(value, device) for value in batch] if isinstance(batch, list) else batch


def gradients(report: Report, learner: Learner, touched: set[str]) -> None:
    """Every part that should learn got a gradient in some step: branches that start as zeros let none through in the
    first."""
    sizes = {name: p.numel() for name, p in learner.named_parameters() if p.requires_grad}
    idle: dict[str, int] = {}
    for name in sizes.keys() - touched:
        part = ".".join(name.split(".")[:3])
        idle[part] = idle.get(part, 0) + sizes[name]
    share = sum(idle.values()) / max(sum(sizes.values()), 1)
    named = ", ".join(f"{part} ({n:,})" for part, n in sorted(idle.items(), key=lambda i: -i[1])[:6])
    report.say("gradients", FAIL if share > 0.5 else WARN if share > 0.01 else OK,
               f"reach {1 - share:.1%} of {sum(sizes.values()):,} parameters that should learn"
               + (f"; not {named}" if idle else ""),
               "no objective reads these parts: add one that does, or leave them out" if share > 0.01 else "")


def of_different_groups(source: Source, samples: Samples) -> list[int]:
    """Positions of the rows to learn by heart. Rows of one group are each other's right answer, and a contrast among
    them cannot fall to zero."""
    seen: dict[str, int] = {}
    for position in range(min(len(samples), 1000)):
        seen.setdefault(source.group(int(samples.rows[position])), position)
        if len(seen) == BY_HEART:
            break
    return list(seen.values())


def as_kept(learner: Learner, batch: Batch) -> Batch:
    """The batch as it comes once frozen towers' states are kept: without pixels and ids that a tower would read."""
    batch = dict(batch)
    with torch.no_grad():
        if "image" in learner.frozen and "pixel_values" in batch:
            batch["image_states"] = learner.image.states(learner.normalise(batch["pixel_values"]))  # type: ignore
            if not any(objective.reads_pixels for objective, _ in learner.objectives):
                del batch["pixel_values"]
        if "text" in learner.frozen:
            for key in [key for key in batch if key.endswith("_ids")]:
                name, tower = key.removesuffix("_ids"), learner.text.tower
                ids, mask = batch.pop(key), batch[f"{name}_mask"]
                batch[f"{name}_states"] = tower(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore
    return batch


def step(report: Report, settings: Settings, learner: Learner, samples: Samples, collate: Collate, rows: int) -> None:
    """Time and memory of one optimiser step, and so of the run."""
    t = settings.train
    micro = max(1, min(t.batch // t.accumulate, len(samples)))
    device = learner.device
    before = memory()
    learner.train()
    state = copy.deepcopy({n: b.clone() for n, b in learner.named_buffers()})  # running statistics stay as they were
    kept = bool(learner.frozen) and settings.data.keep_states_gb > 0
    alone = t.mix != "sum" and len(learner.passes) > 1  # a step has one pass, as often as its share says
    drawn: list[tuple[int, ...]] = [(number,) for number in range(len(learner.passes))] if alone else [()]
    shares = [learner.passes[one[0]].share if one and t.mix == "draw" else 1.0 for one in drawn]
    reads, costs = [], []
    for one in drawn:
        times, reading = [], []
        for n in range(3 if one in ((), (0,)) else 2):  # the very first is slow
            began = time.perf_counter()
            batch = moved(collate([samples[(0, (n * micro + row) % len(samples), *one)] for row in range(micro)]),
                          device)  # fmt: skip
            reading.append(time.perf_counter() - began)
            if kept:
                batch = as_kept(learner, batch)
                began = time.perf_counter() - reading[-1]
            learner(**batch)["loss"].backward()
            learner.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        costs.append(min(times[1:]))
        reads.append(min(reading[1:]))
    for name, buffer in learner.named_buffers():
        buffer.copy_(state[name])
    seconds = float(np.average(costs, weights=shares))
    read = float(np.average(reads, weights=shares))
    steps, each = trainer_steps(settings, rows, t.batch), seconds * t.accumulate
    # Adam holds two numbers a parameter, the gradient is a third
    held = 3 * 4 * sum(p.numel() for p in learner.parameters() if p.requires_grad)
    peak = max(memory(), before) + held if device.type == "cpu" else memory() + held
    report.say("time", OK, f"{each:.2f} s a step of {t.batch} rows ({read / max(seconds, 1e-9):.0%} of it reading "
               f"pictures and texts), {steps:,} steps: about {span(each * steps)}"
               + (f"; {len(drawn)} passes, one a step" if alone else "")
               # every row is asked a few times, which is the forward third of its part of a step
               + (f"; before them heads learn alone, about {span(VISITS * min(rows, MOST) / t.batch * each / 3)}"
                  if t.heads_first else "")
               + (", after the frozen towers have seen each row once" if kept else ""))  # fmt: skip
    report.say("memory", OK, f"about {peak / 1e9:.1f} GB for {micro} rows at once, the optimiser's numbers among them",
               "")  # fmt: skip


def memory() -> float:
    """Bytes at the peak so far: of the device, or of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def scores(learner: Learner, batch: Batch) -> dict[str, tuple[Objective, Scored]]:
    """Each objective's own loss on the batch, by name; those that score nothing here are left out."""
    shared, found = Views(learner, batch), {}
    for plan, part in zip(learner.passes, batch["parts"]):
        views = Views(learner, batch, part, plan, shared)
        for objective, _ in plan.objectives:
            scored = objective.loss(learner, batch, views)
            if scored.loss.requires_grad:
                name = f"{plan.name}/{objective.key}" if plan.name else objective.key
                found[name] = (objective, scored)
    return found


def has_learned(first: float, low: float) -> bool:
    """Of a loss above 0, half is gone; one that may be below 0 (alignment) fell by half of its size, 0.05 at least."""
    return low < ENOUGH * first if first > 0.1 else low < first - max(ENOUGH * abs(first), 0.05)


WRITES = ("lm", "prefix_lm", "vqa_writes")
KNOWN = 0.9  # of the words that training asks for


def by_heart(report: Report, learner: Learner, processor: Processor, batch: Batch, seconds: float, progress: bool,
             steps: int = 150) -> None:  # fmt: skip
    """A model that cannot learn eight rows by heart learns nothing from a million. The learner is left as it was."""
    from interlace.bars import bar

    kept = copy.deepcopy(learner.state_dict())
    learner.eval()  # by heart means without dropout
    optimiser = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    first: dict[str, float] = {}
    lowest: dict[str, float] = {}
    touched: set[str] = set()
    writes: dict[str, float] = {}  # share of the words that are right where training asks for them
    began, done = time.perf_counter(), 0
    for _ in bar(range(steps), desc="learning 8 rows by heart", unit="step", disable=not progress):
        losses = scores(learner, batch)
        for name, (objective, scored) in losses.items():
            value = scored.loss.item()
            if objective.name in WRITES:
                writes[objective.name] = float(scored.logs[f"{objective.name}_accuracy"])
            first.setdefault(name, value)
            lowest[name] = min(lowest.get(name, value), value)
        done += 1
        if (done > 5 and all(has_learned(first[name], low) for name, low in lowest.items())
                and all(share >= KNOWN for share in writes.values())):  # fmt: skip
            break
        if time.perf_counter() - began > seconds:
            break
        optimiser.zero_grad()
        torch.stack([scored.loss for _, scored in losses.values()]).sum().backward()
        if done <= 5:
            touched |= {n for n, p in learner.named_parameters() if p.grad is not None and bool(p.grad.any())}
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
    for name, share in writes.items():
        says_it_again(report, learner, processor, batch, name, share)
    learner.load_state_dict(kept)
    gradients(report, learner, touched)
    for name, start in first.items():
        low = lowest[name]
        learned = has_learned(start, low)
        moving = low < start - 0.1 * max(abs(start), 0.1)
        report.say(f"{name} by heart", OK if learned else WARN if moving else FAIL,
                   f"{start:.3g} to {low:.3g} in {done} steps on {len(batch['ids'])} rows",
                   "" if learned else "it moves, though slowly: look again after the first epoch" if moving else
                   "it does not learn even these rows: captions that do not belong, a part frozen that it needs, or a "
                   "learning rate far too low")  # fmt: skip


@torch.no_grad()
def says_it_again(report: Report, learner: Learner, processor: Processor, batch: Batch, name: str,
                  known: float) -> None:  # fmt: skip
    """Texts that training has by heart (`known`, share of its words) are what generation writes: else it starts from
    another id than training did, or the labels were shifted twice."""
    said, wanted, what = written(learner, processor, batch, name)
    texts = [processor.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (said, wanted)]
    pairs = [(a.split(), b.split()) for a, b in zip(*texts) if b.strip()]
    # by first halves: the rest of a text that is not quite known goes astray after its first slip
    same = [a[: len(b) // 2 + 1] == b[: len(b) // 2 + 1] for a, b in pairs]
    share = sum(same) / max(len(same), 1)
    says = f"{name}: {sum(same)} of {len(same)} {what} learned by heart are written again"
    if share >= 0.5:
        report.say("written again", OK, says)
    elif known < KNOWN:
        report.say("written again", WARN, f"{says}; training itself is right about {known:.0%} of the words",
                   "nothing can be said yet: more --seconds")  # fmt: skip
    else:
        wrote, meant = next((" ".join(a), " ".join(b)) for (a, b), fine in zip(pairs, same) if not fine)
        report.say("written again", FAIL, f"{says}, though training is right about {known:.0%} of the words",
                   f"training and generation do not start alike, or the labels are shifted twice: it wrote {wrote!r} "
                   f"for {meant!r}")  # fmt: skip


def written(learner: Learner, processor: Processor, batch: Batch, name: str) -> tuple[Tensor, Tensor, str]:
    """What generation writes for the batch's rows (B, L), what it should (B, T), and what those are."""
    from interlace.generate import describe, write
    from interlace.objectives.lm import ends, read_for

    views = Views(learner, batch)
    if name == "vqa_writes":
        assert learner.decoder is not None
        asked = views.text("written_question")
        said = write(learner.decoder, read_for(learner, asked, views.image()), beams=1,
                     max_length=processor.max_length, min_length=1)  # fmt: skip
        return said, batch["written_answer0_ids"], "answers"
    tokenizer = processor.tokenizer
    start, end = ends(tokenizer)
    prompt: str = next((getattr(o, "prompt", "") for o, _ in learner.objectives if o.name == name), "")
    words = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    first = start if learner.decoder is None else learner.decoder.config.bos_token_id
    ids = torch.tensor([first, *words], device=learner.device)
    said = describe(learner, views.image(), ids, (start, end, tokenizer.pad_token_id), beams=1,
                    max_length=processor.max_length, min_length=1)  # fmt: skip
    return said[:, 1 + len(words) :], batch["caption_ids"], "captions"


def reloads(report: Report, learner: Learner, batch: Batch) -> None:
    """What is saved says the same after it was loaded."""
    learner.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = learner(**batch)["loss"]
        with quiet():
            learner.save_pretrained(Path(folder))
        again: Any = Learner.from_pretrained(Path(folder), local_files_only=True)
        again.to(learner.device).learn_by(learner.passes).eval()
        again.beside = learner.beside
        after = again(**batch)["loss"]
        same_ids = learner.decoder is None or all(
            getattr(again.decoder.generation_config, key) == getattr(learner.decoder.generation_config, key)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"))  # fmt: skip
    apart = abs(float(before) - float(after))
    fine = apart <= 1e-4 * max(1.0, abs(float(before))) and same_ids
    report.say("reload", OK if fine else FAIL, "the same loss after saving and loading" if fine else
               f"loss {float(before):.5g} became {float(after):.5g} after saving and loading"
               + ("" if same_ids else ", and the decoder's ids changed"))  # fmt: skip


def doctor(settings: Settings, seconds: float = 120.0) -> int:
    """What `interlace doctor` prints. Exit status 1 when something fails."""
    try:
        report = examine(settings, seconds=seconds)
    except UserError as error:
        report = Report()
        report.say("settings", FAIL, str(error))
    report.show()
    return 0 if report.healthy else 1
