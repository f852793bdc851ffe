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
from interlace.objectives import Objective
from tests.objectives import ranks

SMALL = ["uniter-small", "visual_bert-small", "vl_bert-small", "lxmert-small", "vilbert-small", "vilt-small",
         "blip-small", "mlim-small", "vision_encoder_decoder-small", "clip-small"]  # fmt: skip
FULL = ["uniter", "vl_bert", "lxmert", "vilbert"]  # what a detector believes is guessed there alone
HARD = {"itm": {"negatives": "hard"}}
SLOWLY = {"itm": {"negatives": "hard", "alike": "momentum"}}
MORE = {  # what no recipe of these learns by: a system, and its passes
    "momentum": ("blip-small", [{"itc_momentum": {"queue": 16, "ramp": 0.0}, **SLOWLY}]),
    "sigmoid": ("clip-small", [{"itc_sigmoid": {"size": 8}}, HARD]),
    "hard": ("uniter-small", [{"itc": {"size": 8}}, HARD]),
    "patches": ("vilt", [{"mpp": {"mask": 0.4}}]),
    "detected": ("uniter", [{"mrc": {}}]),
    "prefix": ("uniter-small", [{"prefix_lm": {}}]),
    "prefix-decoder": ("clip-small", [{"prefix_lm": {"decoder": 2}}]),
    "vqa": ("lxmert-small", [{"vqa": {"questions": 2}}]),
    "vqa_writes": ("blip-small", [{"vqa_writes": {"answers": 2}}]),
    "dropped": ("mlim-small", [{"mdo": {}, "answers": {"rate": 1.0}}]),
    "binding": ("uniter-small", [{"binding": {"column": "colour"}}]),
}
STEPS = {"momentum": 4}  # so many fill the queue twice
REGIONS = [*FULL, "detected"]
CASES = [*SMALL, *FULL, *MORE]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(shapes, text_tower, image_tower, tmp_path_factory):
    store = draw_regions(tmp_path_factory.mktemp("regions"), open_source(shapes), regions=5, features=12, classes=7)
    made = {}
    for name in CASES:
        recipe, passes = MORE.get(name, (name, None))
        made[name] = {"recipe": recipe, "source": str(shapes), "text": str(text_tower), "image": str(image_tower),
                      "regions": str(store) if name in REGIONS else "", "steps": STEPS.get(name, 1),
                      **({"passes": passes} if passes else {})}  # fmt: skip
    return made


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
    names = (names - {"mam"}) | {"mlm"} if "mam" in names else names  # mam is mlm's loss, by its name
    return {key: value for key, value in logged.items() if key == "loss" or key.split("/")[-1] in names}


def test_no_objective_is_left_out(cases, tmp_path):
    ours = {name for name, cls in Objective.known.items() if cls.__module__.startswith("interlace.")}
    made = [ranks.settings(case, 1, 1, tmp_path) for case in cases.values()]
    assert ours == ours & {key for one in made for objectives in [*one.passes, one.objectives] for key in objectives}


# beside its loss an objective logs how often it is right, by its name; what has no right and wrong, how near it comes
NEAR = {"mrfr": "mrfr_r2", "mpp": "mpp_r2", "recon": "recon_r2", "wra": "wra_matched", "wpa": "wpa_matched",
        "region_labels": "region_objects_accuracy", "mam": "mlm_accuracy"}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process_with_all_rows(name, cases, two_ranks, tmp_path):
    ranks.step(cases[name], 1, 1, tmp_path / "one")
    ranks.step(cases[name], 1, 4, tmp_path / "four")
    expected, logged = read(tmp_path / "one")
    scored = {key for one in ranks.settings(cases[name], 1, 1, tmp_path).passes for key in one} or {"itc"}
    scored &= Objective.known.keys()
    assert len(losses(logged, scored)) > 1 and max(
        x.abs().max().item() for key, x in expected.items() if key.startswith("gradient ")) > 1e-3
    names = {key.split("/")[-1] for key in logged}
    for key in scored - {"mdo"}:  # which hides, and scores nothing
        assert {"mlm" if key == "mam" else key, NEAR.get(key, f"{key}_accuracy")} <= names
    rough = {"wra", "wpa"} & scored  # fifty rounds of transport make more of a rounding error
    for other in (tmp_path / "four", two_ranks / name):
        got, said = read(other)
        assert losses(said, scored) == pytest.approx(losses(logged, scored), rel=2e-3 if rough else 2e-4, abs=1e-5)
        assert got.keys() == expected.keys()
        for key, want in expected.items():
            if key.startswith("gradient "):
                room = want.abs().max().item() * (1e-2 if rough else 1e-3) + 1e-6
                assert (got[key] - want).abs().max().item() < room, (other.name, key)
            elif key.startswith("beside "):
                torch.testing.assert_close(got[key], want, atol=1e-4, rtol=0, msg=key)
            else:  # AdamW's step is lr * g / (|g| + eps): an error of g is at most lr / eps times as large
                torch.testing.assert_close(got[key], want, atol=2e-5, rtol=0, msg=key)
