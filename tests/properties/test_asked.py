"""States that nobody reads are not computed, and those that somebody reads are the same."""

import pytest
import torch
from properties.systems import EVERY_PAIRED, PAIRED
from torch.utils.flop_counter import FlopCounterMode

from interlace.layers import BOTH, CO, EACH, IMAGE, JOINT, NORM, READ, TEXT, Joint, Kind, Layer, Width
from interlace.schedule import Schedule
from interlace.streams import ALL, POOLED, Asked, Streams, causal, everyone, positions_of, take

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@EVERY_PAIRED
@torch.no_grad()
def test_what_is_asked_for_is_the_same_as_of_all(system):
    model, batch = system.model(), system.batch()
    text, image = model.half_text(batch.ids, batch.mask), system.image(model, batch)
    full = model.fuse(text, image)
    rows = len(text.states)
    shortest = min(text.states.shape[1], image.states.shape[1])
    words = torch.stack([torch.randperm(shortest)[:3] for _ in range(rows)])  # its own of each row
    for asked in (Asked(words, torch.tensor([[1]])), Asked(torch.tensor([[2, 0]]), None), Asked(None, POOLED.image),
                  POOLED, ALL):  # fmt: skip
        some = model.fuse(text, image, asked=asked)
        torch.testing.assert_close(some.text, take(full.text, asked.text), **CLOSE)
        torch.testing.assert_close(some.image, take(full.image, asked.image), **CLOSE)
        torch.testing.assert_close(some.pooled_text, full.pooled_text, **CLOSE)
        torch.testing.assert_close(some.pooled_image, full.pooled_image, **CLOSE)
    for asked in (Asked(words, POOLED.image, ("text",)), Asked(POOLED.text, words, ("image",)), Asked(words, None, ()),
                  POOLED._replace(pooled=("text",)), Asked(POOLED.text, words, ())):  # fmt: skip
        some = model.fuse(text, image, asked=asked)
        torch.testing.assert_close(some.text, take(full.text, asked.text), **CLOSE)
        torch.testing.assert_close(some.image, take(full.image, asked.image), **CLOSE)
        for stream in ("text", "image"):
            vector, whole = getattr(some, f"pooled_{stream}"), getattr(full, f"pooled_{stream}")
            torch.testing.assert_close(vector, whole if stream in asked.pooled else whole[:, :0], **CLOSE)
    which = torch.rand(batch.ids.shape) < 0.4
    torch.testing.assert_close(model.words_where(text, image, which), full.text[which], **CLOSE)


@pytest.mark.parametrize("system", [s for s in PAIRED.values() if "contrast" in s.config().heads], ids=str)
@torch.no_grad()
def test_a_half_for_its_vector_alone_gives_the_same_vector(system):
    model, batch = system.model(), system.batch()
    torch.testing.assert_close(model.encode_text(batch.ids, batch.mask),
                               model.alone(model.half_text(batch.ids, batch.mask), "text"), **CLOSE)  # fmt: skip
    torch.testing.assert_close(model.encode_image(batch.image), model.alone(system.image(model, batch), "image"),
                               **CLOSE)  # fmt: skip


POST, PRE = Width(16, heads=4, dropout=0.0), Width(16, heads=4, norm="pre", dropout=0.0)
LAST = {"text": [TEXT], "image": [IMAGE], "both": [BOTH], "each": [EACH], "joint": [JOINT], "co": [CO], "read": [READ],
        "closed": [JOINT, NORM], "apart": [TEXT, IMAGE], "read after": [IMAGE, READ], "nothing": [NORM],
        "crossing": [CO, BOTH], "crossing twice": [CO, TEXT, CO, NORM, IMAGE, BOTH]}  # fmt: skip


@pytest.mark.parametrize("width", [POST, PRE], ids=["post", "pre"])
@pytest.mark.parametrize("sees", [everyone, lambda text, image: causal(text, image, 7)], ids=["everyone", "causal"])
@pytest.mark.parametrize("last", LAST)
@torch.no_grad()
def test_every_kind_of_layer_may_be_the_last(last, sees, width):
    torch.manual_seed(0)
    schedule = Schedule({"first": [JOINT], "last": LAST[last]}, width, width).eval()
    streams = Streams(torch.randn(3, 7, 16), torch.randn(3, 5, 16))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    see, words, cells = sees(mask, None), torch.tensor([[0, 3], [1, 0], [5, 1]]), torch.tensor([[4, 2]])
    full = schedule.run(streams, see)
    for asked in (Asked(words, cells), Asked(words, POOLED.image), Asked(POOLED.text, cells), Asked(None, POOLED.image),
                  POOLED):  # fmt: skip
        some = schedule.run(streams, see, asked=asked)
        torch.testing.assert_close(some.text, take(full.text, asked.text), **CLOSE)
        torch.testing.assert_close(some.image, take(full.image, asked.image), **CLOSE)


def operations(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("last", ["both", "each", "joint", "co", "closed", "apart"])
def test_the_last_layer_of_either_stream_does_less(last):
    """A quarter of its operations at most are left: the keys and values of all states, and little else."""
    schedule = Schedule({"last": LAST[last]}, POST, POST)
    streams, see = Streams(torch.randn(2, 64, 16), torch.randn(2, 64, 16)), everyone(None, None)
    one = torch.zeros(1, 1, dtype=torch.long)
    whole = operations(lambda: schedule.run(streams, see))
    short = operations(lambda: schedule.run(streams, see, asked=Asked(one, one)))
    assert short < whole / 4


def test_what_is_made_of_a_stream_that_nobody_reads_costs_nothing_from_where_it_was_read_last():
    """LXMERT's end: the words read the picture, and what the picture reads of the words is for the picture alone."""
    schedule = Schedule({"last": [CO, BOTH]}, POST, POST)
    streams, see = Streams(torch.randn(2, 8, 16), torch.randn(2, 64, 16)), everyone(None, None)
    short = operations(lambda: schedule.run(streams, see, asked=Asked(None, POOLED.image)))
    co, both = schedule.layers()

    def for_the_words():
        text = co.text_ffn(co.text_attend(streams.text, streams.image, None))
        both.text(text, None)

    assert short == operations(for_the_words)


def test_positions_of_come_in_order_and_a_short_row_is_filled_up():
    which = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    at = positions_of(which)
    assert at.shape == (3, 3) and at[0].tolist() == [1, 3, 4] and at[1, 0] == 3
    states = torch.arange(15.0).reshape(3, 5, 1)
    torch.testing.assert_close(take(states, at)[which.gather(1, at)], states[which])
    assert positions_of(torch.zeros(2, 4, dtype=torch.bool)).shape == (2, 0)


@torch.no_grad()
def test_a_kind_with_a_forward_of_its_own_computes_all_unless_it_says_otherwise():
    class Twice(Joint):
        kind = "test_twice"

        def forward(self, streams, see):
            return super().forward(super().forward(streams, see), see)

    try:
        assert not Twice.shortens and Joint.shortens
        schedule = Schedule({"last": [Kind("test_twice")]}, POST, POST).eval()
        streams, see = Streams(torch.randn(2, 6, 16), torch.randn(2, 5, 16)), everyone(None, None)
        asked = Asked(torch.tensor([[4, 0]]), None)
        full, some = schedule.run(streams, see), schedule.run(streams, see, asked=asked)
        torch.testing.assert_close(some.text, full.text[:, [4, 0]], **CLOSE)
        torch.testing.assert_close(some.image, full.image, **CLOSE)
    finally:
        Layer.kinds.pop("test_twice")


@torch.no_grad()
def test_a_kind_that_leaves_a_stream_alone_may_stand_among_those_that_leave_it_out():
    class Twofold(Layer):
        kind = "test_twofold"
        changes = ("text",)

        def forward(self, streams, see):
            return Streams(2 * streams.text, streams.image)

    try:
        schedule = Schedule({"last": [CO, Kind("test_twofold"), BOTH]}, POST, POST).eval()
        streams, see = Streams(torch.randn(2, 6, 16), torch.randn(2, 5, 16)), everyone(None, None)
        some = schedule.run(streams, see, asked=Asked(None, POOLED.image))
        torch.testing.assert_close(some.text, schedule.run(streams, see).text, **CLOSE)
        assert some.image.shape == (2, 0, 16)
    finally:
        Layer.kinds.pop("test_twofold")
