"""Training processes that die: what they had acknowledged is there, and going on gives the same weights bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from interlace.settings import load_settings
from interlace.trainer import BESIDE

STEPS, EVERY = 24, 8


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "interlace.cli", "train", str(config), f"train.out={out}", *more]


@pytest.fixture(scope="module")
def config(shapes, text_tower, tmp_path_factory) -> Path:
    from tests.conftest import toy_settings

    settings = toy_settings(shapes, text_tower, Path("unused"), steps=STEPS, checkpoint_every=EVERY, log_every=1,
                            evaluate=False, batch=16)  # fmt: skip
    settings.model.dropout = 0.1  # random numbers of the model must come back too
    settings.train.heads_first = True  # heads that learnt alone do not do so again
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    settings.save(file)
    return file


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(config, out), check=True, capture_output=True, env=ENVIRONMENT)
    return load_file(out / "model.safetensors")


def steps_logged(out: Path) -> int:
    file = out / "log.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def run_until(config: Path, out: Path, step: int, number: int, *more: str) -> int:
    process = subprocess.Popen(command(config, out, *more), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 240
    while steps_logged(out) < step:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)  # it should not end here
        if process.returncode is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended before step {step}: {process.communicate()[1].decode()[-2000:]}")
    process.send_signal(number)
    process.communicate()
    return process.returncode


def equal(out: Path, expected: dict) -> None:
    got = load_file(out / "model.safetensors")
    assert got.keys() == expected.keys()
    different = [name for name in expected if not (got[name] == expected[name]).all()]
    assert not different


@pytest.mark.parametrize("number,code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_died_goes_on_to_the_same_weights_bit_for_bit(number, code, config, uninterrupted, tmp_path):
    out = tmp_path / "run"
    assert run_until(config, out, EVERY + 4, number) == code
    assert not (out / "run.json").exists()
    subprocess.run(command(config, out), check=True, capture_output=True, env=ENVIRONMENT)
    equal(out, uninterrupted)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, STEPS + 1))  # every step once, none lost and none twice


def test_ctrl_c_ends_with_its_own_status(config, tmp_path):
    assert run_until(config, tmp_path / "run", 3, signal.SIGINT) == 130
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/COMPLETE"))


def test_loader_processes_change_nothing(config, uninterrupted, tmp_path):
    with_workers = command(config, tmp_path / "run", "data.workers=2")
    subprocess.run(with_workers, check=True, capture_output=True, env=ENVIRONMENT)
    equal(tmp_path / "run", uninterrupted)


def test_the_resolved_config_runs_again(config, tmp_path):
    assert load_settings(config, ["train.lr=1e-3"]).train.lr == 1e-3


def test_frozen_towers_are_kept_and_resumed_bit_for_bit(shapes, text_tower, tmp_path_factory, monkeypatch, tmp_path):
    """The run reads what its frozen text tower said from a store; killed and resumed it reads the same numbers, and
    without the store the weights agree up to the store's half precision."""
    from tests.conftest import toy_settings

    settings = toy_settings(shapes, text_tower, Path("unused"), steps=STEPS, checkpoint_every=EVERY, log_every=1,
                            evaluate=False, batch=16, text_lr=0.0)  # fmt: skip
    file = tmp_path_factory.mktemp("frozen") / "config.yaml"
    settings.save(file)
    monkeypatch.setitem(ENVIRONMENT, "INTERLACE_CACHE", str(tmp_path / "cache"))
    subprocess.run(command(file, tmp_path / "whole"), check=True, capture_output=True, env=ENVIRONMENT)
    stores = list((tmp_path / "cache" / "states").glob("*/done.json"))
    assert len(stores) == 1
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert run_until(file, tmp_path / "run", EVERY + 4, signal.SIGKILL) == -9
    subprocess.run(command(file, tmp_path / "run"), check=True, capture_output=True, env=ENVIRONMENT)
    equal(tmp_path / "run", whole)
    without_store = command(file, tmp_path / "live", "data.keep_states_gb=0")
    subprocess.run(without_store, check=True, capture_output=True, env=ENVIRONMENT)
    live = load_file(tmp_path / "live" / "model.safetensors")
    assert all((live[n] - whole[n]).abs().max() < 0.05 for n in whole if n.startswith("text.project"))
    tower = [n for n in whole if n.startswith("text.tower.")]
    assert tower and all((live[n] == whole[n]).all() for n in tower)


def test_two_ranks_train_one_run(config, tmp_path):
    """Started by torchrun on a machine without GPU: the ranks share one run, and both end well."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, "-m", "interlace.cli", "train", str(config), f"train.out={out}", "train.batch=8"],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((out / "run.json").read_text())["steps"] == STEPS
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"itc_chance"' in line]
    # ln 16: both ranks' rows
    assert len(losses) == STEPS and losses[0]["itc_chance"] == pytest.approx(2.7726, abs=1e-3)


class Killed(BaseException):
    """Nothing in the run may catch it."""


@pytest.mark.parametrize("objectives", [
    {"itc_momentum": {"size": 32, "queue": 32, "ramp": 0.5}, "itm": {"negatives": "hard", "among": "batch"}},
    {"itc_sigmoid": {"size": 32}, "itm": {"negatives": "drawn"}},
])  # fmt: skip
def test_what_objectives_keep_beside_the_model_and_cached_gradients_resume_bit_for_bit(
    objectives, shapes, text_tower, tmp_path, monkeypatch
):
    """Dies among the micro-batches of a step, between checkpoints; and the pictures are held in one run and read again
    in the other."""
    from interlace import train as module
    from tests.conftest import toy_settings

    def settings(name):
        made = toy_settings(shapes, text_tower, tmp_path / name, steps=5, checkpoint_every=3, log_every=1, batch=16,
                            accumulate=4, evaluate=False, keep_checkpoints=True)  # fmt: skip
        made.model.dropout, made.objectives = 0.1, objectives
        return made

    module.train(settings("whole"))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    monkeypatch.setattr(module, "hold", lambda *_: 0)
    micro, step = 0, module.VLTrainer.training_step

    def dies(self, *args, **kwargs):
        nonlocal micro
        micro += 1
        if micro == 4 * 3 + 2:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(module.VLTrainer, "training_step", dies)
    with pytest.raises(Killed):
        module.train(settings("run"))
    beside = tmp_path / "run" / "checkpoints" / "checkpoint-3" / BESIDE
    assert beside.exists() == ("itc_momentum" in objectives)
    kept = load_file(beside) if beside.exists() else {}
    module.train(settings("run"))
    assert micro == 4 * 3 + 2 + 4 * 2
    equal(tmp_path / "run", whole)
    if kept:
        assert kept["0.itc_momentum.at"].item() == 3 * 16 % 32 and (kept["0.itc_momentum.group"] >= 0).all()
        assert not any("slow" in name or "queue" in name for name in whole)
