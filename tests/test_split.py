"""Weights split over ranks by accelerate's FSDP2: saved, resumed, and those of one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from interlace.model import VLModel
from interlace.run import Run
from interlace.train import train
from tests.conftest import toy_settings
from tests.objectives.ranks import without_dropout

ROOT = Path(__file__).parents[1]
STEPS, EVERY, DIES_IN = 6, 2, 4


def made(shapes, text_tower, out):
    """Objectives that look at a batch before its forward, keep a slow copy and a queue, and read others' pictures; an
    optimiser that is smooth in the gradient, as in test_ranks."""
    settings = toy_settings(shapes, text_tower, out, steps=STEPS, batch=16, accumulate=2, checkpoint_every=EVERY,
                            log_every=1, evaluate=False, eps=1e-3, keep_checkpoints=True)  # fmt: skip
    settings.objectives = {"itc_momentum": {"size": 16, "queue": 64, "ramp": 0.0}, "vqa": {"questions": 2},
                           "itm": {"negatives": "hard", "among": "batch", "alike": "momentum"}}  # fmt: skip
    return settings


@pytest.fixture(scope="module")
def launch(shapes, text_tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    settings = made(shapes, text_tower, Path("unused"))
    settings.train.batch //= 2  # a rank's
    settings.save(folder / "config.yaml")

    def run(out: Path, kind: str, *more: str) -> subprocess.CompletedProcess:
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1,
                  "num_processes": 2, "use_cpu": True, "mixed_precision": "no", "main_process_port": 0,
                  "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True,
                                  "fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_state_dict_type": kind}}  # fmt: skip
        (folder / "fsdp.yaml").write_text(yaml.safe_dump(config))
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml"),
             "-m", "tests.split", str(folder / "config.yaml"), str(out), *more],
            capture_output=True, text=True, timeout=300, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip

    return run


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = launch(out, "SHARDED_STATE_DICT")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_split_run_that_died_goes_on_to_the_same_weights_bit_for_bit(kind, launch, whole, tmp_path):
    out = tmp_path / "run"
    died = launch(out, kind, str(DIES_IN))
    assert died.returncode != 0 and not (out / "run.json").exists(), died.stderr[-3000:]
    assert (out / f"checkpoints/checkpoint-{EVERY}/COMPLETE").is_file()
    done = launch(out, kind)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, got = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert steps(out)[-STEPS + EVERY :] == list(range(EVERY + 1, STEPS + 1))


def test_the_weights_are_those_of_one_process_and_the_run_is_like_any(whole, shapes, text_tower, tmp_path):
    alone = train(made(shapes, text_tower, tmp_path / "alone"), make=without_dropout)
    expected, got = load_file(alone / "model.safetensors"), load_file(whole / "model.safetensors")
    assert got.keys() == expected.keys() and steps(whole) == list(range(1, STEPS + 1))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert VLModel.from_pretrained(whole).contrast.logit_scale.ndim == 0
    assert (whole / "answers.json").is_file() and Run.load(whole).facts["trained"] == Run.load(alone).facts["trained"]
