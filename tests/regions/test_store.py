"""The store: what is committed stays, what is read equals what was written, other extractors are told apart."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from interlace.errors import UserError
from interlace.regions import BadRegions, RegionStore, collate_regions, open_regions
from interlace.regions.keys import Keys
from interlace.regions.store import CHUNK, Stamp, Writer, chunk_numbers
from tests.regions.makers import full_regions, some_regions

FACTS = {"kind": "grid", "name": "here", "size": 32}
STAMP = Stamp(100, 1)


def write(folder, chunks, make=full_regions, beliefs=5):
    """chunks: lists of keys. The regions of key k are those of seed k, k + 1 of them."""
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, FACTS, 8, beliefs)
    for keys in chunks:
        for key in keys:
            writer.add([key, f"also {key}"], STAMP, make(int(key) + 1, seed=int(key)))
        assert writer.commit() == len(keys)
    return folder


def test_what_is_read_is_what_was_written(tmp_path):
    store = RegionStore.open(write(tmp_path / "store", ["012", "34"]))
    assert len(store) == 5 and store.features_size == 8 and store.beliefs_size == 5
    assert sorted(store.keys())[:2] == ["0", "1"] and "also 3" in store and "5" not in store
    for key in "40213":
        got, want = store.get(f"also {key}"), full_regions(int(key) + 1, seed=int(key))
        assert np.allclose(got.features, want.features, atol=2e-3) and got.features.dtype == np.float16
        assert np.array_equal(got.boxes, want.boxes) and np.array_equal(got.objects, want.objects)
        assert np.allclose(got.beliefs, want.beliefs, atol=1e-3)
    assert store.counts().tolist() == [1, 2, 3, 4, 5]
    assert len(RegionStore.open(tmp_path / "store", regions=2).get("4")) == 2
    batch = collate_regions([store.get("1"), store.get("3")], boxes=7)
    assert batch["region_features"].shape == (2, 4, 8) and batch["region_features"].dtype == torch.float32
    with pytest.raises(BadRegions, match="no features of 9"):
        store.get("9")


def test_a_picture_extracted_again_counts_as_it_is_now(tmp_path):
    folder = write(tmp_path / "store", ["01"])
    writer = Writer(folder, FACTS, 8, 5)
    writer.add(["0"], Stamp(7, 7), full_regions(6, seed=9))
    writer.commit()
    store = RegionStore.open(folder)
    assert len(store.get("0")) == 6 and store.stamp("0") == Stamp(7, 7) and len(store.get("1")) == 2


def test_nothing_that_was_committed_is_lost_and_nothing_else_is_there(tmp_path):
    folder = write(tmp_path / "store", ["0", "1"])
    half = (folder / CHUNK.format(1)).read_bytes()
    (folder / f"{CHUNK.format(2)}.part").write_bytes(half[: len(half) // 2])  # as a kill leaves it
    assert len(RegionStore.open(folder)) == 2
    write(folder, ["2"])
    store = RegionStore.open(folder)
    assert len(store) == 3 and len(store.get("2")) == 3 and not list(folder.glob("*.part"))
    assert chunk_numbers(folder) == [0, 1, 2]


def test_regions_that_cannot_be_used_are_not_written(tmp_path):
    writer = Writer(tmp_path, FACTS, 8, 0)
    for bad, reason in ((some_regions(features=9), "9 features"), (some_regions(0), "zero regions")):
        with pytest.raises(BadRegions, match=reason):
            writer.add(["a"], STAMP, bad)
    large = some_regions()
    large.features *= 1e6
    with pytest.raises(BadRegions, match="half precision cannot hold"):
        writer.add(["a"], STAMP, large)
    assert writer.commit() == 0 and chunk_numbers(tmp_path) == []


def test_a_damaged_chunk_is_named(tmp_path):
    folder = write(tmp_path / "store", ["0", "1"])
    file = folder / CHUNK.format(0)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"chunk-000000\.safetensors is damaged.*Delete it"):
        RegionStore.open(folder).get("1")
    file.unlink()
    store = RegionStore.open(folder)
    assert len(store) == 1 and len(store.get("1")) == 2


def test_require(tmp_path):
    store = open_regions(write(tmp_path / "store", ["0"]))
    store.require(store.fingerprint, features=8)
    with pytest.raises(UserError, match=r"another extractor than the run.*fingerprint 1234.*size 32"):
        store.require("1234")
    with pytest.raises(UserError, match=r"model reads 2048 features per region, .* has 8"):
        store.require(store.fingerprint, features=2048)


def test_stores_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="interlace extract DATA"):
        RegionStore.open(tmp_path)
    folder = write(tmp_path / "store", ["0"])
    plain = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(plain | {"version": 99}))
    with pytest.raises(UserError, match="in form 99; this one reads form 1"):
        RegionStore.open(folder)
    (folder / "store.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        RegionStore.open(folder)


class Rows(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 6

    def __getitem__(self, n):
        return self.store.get(str(n))


def test_a_loaders_workers_read_the_store(tmp_path):
    store = RegionStore.open(write(tmp_path / "store", ["012", "345"]))
    store.get("0")  # opened here already
    loader = DataLoader(Rows(store), batch_size=3, num_workers=1, collate_fn=collate_regions)
    counts = [batch["region_mask"].sum(1).tolist() for batch in loader]
    assert counts == [[1, 2, 3], [4, 5, 6]]
    again = pickle.loads(pickle.dumps(store))
    assert again._keys is None and np.array_equal(again.get("4").features, store.get("4").features)


def test_keys():
    names = ["a", "bb", "", "ü", "a", "x" * 1000]
    keys = Keys(*Keys.pack(names))
    assert list(keys) == names and len(keys) == 6
    assert [keys.at(name) for name in ("a", "bb", "", "ü", "x" * 1000, "b")] == [4, 1, 2, 3, 5, None]
    assert list(Keys(*Keys.pack([]))) == []


def test_few_chunks_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("interlace.regions.store.OPEN_CHUNKS", 2)
    store = RegionStore.open(write(tmp_path / "store", "01234"))
    assert [len(store.get(key)) for key in "0413204"] == [1, 5, 2, 4, 3, 1, 5] and len(store._files) == 2
