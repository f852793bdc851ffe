"""The micro-batch that fits into so much memory: chosen by measuring, kept for a resumed run, without a trace."""

import json
import threading

import psutil
import pytest
import torch

from interlace import memory
from interlace.data.batches import Collate, Samples
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.memory import choose_micro_batch, largest, parse_bytes, peak, process_peak, step_peak
from interlace.train import build_passes, make_learner, train
from tests.conftest import toy_settings
from tests.objectives.ranks import without_dropout


def test_sizes_are_read_and_nonsense_is_not():
    assert parse_bytes("8GB") == 8e9 and parse_bytes(" 1.5 gib") == 1.5 * 2**30 and parse_bytes("500mb") == 5e8
    for text in ("8", "lots", "GB", "0GB", "-1GB", "1.2.3GB", "8PB"):
        with pytest.raises(UserError, match=r"train\.memory is a size such as 8GB"):
            parse_bytes(text)


@pytest.mark.parametrize("measure", [lambda n: 10 * n, lambda n: 100 + 10 * n, lambda n: max(100, 5 * n)])
@pytest.mark.parametrize("room", [15, 130, 200, 500, 10**6])
def test_the_largest_divisor_that_fits_is_found_without_trying_more_than_fits(measure, room):
    tried = []

    def told(rows):
        tried.append(rows)
        return measure(rows)

    if measure(2) > room:
        with pytest.raises(UserError, match=r"train\.memory leaves .* and one of 2 rows takes"):
            largest(96, room, told)
        return
    rows, took = largest(96, room, told)
    assert 96 % rows == 0 and took == measure(rows) <= room
    assert all(measure(n) <= room for n in tried) and tried == sorted(tried)
    more = [n for n in range(rows + 1, 97) if 96 % n == 0]
    assert not more or took * more[0] / rows > room  # as much a row, and it would not fit
    if measure(96) == 960:
        assert rows == max(n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96) if 10 * n <= room or n == 2)


def test_after_a_surprise_smaller_ones_are_tried():
    assert largest(96, 1000, lambda n: 10 * n if n < 48 else 10**6) == (32, 320)
    assert largest(7, 1000, lambda n: 10 * n) == (7, 70) and largest(1, 1000, lambda n: 10 * n) == (1, 10)


def test_memory_that_is_no_tensor_counts_in_a_process(monkeypatch):
    looked, look = threading.Semaphore(0), psutil.Process.memory_info

    def told(process):
        found = look(process)
        looked.release()
        return found

    def work():
        kept = bytearray(64_000_000)
        for at in range(0, len(kept), 4096):
            kept[at] = 1
        while looked.acquire(blocking=False):
            pass
        assert all(looked.acquire(timeout=60) for _ in range(2))  # held until a look has begun and ended meanwhile

    before = memory.in_use(torch.device("cpu"))
    assert peak(lambda: bytearray(64_000_000), torch.device("cpu")) == 0
    monkeypatch.setattr(psutil.Process, "memory_info", told)
    assert process_peak(work) > before + 50e6


def test_the_peak_is_what_was_held_at_once():
    def work():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first, second
        torch.zeros(500, 1000)

    assert peak(work, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


@pytest.fixture(scope="module")
def made(shapes, text_tower, tmp_path_factory):
    settings = toy_settings(shapes, text_tower, tmp_path_factory.mktemp("memory") / "run", batch=48)
    settings.objectives = {"itc_momentum": {"size": 32, "queue": 48}, "itm": {"negatives": "hard", "among": "batch"}}
    settings.model.dropout = 0.1
    source = open_source(shapes)
    passes = build_passes(settings, source)
    learner, processor = make_learner(settings, passes)
    learner.attach(48, 144)
    return settings, learner, Samples(source, "train", processor, passes, 0), Collate(processor, passes=passes)


def test_more_rows_take_more_and_measuring_leaves_no_trace(made):
    _, learner, samples, collate = made
    before = {n: x.clone() for n, x in [*learner.state_dict().items(), *learner.beside_tensors().items()]}
    random = torch.get_rng_state()
    few, many = (step_peak(learner, samples, collate, rows) for rows in (4, 16))
    assert 2 < many / few < 5
    assert torch.get_rng_state().equal(random) and all(p.grad is None for p in learner.parameters())
    assert all(x.equal(before[n]) for n, x in [*learner.state_dict().items(), *learner.beside_tensors().items()])


def test_the_choice_is_made_once_and_found_again(made, tmp_path, monkeypatch, capsys):
    settings, learner, samples, collate = made
    monkeypatch.setattr(memory, "in_use", lambda device: 0)
    needs = {rows: step_peak(learner, samples, collate, rows) for rows in (12, 24)}
    fixed = 3 * sum(p.nbytes for p in learner.parameters()) + 4 * 8 * (48 * 32 + 48**2) + 48 * 3 * 48 * 48
    settings.train.memory = f"{(fixed + 1.1 * (needs[12] + needs[24]) / 2) / 1e6}MB"
    (tmp_path / "tight").mkdir()
    rows = choose_micro_batch(tmp_path / "tight", settings.train, learner, samples, collate)
    assert rows in (12, 16) and f"micro-batches of {rows} rows, {48 // rows} in a step" in capsys.readouterr().out
    assert json.loads((tmp_path / "tight" / memory.CHOSEN).read_text())["rows"] == rows
    monkeypatch.setattr(memory, "step_peak", None)  # it may not be measured again
    assert choose_micro_batch(tmp_path / "tight", settings.train, learner, samples, collate) == rows


def test_a_run_within_little_memory_learns_in_micro_batches(shapes, text_tower, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "in_use", lambda device: 0)
    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=2, batch=48, evaluate=False, log_every=1,
                            memory="5MB")  # fmt: skip
    settings.objectives = {"itc": {"size": 32}}
    train(settings, make=without_dropout)
    chosen = json.loads((tmp_path / "run" / memory.CHOSEN).read_text())
    assert 2 <= chosen["rows"] < 48 and chosen["bytes"] <= 5e6
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["itc_chance"] == pytest.approx(3.8712, abs=1e-3)  # ln 48
    settings.train.memory, settings.train.out = "", str(tmp_path / "whole")
    train(settings, make=without_dropout)
    whole = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    for name in ("loss", "itc", "itc_accuracy", "grad_norm"):  # all rows at once: the same step
        assert first[name] == pytest.approx(whole[name], rel=1e-4), name


def test_settings_of_memory_that_cannot_work_are_explained(shapes, text_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run", memory="8GB", accumulate=2)
    with pytest.raises(UserError, match=r"train\.memory chooses the micro-batches that train\.accumulate=2 fixes"):
        train(settings)
    settings = toy_settings(shapes, text_tower, tmp_path / "run", memory="1MB")
    with pytest.raises(UserError, match=r"train\.memory leaves 0 MB for a micro-batch"):
        train(settings)
    # nothing was learned yet, so the advice can be followed in the same folder
    assert (tmp_path / "run" / "config.yaml").is_file()
    again = toy_settings(shapes, text_tower, tmp_path / "run", memory="64GB", steps=2, evaluate=False, log_every=1)
    assert (train(again) / "model.safetensors").is_file()
    again.train.memory = "65GB"
    with pytest.raises(UserError, match=r"holds a run with other settings \(train\.memory was '64GB', is '65GB'\)"):
        train(again)
