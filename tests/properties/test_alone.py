"""A stream without its partner: JOINT attends to what is there, READ skips its reading, CO passes."""

import pytest
import torch
from properties.systems import CAPTIONS, EVERY_PAIRED

from interlace.layers import Co, Joint, Read
from interlace.streams import Streams, Visibility, everyone

ENDS = {"vl_bert"}  # [END] stands in the image's stream, and follows a text without a picture too


@EVERY_PAIRED
@torch.no_grad()
def test_what_is_not_there_stays_away(system):
    model, batch = system.model(), system.batch()
    text, image = model.half_text(batch.ids, batch.mask), system.image(model, batch)
    by_text, by_image = model.fuse(text, None), model.fuse(None, image)
    assert by_text.text is not None and by_image.image is not None
    assert by_image.text is None and by_image.pooled_text is None and by_text.pooled_text is not None
    if system.name in ENDS:
        assert by_text.image.shape[1] == 1
    else:
        assert by_text.image is None and by_text.pooled_image is None


def without_partner(layer, streams, see):
    """What the kinds that cross say they do when the partner is absent, done by their parts."""
    text, image = streams
    if isinstance(layer, Co):
        return streams
    if isinstance(layer, Read):
        return Streams(layer.ffn(layer.attend_self(text, None, see.sight("tt"))), image)
    return layer(streams, see)


@EVERY_PAIRED
@torch.no_grad()
def test_a_stream_alone_runs_its_own_parts(system):
    model, batch = system.model(), system.batch()
    text, image = model.half_text(batch.ids, batch.mask), system.image(model, batch)
    for half, stream in ((text, "text"), (image, "image")):
        streams = Streams(half.states, None) if stream == "text" else Streams(None, half.states)
        see = everyone(half.mask, None) if stream == "text" else everyone(None, half.mask)
        for layer in model.schedule.layers()[model._alone :]:
            absent = isinstance(layer, Co) or (isinstance(layer, Read) and stream == "text")
            streams = without_partner(layer, streams, see) if absent else layer(streams, see)
        out = model.fuse(half, None) if stream == "text" else model.fuse(None, half)
        torch.testing.assert_close(getattr(out, stream), getattr(streams, stream), atol=1e-6, rtol=1e-5)


@EVERY_PAIRED
@torch.no_grad()
def test_a_partner_that_may_not_be_seen_is_as_good_as_absent(system):
    """In one sequence, JOINT, exactly. In layers with an attention of their own for the partner, CO and READ, not: its
    output's bias and norm run there, and absence skips them. Where the streams never meet the partner counts for
    nothing anyway."""
    model, batch = system.model(), system.batch()
    text, image = model.half_text(batch.ids, batch.mask), system.image(model, batch)
    streams, start = Streams(text.states, image.states), model._alone
    alone = Streams(text.states, None), Streams(None, image.states)
    if system.name in ENDS:  # a word without a picture has a learned vector in its feature's place: compare after that
        see = everyone(text.mask, image.mask)
        (met, start) = model.schedule.run(streams, see, start, start + 1), start + 1
        streams, alone = met, (Streams(met.text, None), Streams(None, met.image))
    sees = text.mask.bool().unsqueeze(1), everyone(None, image.mask).ii
    words, cells = streams.text.shape[1], streams.image.shape[1]
    nothing = [torch.zeros(1, 1, n, dtype=torch.bool) for n in (cells, words)]
    together = model.schedule.run(streams, Visibility(sees[0], nothing[0], nothing[1], sees[1]), start)
    crossing = {type(layer) for layer in model.schedule.layers()[start:] if layer.crosses}
    own = Visibility(tt=sees[0]), Visibility(ii=sees[1])
    for stream, states, see in zip(("text", "image"), alone, own):
        a, b = getattr(together, stream), getattr(model.schedule.run(states, see, start), stream)
        reads = bool(crossing & {Co}) or (Read in crossing and stream == "text")
        assert torch.allclose(a, b, atol=1e-5) != reads, stream
    assert crossing <= {Joint, Co, Read}


def test_a_writer_of_captions_needs_a_picture():
    model, batch = CAPTIONS.model(), CAPTIONS.batch()
    with pytest.raises(ValueError, match="pixel_values"):
        model(labels=CAPTIONS.labels(batch))
    with torch.no_grad():  # the image's half is the same whatever is written
        alone = model.encoder(batch.image).last_hidden_state
        torch.testing.assert_close(CAPTIONS.run(model, batch)["image"][0], alone)


@EVERY_PAIRED
@torch.no_grad()
def test_halves_may_be_computed_apart_and_shuffled(system):
    """One picture encoded once beside several texts: the halves are all that is needed of either."""
    model, batch = system.model(), system.batch()
    text, image = model.half_text(batch.ids, batch.mask), system.image(model, batch)
    order = torch.tensor([2, 0, 1, 1])
    out = model.fuse(text.rows(order), image.rows(order))
    expected = model.fuse(text, image)
    torch.testing.assert_close(out.text, expected.text[order], atol=1e-5, rtol=1e-5)
    other = system.batch(words=4, cells=3, seed=1)  # shorter: joining pads it
    halves = model.half_text(other.ids, other.mask), system.image(model, other)
    joined, apart = model.fuse(text.join(halves[0]), image.join(halves[1])), model.fuse(*halves)
    torch.testing.assert_close(joined.image[:3], expected.image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined.text[3:, :4][other.mask], apart.text[other.mask], atol=1e-5, rtol=1e-5)
