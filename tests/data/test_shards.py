"""Shards are read in place: the order is the sampler's, the index is kept, nothing is unpacked."""

import io
import json
import os
import tarfile

import pytest
from safetensors.torch import load_file

from interlace import train as module
from interlace.data.cache import cache_folder
from interlace.data.sources import open_source, webdataset
from interlace.data.sources.shard_index import ShardIndex
from interlace.errors import Stopped
from interlace.train import train
from tests.conftest import draw_shape, toy_settings


def write(file, samples):
    """samples: (key, colour, shape, variant)."""
    with tarfile.open(file, "w") as tar:
        for key, colour, shape, variant in samples:
            picture = io.BytesIO()
            draw_shape(colour, shape, variant).save(picture, "png")
            for suffix, data in (("png", picture.getvalue()), ("txt", f"a {colour} {shape}".encode()),
                                 ("json", json.dumps({"colour": colour, "n": variant}).encode())):  # fmt: skip
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    colours, shapes = ("red", "green", "blue", "black"), ("circle", "square", "bar")
    every = [(f"{n:04d}", colours[n % 4], shapes[n // 4 % 3], n // 12) for n in range(72)]
    for number in range(3):
        write(folder / f"pairs-{number:03d}.tar", every[24 * number : 24 * number + 24])
    return folder


def told(source):
    return [(p.id, p.caption, p.picture, p.attributes, p.split, p.group) for p in source.pairs()], source.fingerprint


def walking_is_an_error(monkeypatch):
    def walked(*args):
        raise AssertionError("the tar was walked again")

    monkeypatch.setattr(webdataset, "_walked", walked)


def test_shards_are_walked_once(shards, monkeypatch):
    first = told(open_source(shards))
    assert len(first[0]) == 72
    walking_is_an_error(monkeypatch)
    assert told(open_source(shards)) == first
    assert told(open_source(str(shards / "pairs-{000..002}.tar")))[0] == first[0]
    assert len(open_source(shards / "pairs-001.tar")) == 24


def test_a_shard_that_changed_is_walked_again_and_its_old_index_goes(shards):
    open_source(shards)
    write(shards / "pairs-001.tar", [("new", "red", "bar", 0)])
    assert len(open_source(shards)) == 49
    os.utime(shards / "pairs-002.tar", ns=(1, 1))
    open_source(shards)
    assert len(list((cache_folder() / "shards").iterdir())) == 3


@pytest.mark.parametrize("harm", [
    lambda file: file.write_text(""),
    lambda file: file.write_text("\n".join(file.read_text().splitlines()[:-1])),
    lambda file: file.write_text("{}\n"),
    lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()),
    lambda file: file.unlink(),
])  # fmt: skip
def test_a_damaged_index_is_made_anew(harm, shards):
    first = told(open_source(shards))
    harm(ShardIndex(shards / "pairs-001.tar").file)
    assert told(open_source(shards)) == first
    assert ShardIndex(shards / "pairs-001.tar").read() is not None


@pytest.mark.parametrize("inside", [0, 100])
def test_a_torn_shard_has_no_index_and_says_so_each_time(inside, shards):
    """Cut between two members or inside one."""
    file = shards / "pairs-002.tar"
    with tarfile.open(file) as tar:
        cut = tar.getmembers()[-6].offset
    file.write_bytes(file.read_bytes()[: cut + inside])
    for _ in range(2):
        source = open_source(shards)
        assert 48 < len(source) < 72 and "not readable to its end" in source.problems[-1][1]
    assert ShardIndex(file).read() is None


def test_what_was_wrong_is_said_again_from_the_index(shards, monkeypatch):
    with tarfile.open(shards / "pairs-003.tar", "w") as tar:
        for name, data in (("1.txt", b"no picture"), ("2.png", b"x"), ("2.json", b"{broken")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    first = open_source(shards)
    assert {why.split(":")[0] for _, why in first.problems} == {"no picture", "its .json is not readable"}
    walking_is_an_error(monkeypatch)
    assert open_source(shards).problems == first.problems


def test_a_cache_that_cannot_be_written_costs_nothing_else(shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERLACE_CACHE", str(tmp_path / "file"))
    assert len(open_source(shards)) == 72


def test_nothing_is_unpacked(shards):
    source = open_source(shards)
    assert all(p.picture.path.endswith(".tar") and p.picture.offset and p.picture.length for p in source.pairs())
    kept = [file for file in cache_folder().rglob("*") if file.is_file()]
    assert len(kept) == 3 and sum(file.stat().st_size for file in kept) < 200 * 72  # texts and places, no picture
    assert sorted(file.name for file in shards.iterdir()) == [f"pairs-{n:03d}.tar" for n in range(3)]


def test_a_run_over_shards_goes_on_bit_for_bit_whatever_the_workers(shards, text_tower, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch with two loader processes, gone on with none: the batches are those of a run
    that was never stopped."""

    def settings(name, workers):
        made = toy_settings(shards, text_tower, tmp_path / name, steps=6, batch=16, checkpoint_every=2, log_every=1,
                            evaluate=False)  # fmt: skip
        made.objectives, made.data.workers, made.model.dropout = {"itc": {"size": 16}, "itm": {}}, workers, 0.1
        return made

    seen: dict[str, list] = {}
    step, run = module.VLTrainer.training_step, ""

    def watched(self, model, inputs, *args, **kwargs):
        if run == "first" and self.state.global_step == 3:
            raise Stopped("here", 1)
        seen.setdefault(run, []).append((self.state.global_step, inputs["item"].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(module.VLTrainer, "training_step", watched)
    run = "whole"
    expected = load_file(train(settings("whole", 0)) / "model.safetensors")
    run = "first"
    with pytest.raises(Stopped):
        train(settings("run", 2))
    run = "second"
    got = load_file(train(settings("run", 0)) / "model.safetensors")
    assert [at for at, _ in seen["first"]] == [0, 1, 2] and [at for at, _ in seen["second"]] == [2, 3, 4, 5]
    assert seen["first"] == seen["whole"][:3] and seen["second"] == seen["whole"][2:]
    assert got.keys() == expected.keys() and all(got[name].equal(expected[name]) for name in expected)
