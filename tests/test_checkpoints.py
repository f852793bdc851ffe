"""Real runs of a tiny model in processes of their own, really killed, stopped, starved of disk and spread over ranks.

The processes are forked from a server that has imported torch once, for importing takes longer than training."""

import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from interlace.checkpoints import (
    MARK,
    SafeTrainer,
    checkpoints_in,
    disk_refused,
    missing_from,
    newest_complete,
    publish,
    rotate,
)
from interlace.errors import UserError
from interlace.progress import Progress

STEPS, EVERY = 40, 10  # 18 steps an epoch: checkpoints lie inside epochs, at 18 and 36 the data starts anew


class TinyConfig(PreTrainedConfig):
    model_type = "tiny-for-checkpoints"


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config, dropout=0.2):
        super().__init__(config)
        self.body = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.post_init()

    def forward(self, x, y, **kwargs):
        square = (self.body(x) - y).square().mean()
        size = sum(parameter.square().mean() for parameter in self.parameters())
        return {"loss": square + 0.01 * size, "losses": {"square": square, "size": size}}


class Rows(torch.utils.data.Dataset):
    """Noise seeded by (row): what augmentation must look like for a resume to be exact."""

    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 144

    def __getitem__(self, i):
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        return {"ids": f"row-{i}", "x": x * float("nan") if i == self.bad else x, "y": x.roll(1) * 2}


def collate(rows):
    return {"ids": [row["ids"] for row in rows], "x": torch.stack([row["x"] for row in rows]),
            "y": torch.stack([row["y"] for row in rows])}


def trainer_for(folder, workers=0, steps=STEPS, kind=SafeTrainer, dropout=0.2, bad=None, callbacks=(), **arguments):
    torch.manual_seed(7)
    model = Tiny(TinyConfig(), dropout)
    settings = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 2,
                "logging_steps": 5, "learning_rate": 1e-2, "seed": 3, "remove_unused_columns": False, "use_cpu": True,
                "report_to": "none", "dataloader_drop_last": True, **arguments}
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, dataloader_num_workers=workers, **settings)
    return kind(model=model, args=args, train_dataset=Rows(bad), data_collator=collate, callbacks=list(callbacks))


def digest(model) -> str:
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- the program that is put to test

class At(TrainerCallback):
    """Do something at the beginning of a step (the step'th one, counted from 1)."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.act()


class DiesWhileSaving(SafeTrainer):
    """Killed at step 20 with half of the checkpoint written."""

    def _save_rng_state(self, output_dir):
        if self.state.global_step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def program(folder, act, workers, environment):
    """The training program: runs in a child process, ends with the exit code the command line would have."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # data workers as in any program, not from a second server
    os.environ.update(environment)
    torch.set_num_threads(1)
    output = os.open(f"{folder}.{environment.get('RANK', 0)}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest's own would not follow
    kind, callbacks, arguments = SafeTrainer, [], {}
    if act == "kill":
        callbacks = [At(33, lambda: os.kill(os.getpid(), signal.SIGKILL))]
    elif act == "kill-while-saving":
        kind = DiesWhileSaving
    elif act == "terminate-group":  # what a job scheduler does: the workers get it too
        callbacks = [At(13, lambda: os.killpg(0, signal.SIGTERM))]
    elif act == "interrupt":
        callbacks = [At(13, lambda: os.kill(os.getpid(), signal.SIGINT))]
    elif act.startswith("full"):  # from step 15 no file may grow beyond 1500 bytes
        callbacks = [At(15, lambda: limit_file_size(1500))]
        if act == "full-then-free":
            callbacks.append(At(35, lambda: limit_file_size(resource.RLIM_INFINITY)))
        else:
            callbacks.append(At(23, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    elif act == "ranks":
        arguments = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "dropout": 0}
        if environment["RANK"] == "1":  # only one rank gets the signal; both have to stop at the same step
            callbacks = [At(13, lambda: os.kill(os.getpid(), signal.SIGTERM))]
    trainer = trainer_for(folder, workers, kind=kind, callbacks=callbacks, **arguments)
    try:
        trainer.train(resume_from_checkpoint=True)
    except UserError as error:
        sys.exit(f"UserError: {error}")
    sys.exit(trainer.exit_code)


def run(folder, act, workers=0, ranks=1):
    """Exit codes and what was printed, of all ranks."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["interlace.checkpoints", "accelerate", "pytest"])
    environments = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                         "MASTER_ADDR": "127.0.0.1"} for rank in range(ranks)]
    processes = [server.Process(target=program, args=(folder, act, workers, each)) for each in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    printed = "".join(Path(f"{folder}.{rank}.txt").read_text(errors="replace") for rank in range(ranks))
    return [process.exitcode for process in processes], printed


# ----------------------------------------------------------------------------------------------------- resuming exactly

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return SimpleNamespace(digest=digest(trainer.model), log=log_of(trainer.folder), folder=trainer.folder)


def losses(log):
    return [(line["step"], line["loss"], line["square"]) for line in log if "loss" in line]


@pytest.mark.parametrize("act, workers, at", [("kill", 0, 30), ("kill", 2, 30), ("kill-while-saving", 0, 10)])
def test_a_killed_run_resumes_bit_for_bit(act, workers, at, tmp_path, uninterrupted):
    codes, _ = run(tmp_path, act, workers)
    assert codes == [-signal.SIGKILL]
    assert newest_complete(tmp_path) == tmp_path / f"checkpoint-{at}"
    if act == "kill-while-saving":
        assert (tmp_path / ".saving-20" / "optimizer.pt").is_file()
    trainer = trainer_for(tmp_path, workers)
    trainer.train(resume_from_checkpoint=True)
    assert digest(trainer.model) == uninterrupted.digest
    assert not list(tmp_path.glob(".saving-*"))
    resumed = log_of(tmp_path)
    assert losses(resumed) == losses(uninterrupted.log)
    event = next(line for line in resumed if line.get("event") == "resumed")
    assert event["step"] == at and event["dropped"] == (0 if act == "kill" else 2)


@pytest.mark.parametrize("act, workers, code", [("terminate-group", 2, 143), ("interrupt", 0, 130)])
def test_a_stopped_run_checkpoints_at_the_next_step_and_resumes_exactly(act, workers, code, tmp_path, uninterrupted):
    codes, printed = run(tmp_path, act, workers)
    assert codes == [code], printed
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-13"
    assert "after step 13 of 40" in printed and "checkpoint-13" in printed
    trainer = trainer_for(tmp_path, workers)
    trainer.train(resume_from_checkpoint=True)
    assert digest(trainer.model) == uninterrupted.digest
    assert trainer.exit_code == 0


def test_resuming_where_an_epoch_begins_is_exact(tmp_path, uninterrupted):
    first = trainer_for(tmp_path, save_steps=18)
    first.train()
    for checkpoint in checkpoints_in(tmp_path):
        if checkpoint.name != "checkpoint-18":
            (checkpoint / MARK).unlink()
    trainer = trainer_for(tmp_path, save_steps=18)
    trainer.train(resume_from_checkpoint=True)
    assert digest(trainer.model) == uninterrupted.digest


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted, capsys):
    first = trainer_for(tmp_path)
    first.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-40", "checkpoint-30"]
    optimizer = tmp_path / "checkpoint-40" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    with pytest.raises(UserError, match=r"optimizer\.pt has 100 bytes.*beside it: checkpoint-30"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    trainer = trainer_for(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "ignoring" in capsys.readouterr().err
    assert digest(trainer.model) == uninterrupted.digest
    assert missing_from(tmp_path / "checkpoint-40") is None  # the damaged one was replaced
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_a_run_is_not_begun_again_by_accident(uninterrupted):
    with pytest.raises(UserError, match=r"already holds a run, up to checkpoint-40"):
        trainer_for(uninterrupted.folder).train()


def test_resuming_with_another_batch_says_so(tmp_path, capsys):
    trainer_for(tmp_path, steps=10).train()
    trainer_for(tmp_path, steps=11, per_device_train_batch_size=4).train(resume_from_checkpoint=True)
    assert "batch size 8, now it is 4" in capsys.readouterr().err


def test_checkpoints_hold_no_pickled_arguments(uninterrupted):
    files = {path.name for path in (uninterrupted.folder / "checkpoint-40").iterdir()}
    assert {MARK, "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files
    assert "training_args.bin" not in files


# ------------------------------------------------------------------------------------------------------------ full disk

def test_a_full_disk_keeps_the_older_checkpoint_and_the_run_goes_on(tmp_path, uninterrupted):
    codes, printed = run(tmp_path, "full-then-free")
    assert codes == [0], printed
    for step in (20, 30):
        assert f"The checkpoint at step {step} could not be written" in printed
    assert "The newest complete one is checkpoint-10" in printed
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-40", "checkpoint-10"]
    assert newest_complete(tmp_path).name == "checkpoint-40"
    assert not list(tmp_path.glob(".saving-*"))
    trainer = trainer_for(tmp_path)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-40"))
    assert digest(trainer.model) == uninterrupted.digest  # failing to save changed nothing


def test_a_full_disk_when_stopping_is_an_error(tmp_path):
    codes, printed = run(tmp_path, "full-and-stopped")
    assert codes == [1]
    assert "UserError: The checkpoint at step 23 could not be written" in printed
    assert newest_complete(tmp_path).name == "checkpoint-10"
    assert not list(tmp_path.glob(".saving-*"))


def test_mistakes_are_not_taken_for_a_full_disk():
    assert disk_refused(OSError(28, "No space left on device"))
    assert not disk_refused(OSError(2, "No such file"))
    assert not disk_refused(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# -------------------------------------------------------------------------------------------------------- same gradient

def first_gradient(folder, **arguments):
    """Loss as logged, and the gradient the optimiser would have used, for the first 8 rows."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({name: value.grad.clone() for name, value in model.named_parameters()})

    trainer = trainer_for(folder, steps=1, dropout=0, callbacks=[Look()], logging_steps=1, max_grad_norm=0,
                          save_strategy="no", **arguments)
    trainer.train()
    return next(line for line in log_of(folder) if "loss" in line), seen


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path):
    whole, gradient = first_gradient(tmp_path / "whole")
    parts, accumulated = first_gradient(tmp_path / "parts", per_device_train_batch_size=4,
                                        gradient_accumulation_steps=2)
    assert all(whole[name] == pytest.approx(parts[name], rel=1e-6) for name in ("loss", "square", "size"))
    for name, value in gradient.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-5, atol=1e-7)


def test_two_ranks_learn_what_one_does_and_stop_together(tmp_path):
    codes, printed = run(tmp_path / "two", "ranks", ranks=2)
    assert codes == [143, 143], printed
    assert newest_complete(tmp_path / "two") == tmp_path / "two" / "checkpoint-13"
    names = {path.name for path in (tmp_path / "two" / "checkpoint-13").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
    one = trainer_for(tmp_path / "one", dropout=0, callbacks=[At(13, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    one.train()
    assert one.exit_code == 143 and one.state.global_step == 13
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in {"loss", "square", "size", "grad_norm"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5), (ours, theirs)
    two = trainer_for(tmp_path / "unused")
    two._load_from_checkpoint(str(tmp_path / "two" / "checkpoint-13"))
    for (name, value), other in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------ loss not finite

def test_a_bad_row_stops_the_run_before_the_weights_and_is_named(tmp_path):
    trainer = trainer_for(tmp_path, bad=77, save_steps=1)
    with pytest.raises(UserError, match=r"The loss of step \d+ is not a finite number \(square nan"):
        trainer.train()
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    assert "row-77" in report["ids"] and len(report["ids"]) == 8
    assert report["what"] == "loss" and report["step"] == trainer.state.global_step + 1
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert newest_complete(tmp_path).name == f"checkpoint-{trainer.state.global_step}"


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(clip, tmp_path):
    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.body[0].weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = trainer_for(tmp_path, callbacks=[Explode()], max_grad_norm=clip)
    with pytest.raises(UserError, match="The gradient of step 3 is not a finite"):
        trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert len(json.loads((tmp_path / "bad_batch.json").read_text())["ids"]) == 8


# --------------------------------------------------------------------------------------------------- marks and rotation

def fake(folder, step, size=10):
    scratch = folder / f".saving-{step}"
    (scratch / "sub").mkdir(parents=True)
    (scratch / "weights").write_bytes(b"x" * size)
    (scratch / "sub" / "more").write_bytes(b"y")
    publish(scratch, folder / f"checkpoint-{step}", step=step)
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize("harm, reason", [
    (lambda path: (path / "weights").write_bytes(b"xx"), "weights has 2 bytes instead of 10"),
    (lambda path: (path / "sub" / "more").unlink(), "sub/more is missing"),
    (lambda path: (path / MARK).unlink(), "no COMPLETE mark"),
    (lambda path: (path / MARK).write_text('{"files": {"weig'), "unreadable"),
])
def test_every_kind_of_damage_is_seen(harm, reason, tmp_path):
    older, newer = fake(tmp_path, 9), fake(tmp_path, 10)
    assert newest_complete(tmp_path) == newer  # by number, not by name
    harm(newer)
    warnings = []
    assert newest_complete(tmp_path, warn=warnings.append) == older
    assert len(warnings) == 1 and reason in warnings[0]


def test_no_checkpoint_at_all(tmp_path):
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "nowhere") is None


def test_publishing_replaces_what_lay_there(tmp_path):
    fake(tmp_path, 3, size=5)
    assert (fake(tmp_path, 3, size=6) / "weights").stat().st_size == 6
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_rotation_keeps_the_newest_the_best_and_the_incomplete(tmp_path):
    for step in (10, 20, 30, 40, 50):
        fake(tmp_path, step)
    (tmp_path / "checkpoint-50" / MARK).unlink()
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-20"))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-50", "checkpoint-40", "checkpoint-20"]
    rotate(tmp_path, None)
    assert len(checkpoints_in(tmp_path)) == 3


# ------------------------------------------------------------------------------------------------------ log, progress

def test_the_log_names_the_losses(uninterrupted):
    first = uninterrupted.log[0]
    assert {"step", "epoch", "time", "loss", "square", "size", "grad_norm", "learning_rate"} <= first.keys()
    assert first["loss"] == pytest.approx(first["square"] + 0.01 * first["size"], rel=1e-3)
    assert [line["step"] for line in uninterrupted.log if "loss" in line] == list(range(5, STEPS + 1, 5))


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    trainer_for(tmp_path, steps=10).train()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    trainer_for(tmp_path, steps=11, logging_steps=1).train(resume_from_checkpoint=True)
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps == sorted(steps) and steps[-1] == 11


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_now_and_then_without_a_terminal():
    now = [100.0]
    out = io.StringIO()
    progress = Progress(seconds=30, clock=lambda: now[0], stream=out)
    state = SimpleNamespace(global_step=50, max_steps=200, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, {"loss": 1.7234, "itm": 0.5, "grad_norm": 9.0, "epoch": 1.0})
    for _ in range(50):
        now[0] += 2
        state.global_step += 1
        progress.on_step_end(None, state, None)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # after 30, 60 and 90 of 100 seconds
    assert lines[-1] == "step 95/200 (48%), 0.50 steps/s, 0:03:30 left, loss 1.723 itm 0.5"


def test_progress_is_a_bar_on_a_terminal():
    out = Terminal()
    progress = Progress(stream=out)
    state = SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, {"loss": 1.5})
    for state.global_step in (1, 2, 3, 4):
        progress.on_step_end(None, state, None)
    progress.on_train_end(None, state, None)
    assert "4/4" in out.getvalue() and "loss 1.5" in out.getvalue()
