"""One optimiser step's micro-batches: held or read again, they are the same."""

import torch
from torch.utils.data import DataLoader

from interlace.data.batches import Collate, EpochSampler, Samples
from interlace.data.sources import open_source
from interlace.data.step import Step, items_of, pictures_of
from interlace.objectives import ITC, ITM
from interlace.train import build_passes, make_learner
from tests.conftest import toy_settings


def test_pictures_that_were_let_go_are_read_again_the_same(shapes, text_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run")
    source = open_source(shapes)
    _, processor = make_learner(settings, build_passes(settings, source))
    samples, collate = Samples(source, "train", processor, [ITC(), ITM()], seed=0), Collate(processor)
    micro = list(DataLoader(samples, 4, sampler=list(EpochSampler(len(samples), seed=1))[:12], collate_fn=collate))
    size = micro[0]["pixel_values"].nbytes
    asked = []

    def read(items):
        asked.append(items)
        return (pictures_of(collate([samples[item] for item in some])) for some in items)

    for hold, again in ((1e9, 0), (2 * size, 1), (0, 3)):
        step = Step(read, hold)
        for batch in micro:
            step.add(batch)
        assert len(step) == 3 and step.held == min(3 - again, 3) * size
        assert sum("pixel_values" in rest for rest in step.rest) == 0
        got = list(step)
        assert len(asked.pop()) == again and step.pictures == [None] * 3  # nothing stays behind
        for one, batch in zip(got, micro):
            assert one.keys() == batch.keys()
            assert all(one[key].equal(x) for key, x in batch.items() if isinstance(x, torch.Tensor))


def test_an_item_says_where_its_sample_came_from(shapes, text_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run")
    source = open_source(shapes)
    _, processor = make_learner(settings, build_passes(settings, source))
    samples = Samples(source, "train", processor, [ITC()], seed=0)
    batch = Collate(processor)([samples[3, 7], samples[3, 11]])
    assert items_of(batch["item"]) == [(3, 7), (3, 11)]
    assert not samples[3, 7]["pixel_values"].equal(samples[4, 7]["pixel_values"])  # another epoch, another crop
