"""Ranks and micro-batches change nothing: an optimiser step through `train` is that of one process with all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.recipes import draw_regions
from interlace.data.sources import open_source
from tests.objectives import ranks

SMALL = ["uniter-small", "visual_bert-small", "vl_bert-small", "lxmert-small", "vilbert-small", "vilt-small",
         "blip-small", "mlim-small", "vision_encoder_decoder-small", "clip-small"]  # fmt: skip
FULL = ["uniter", "vl_bert", "lxmert", "vilbert"]  # what a detector believes is guessed there alone
CASES = [*SMALL, *FULL]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(shapes, text_tower, image_tower, tmp_path_factory):
    store = draw_regions(tmp_path_factory.mktemp("regions"), open_source(shapes), regions=5, features=12, classes=7)
    return {name: {"recipe": name, "source": str(shapes), "text": str(text_tower), "image": str(image_tower),
                   "regions": str(store) if name in FULL else ""} for name in CASES}  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(cases, tmp_path_factory):
    """All cases in one launch, two micro-batches on each of two ranks."""
    out = tmp_path_factory.mktemp("ranks")
    job = out / "job.json"
    job.write_text(json.dumps({"cases": cases, "accumulate": 2, "out": str(out)}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, "-m", "tests.objectives.ranks", str(job)], capture_output=True, text=True,
                          timeout=600, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def read(file: Path):
    logged = json.loads(file.with_suffix(".json").read_text())
    return load_file(file.with_suffix(".safetensors")), logged


def losses(logged: dict, names: set[str]) -> dict[str, float]:
    """The sum, and the loss of each objective; what is logged beside them is a mean of means."""
    return {key: value for key, value in logged.items() if key == "loss" or key.split("/")[-1] in names}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process_with_all_rows(name, cases, two_ranks, tmp_path):
    ranks.step(cases[name], 1, 1, tmp_path / "one")
    ranks.step(cases[name], 1, 4, tmp_path / "four")
    expected, logged = read(tmp_path / "one")
    scored = {key for one in ranks.settings(cases[name], 1, 1, tmp_path).passes for key in one} or {"itc"}
    assert len(losses(logged, scored)) > 1 and any(key.startswith("gradient ") for key in expected)
    rough = {"wra", "wpa"} & scored  # fifty rounds of transport make more of a rounding error
    for other in (tmp_path / "four", two_ranks / name):
        got, said = read(other)
        assert losses(said, scored) == pytest.approx(losses(logged, scored), rel=2e-3 if rough else 2e-4, abs=1e-5)
        assert got.keys() == expected.keys()
        for key, want in expected.items():
            if key.startswith("gradient "):
                room = want.abs().max().item() * (1e-2 if rough else 1e-3) + 1e-6
                assert (got[key] - want).abs().max().item() < room, (other.name, key)
            else:  # AdamW's step is lr * g / (|g| + eps): an error of g is at most lr / eps times as large
                torch.testing.assert_close(got[key], want, atol=2e-5, rtol=0, msg=key)
