"""A recipe on transformers' Trainer: from settings to a finished run folder."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from interlace.checkpoints import newest_complete
from interlace.compose import compose
from interlace.data.batches import Collate, Samples
from interlace.data.pictures import BadPicture
from interlace.data.processor import Processor
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.data.states import States, frozen_states
from interlace.embed.grid import GridTower
from interlace.embed.stem import ImageTower
from interlace.errors import Stopped, UserError, suggest
from interlace.heads_first import fit_heads
from interlace.learner import Learner
from interlace.memory import choose_micro_batch, hold, parse_bytes
from interlace.objectives import Objective, Pass, build_objective
from interlace.objectives.base import check_options, check_type
from interlace.preflight import (
    CHECKPOINTS,
    LOG,
    SCHEDULES,
    check_settings,
    no_strangers,
    same_data,
    same_settings,
    several_groups,
)
from interlace.product_start import align_product
from interlace.regions.base import RegionSource
from interlace.regions.open import open_regions
from interlace.run import MARK, Run, save_run, write_json
from interlace.settings import Settings
from interlace.systems import build_from_run, build_system
from interlace.trainer import CollapseAlarm, VLTrainer, read_skipped, skipped_file, write_skipped
from interlace.warm_start import (
    MOST,
    align_contrast,
    align_regions,
    align_stems,
    projection_name,
    start_features,
    start_frequencies,
)


def answer_list(source: Source, min_count: int = 1, split: str = "train") -> list[str]:
    """The answers of the training questions, most frequent first, ties by name: the order is the label's number."""
    counts: Counter[str] = Counter()
    for question in source.questions(split):
        counts.update({a for a, score in question.answers if score > 0})
    kept = [(a, n) for a, n in counts.items() if n >= min_count]
    return [a for a, _ in sorted(kept, key=lambda pair: (-pair[1], pair[0]))]


WITH_ANSWERS = ("vqa", "answers")  # objectives that choose from a list made of the data
WITH_CAPTIONS = ("itc", "itc_momentum", "itc_sigmoid", "itm", "mlm", "wra", "wpa", "prefix_lm", "lm")


def build_passes(settings: Settings, source: Source) -> list[Pass]:
    """In the order of the config. Raises UserError when the data cannot feed one of the objectives."""
    mixes = ("sum", "draw", "turns")
    if settings.train.mix not in mixes:
        raise UserError(f"train.mix is {', '.join(mixes)}; got {settings.train.mix!r}."
                        f"{suggest(settings.train.mix, mixes)}")  # fmt: skip
    passes = []
    for given in settings.passes or [{name: options} for name, options in settings.objectives.items()]:
        options = dict(given)
        share, image, name = options.pop("share", 1.0), options.pop("image", True), options.pop("name", "")
        check_type("passes.share", share, float)
        check_type("passes.image", image, bool)
        if share <= 0:
            raise UserError(f"passes.share is how often a pass is drawn, above 0; got {share}.")
        objectives = [_objective(key, value, settings, source) for key, value in options.items()]
        if objectives:
            passes.append(Pass(objectives, float(share), image, name))
    if not passes:
        raise UserError(f"no objective is left to learn by: give at least one of {', '.join(sorted(Objective.known))}.")
    return passes


def _objective(name: str, given: dict[str, Any], settings: Settings, source: Source) -> tuple[Objective, float]:
    if not isinstance(given, dict):
        raise UserError(f"{name}: expected its options, such as {{weight: 0.5}}, or nothing; got {given!r}.")
    options = dict(given)
    weight = options.pop("weight", 1.0)
    check_type(f"objectives.{name}.weight", weight, float)
    check_options(name, options)
    if name in WITH_ANSWERS:
        options["answers"] = _answers(name, options.get("answers"), options.get("min_count", 1), source)
    if name in WITH_CAPTIONS and not any(c.strip() for c in source.captions().to_pylist()[:1000]):
        raise UserError(f"the {name} objective needs captions, and the first 1,000 rows of {source.name} have "
                        "none: name the column (data.columns={caption: ...}) or leave it out.")  # fmt: skip
    return build_objective(name, options), float(weight)


def _answers(name: str, given: Any, min_count: int, source: Source) -> list[str]:
    """The answers to choose from: those given, or those of the training questions. Raises UserError when there are none
    to learn by."""
    asked = answer_list(source)
    if not asked:
        raise UserError(f"the {name} objective needs questions with answers, and {source.name} has none about a row "
                        "of its train split: add a questions file (`interlace data check` says what is wrong with one "
                        f"that is there), or leave {name} out (objectives.{name}=false).")  # fmt: skip
    if not given:
        answers = answer_list(source, min_count)
        if not answers:
            raise UserError(f"no answer stands {min_count} times among the training questions of {source.name}: lower "
                            f"objectives.{name}.min_count.")  # fmt: skip
        return answers
    if not (isinstance(given, list) and all(isinstance(one, str) and one.strip() for one in given)
            and len(set(given)) == len(given)):  # fmt: skip
        raise UserError(f"objectives.{name}.answers is a list of different texts, such as [red, blue], with quotes "
                        f"around numbers and yes or no; got {given!r}.")  # fmt: skip
    if not set(given) & set(asked):
        raise UserError(f"none of objectives.{name}.answers ({', '.join(given[:3])}) answers a training question of "
                        f"{source.name}; what does is {', '.join(asked[:3])} ... They are compared letter by letter.")
    return given


Made = tuple[Learner, Processor]
Maker = Callable[[Settings, list[Pass]], Made]


def train(settings: Settings, source: Source | None = None, make: Maker | None = None) -> Path:
    """Trains, or resumes, or finds the run already finished; returns the run folder.

    `source`: rows of your own reader instead of `settings.data.source`. `make`: builds the learner and its processor
    where `settings.model` cannot say it (segments of your own, a preset); default `make_learner`.

    Raises UserError for settings or data that cannot work, Stopped when SIGTERM or Ctrl-C ended it.
    """
    out = Path(settings.train.out).expanduser()
    if (out / MARK).is_file():
        same_settings(out, settings)
        print(f"{out} is finished already; choose another train.out to train again.")
        return out
    t = settings.train
    check_settings(settings)
    no_strangers(out)
    if t.memory:
        parse_bytes(t.memory)
        if t.accumulate != 1:
            raise UserError(f"train.memory chooses the micro-batches that train.accumulate={t.accumulate} fixes: leave "
                            "one of them out.")  # fmt: skip
    if t.batch % t.accumulate:
        raise UserError(f"train.batch {t.batch} does not divide into train.accumulate {t.accumulate} micro-batches.")
    same_settings(out, settings)
    torch.manual_seed(t.seed)
    source = source or open_source(settings.data.source, columns=settings.data.columns or None,
                                   pictures=settings.data.pictures or None)  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        for line in [*source.describe_columns(), source.left_out()]:
            if line:
                print(line)
    rows = len(source.indices("train"))
    arguments = training_arguments(settings, out)
    whole = t.batch * arguments.world_size  # rows of an optimiser step
    if rows < whole:
        ranks = f" on each of {arguments.world_size} ranks" if arguments.world_size > 1 else ""
        fits = rows // 2 // arguments.world_size
        mend = f"set train.batch={fits}" if fits > 1 else f"it takes {4 * arguments.world_size} rows to learn from"
        raise UserError(f"the train split of {source.name} has {rows} rows, fewer than one batch of {t.batch}{ranks}: "
                        f"{mend}.")  # fmt: skip
    passes = build_passes(settings, source)
    for one in passes:
        for objective, _ in one.objectives:
            objective.check_batch(whole, t.batch // t.accumulate, rows)
            objective.check_augment(settings.augment)
    several_groups(source, passes)
    learner, processor = (make or make_learner)(settings, passes)
    learner.to(arguments.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    states, aligned = _prepare_stems(settings, source, learner, processor)
    regions = stored_regions(settings, source)
    samples = Samples(source, "train", processor, passes, t.seed, states=states, regions=regions)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {out} cannot be made: {error.strerror}. Choose another train.out.") from None
    data = describe_data(source) | ({} if regions is None else {"regions": regions.fingerprint})
    same_data(out, data)
    if arguments.process_index == 0:  # ranks that replace a file at once take it from under each other
        settings.save(out / "config.yaml")
        write_json(out / "data.json", data)
    collate = Collate(processor, states, passes, learner.cells_to_hide(), shape_of(processor))
    if newest_complete(out / CHECKPOINTS, warn=lambda line: None) is None:  # else its heads went on from there
        _align_new_heads(settings, learner, samples, collate, bool(aligned))
        if t.heads_first:
            fit_heads(learner, samples, collate, bf16=t.bf16, seed=t.seed)
    learner.attach(whole, rows)  # a slow copy copies what the model starts as
    if t.memory:
        if t.gradient_checkpointing:
            learner.gradient_checkpointing_enable()
        micro = choose_micro_batch(out, t, learner, samples, collate)
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = micro, t.batch // micro
    trainer = VLTrainer(learner=learner, settings=settings, aligned=aligned, args=arguments, train_dataset=samples,
                        data_collator=collate, hold=hold(t, learner.device), log_file=out / LOG, progress_seconds=10)
    trainer.add_callback(CollapseAlarm(after=max(20, trainer_steps(settings, rows, whole) // 5)))
    trainer.train(resume_from_checkpoint=newest_complete(out / CHECKPOINTS) is not None)
    if trainer.stopped_by is not None:
        raise Stopped(f"stopped at step {trainer.state.global_step}; the same command resumes from {out / CHECKPOINTS}",
                      trainer.exit_code)  # fmt: skip
    learner = trainer.whole_learner()
    if trainer.is_world_process_zero():  # the other ranks are done; their results are in rank 0's model
        finish(out, settings, learner, processor, source, trainer, regions)
    return out


def _align_system(settings: Settings, source: Source, learner: Learner, processor: Processor,
                  states: States | None) -> tuple[str, ...]:  # fmt: skip
    """Regions start in the space of the words, where the pictures' features are at hand. Returns what the names of the
    parameters begin with that do."""
    rows = np.asarray(source.indices("train"))
    if (regions := stored_regions(settings, source)) is not None:
        means, places = [], []
        for place in np.linspace(0, len(rows) - 1, min(MOST, len(rows))).astype(int).tolist():
            try:
                means.append(regions.of(source.pair(int(rows[place]))).features.astype(np.float32).mean(0))
                places.append(place)
            except BadPicture:
                continue  # counted and listed once training asks for it
    elif states is not None and states.images is not None and isinstance(learner.image, GridTower | ImageTower):
        places = [n for n in range(len(rows)) if n not in states.unreadable]
        means = [states.images[n].astype(np.float32).mean((0, 1)) for n in places]
    else:
        return ()
    if not means:
        return ()
    start_features(learner, np.mean(means, 0))
    strength = align_regions(learner, np.stack(means), places, source, processor)
    if strength is None:
        return ()
    what = "cells" if isinstance(learner.image, ImageTower) else "regions"
    print(f"{what} start in the space of the words: ridge regression, strength {strength:g} by cross-validation")
    return (projection_name(learner),)  # at the rate of the rest it would lose what it starts with


def stored_regions(settings: Settings, source: Source) -> RegionSource | None:
    """The regions the settings name. Raises UserError when most of the training rows have none."""
    if not settings.data.regions:
        return None
    regions = open_regions(settings.data.regions)
    rows = np.asarray(source.indices("train"))
    seen = rows[np.linspace(0, len(rows) - 1, min(1000, len(rows))).astype(int)]  # a look-up each: not of ten millions
    lost = regions.missing(source, seen)
    if len(lost) > settings.data.max_skipped * len(seen):
        raise UserError(f"{len(lost)} of {len(seen)} training rows have no regions in {settings.data.regions} "
                        f"({', '.join(lost[:3])}, ...): run `interlace extract` on this data, to that "
                        "folder.")  # fmt: skip
    return regions


def shape_of(processor: Processor) -> tuple[int, bool]:
    """Numbers per box, and whether the whole picture comes first, of stored regions."""
    return processor.regions.get("boxes", 4), processor.regions.get("whole", False)


ALIGNED = ("text.project.", "image.project.", "heads.contrast.")  # what `align_stems` leaves in its place


def _prepare_stems(settings: Settings, source: Source, learner: Learner,
                   processor: Processor) -> tuple[States | None, tuple[str, ...]]:  # fmt: skip
    """What frozen towers say, and the names that parameters begin with which now start aligned over them."""
    states = frozen_states(learner, processor, source, "train", settings.data.views, settings.data.keep_states_gb * 1e9)
    if not settings.model.align or settings.model.start:
        return states, ()
    if settings.model.system:
        aligned = _align_system(settings, source, learner, processor, states)
        start_frequencies(learner, source, processor)
        return states, aligned
    if states is None:
        return states, ()
    strength = align_stems(learner, states, source, processor)
    if strength is None:
        print("stems start unaligned: both towers must be frozen, over at least 20 groups of captions")
    else:
        by = "word by cell" if settings.model.places else "by cross-validation"
        print(f"stems start aligned: ridge regression, strength {strength:g}, {by}")
    return states, () if strength is None else ALIGNED


def _align_new_heads(settings: Settings, learner: Learner, samples: Samples, collate: Collate,
                     stems: bool) -> None:  # fmt: skip
    """The contrast head, where it did not come with the run that is gone on from: a system's, or over aligned `stems`.
    A system's learns at the rate of all that is new, not at that of aligned stems: the layers under it move. And a
    match head of products, with its poolers, of a system that begins here."""
    if settings.model.align and settings.model.system and not settings.model.start:
        right = align_product(learner, samples, collate)
        if right is not None:
            print(f"match starts aligned: of training pairs that it was not fitted on, but the map of the cells was, "
                  f"{100 * right:.1f}% told right")  # fmt: skip
    new = "heads.contrast" in learner.anew if settings.model.start else bool(settings.model.system) or stems
    if not (settings.model.align and new and "contrast" in learner.heads):
        return
    chosen = align_contrast(learner, samples, collate)
    if chosen is not None:
        image, text, power = chosen
        print(f"contrast starts aligned: canonical correlations to the power {power}, ridges {image:g} (image) and "
              f"{text:g} (text), by cross-validation")  # fmt: skip


def make_learner(settings: Settings, passes: list[Pass]) -> tuple[Learner, Processor]:
    """The composed model, or the published system at the size of its parts, ready to learn: towers loaded, and frozen
    where their learning rate is 0."""
    objectives = [o for one in passes for o, _ in one.objectives]
    what = settings.model
    build = build_from_run if what.start else build_system if what.system else compose
    stored = open_regions(settings.data.regions) if settings.data.regions else None
    if stored is not None and build is compose:
        raise UserError("data.regions are for systems that read regions: name one as model.system (interlace list).")
    more = {} if build is compose else {"regions": stored}
    model, processor = build(what, objectives, settings.augment, Learner, **more)  # type: ignore[operator]
    assert isinstance(model, Learner)
    frozen = [s for s, rate in (("text", settings.train.text_lr), ("image", settings.train.image_lr)) if rate == 0]
    model.freeze(*[s for s in frozen if hasattr(getattr(model, s), "tower")])
    model.freeze_named(settings.train.freeze)
    return model.learn_by(passes), processor


def list_of_all_ranks(settings: Settings) -> dict[str, str]:
    """Pictures that could not be read, row -> reason, in one file from here on."""
    whole = skipped_file(settings)
    files = sorted(whole.parent.glob("skipped*.jsonl"))
    skipped = read_skipped(files)
    if skipped:
        write_skipped(whole, skipped)
    for file in files:
        if file != whole:
            file.unlink()
    return skipped


def trainer_steps(settings: Settings, rows: int, whole: int) -> int:
    """Optimiser steps of a run over so many rows, `whole` of them in a step of all ranks."""
    t = settings.train
    return t.steps or math.ceil(t.epochs * (rows // whole or 1))


def training_arguments(settings: Settings, out: Path) -> TrainingArguments:
    t = settings.train
    micro = t.batch // t.accumulate
    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=t.accumulate,
        num_train_epochs=t.epochs,
        max_steps=t.steps or -1,
        learning_rate=t.lr,
        lr_scheduler_type=SCHEDULES[t.schedule],
        warmup_steps=t.warmup if t.warmup < 1 else int(t.warmup),  # below 1: a share of all steps
        max_grad_norm=t.clip,
        seed=t.seed,
        bf16=t.bf16,
        use_cpu=not torch.accelerator.is_available(),  # else ranks on a machine without GPU do not find each other
        save_strategy="steps",
        save_steps=t.checkpoint_every,
        save_total_limit=2,
        logging_steps=t.log_every,
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        # a loader that lives on draws from torch's generator less often than one made anew each epoch; so that the
        # number of workers changes no weight, none lives on
        dataloader_persistent_workers=False,
        ddp_find_unused_parameters=True,  # a batch without questions leaves the answer head alone
        activation_checkpointing=t.gradient_checkpointing,
        disable_tqdm=True,
    )


def describe_data(source: Source) -> dict[str, Any]:
    return {"source": source.name, "fingerprint": source.fingerprint, "licence": source.licence,
            "rows": {split: len(source.indices(split)) for split in ("train", "val", "test")},
            "questions": {split: len(source.question_indices(split)) for split in ("train", "val", "test")},
            "columns": source.columns, "example_questions": example_questions(source)}  # fmt: skip


def example_questions(source: Source, most: int = 12) -> list[str]:
    """The most frequent wording of each kind of question, for a person who does not know what to ask."""
    asked: dict[str, Counter[str]] = {}
    for index in source.question_indices("train")[:20_000]:
        question = source.question(int(index))
        asked.setdefault(question.kind, Counter())[question.question] += 1
    return [wordings.most_common(1)[0][0] for wordings in sorted(asked.values(), key=lambda w: -w.total())[:most]]


def train_seconds(log: Path) -> float:
    """Seconds of training over all resumes: the gaps between the log's lines, but not those while the run was down."""
    from interlace.card import read_log

    entries = read_log(log)
    return sum(b["time"] - a["time"] for a, b in pairwise(entries) if b.get("event") != "resumed")


def _system_of(start: str) -> str:
    """The system of the run that this one went on from."""
    return json.loads((Path(start).expanduser() / MARK).read_text()).get("system", "") if start else ""


def finish(out: Path, settings: Settings, learner: Learner, processor: Processor, source: Source,
           trainer: VLTrainer, stored: RegionSource | None = None) -> None:  # fmt: skip
    """Weights, answers, metrics, plot and card; the completion mark comes last. `stored`: regions it was trained on,
    and is scored on."""
    import shutil

    from interlace.card import model_card, plot_losses
    from interlace.evaluate import evaluate, fit_match, fit_match_weight, fit_temperature

    answers: list[str] = next((o.answers for o, _ in learner.objectives if o.name in WITH_ANSWERS), [])  # type: ignore
    skipped = list_of_all_ranks(settings)
    facts = {"name": out.name, "system": settings.model.system or _system_of(settings.model.start),
             "steps": trainer.state.global_step, "train_seconds": train_seconds(out / LOG),
             "parameters": sum(p.numel() for p in learner.parameters()),
             "trained": sum(p.numel() for p in learner.parameters() if p.requires_grad),
             "skipped": len(skipped), "data": source.name, "data_fingerprint": source.fingerprint}  # fmt: skip
    if skipped:
        print(f"{len(skipped)} pictures could not be read and were skipped: {skipped_file(settings)}")
    plot_losses(out / LOG, out / "loss.png")
    run = Run(out, learner, processor, answers, 1.0, {"fingerprint": "", **facts})
    if stored is not None:
        run.use_regions(stored)
    try:
        if answers and len(source.question_indices("val")):
            run.temperature = fit_temperature(run, source)
        if run.can_match and len(source.indices("val")):
            fitted = fit_match(run, source)
            facts |= fitted
            run.facts |= fitted
        if run.can_match and run.dim and len(source.indices("val")) > 1:
            run.facts["match_weight"] = facts["match_weight"] = fit_match_weight(run, source)
        if settings.train.evaluate:
            metrics = evaluate(run, source, "val")
            write_json(out / "metrics.json", metrics)
    except UserError as error:  # nothing of the validation split can be read; what was learnt is kept all the same
        print(f"not scored: {error}")
    (out / "README.md").write_text(model_card(out, settings, learner, facts))
    save_run(out, learner, processor, answers, run.temperature, **facts)
    if not settings.train.keep_checkpoints:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
