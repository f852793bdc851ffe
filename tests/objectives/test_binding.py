"""The binding objective: reads its column, is a half and ln 2 for who knows nothing, learns places where layers can."""

import math
from itertools import permutations

import pytest
import torch
from torch import nn

from interlace.config import VLConfig
from interlace.data.rows import Pair, Picture
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import Binding
from interlace.objectives.base import Views, build_objective

COLOURS = torch.eye(3)  # one colour a patch


def learner(fusion="early", streams="single", layers=2, norm="pre", pool="first"):
    torch.manual_seed(0)
    width = Width(32, heads=4, norm=norm, dropout=0.0, attention_dropout=0.0)
    config = VLConfig(Words(width, pool=pool, vocabulary=20, positions=8), Patches(width, pool=pool, size=8, patch=4),
                      fusion=fusion, streams=streams, layers=layers, heads={"match": {}})  # fmt: skip
    return Learner(config).learn_by([(Binding(), 1.0)])


def scenes():
    """Every two of three colours at the left and the right of a picture of 2 x 2 patches, and its words: 6 rows, twins
    included. So the words alone, or the colours alone, are right of half the rows."""
    pixels, true, swapped = torch.zeros(6, 3, 8, 8), [], []
    for n, (a, b) in enumerate(permutations(range(3), 2)):
        pixels[n, :, :4, :4], pixels[n, :, :4, 4:] = COLOURS[a][:, None, None], COLOURS[b][:, None, None]
        true.append([5 + a, 10, 5 + b, 11])
        swapped.append([5 + b, 10, 5 + a, 11])
    mask, real = torch.ones(6, 4, dtype=torch.long), torch.ones(6, dtype=torch.bool)
    return {"group": torch.arange(6), "pixel_values": pixels, "caption_ids": torch.tensor(true),
            "caption_mask": mask, "caption_real": real, "swapped_ids": torch.tensor(swapped), "swapped_mask": mask,
            "swapped_real": real}  # fmt: skip


def loss(model, batch):
    return Binding().loss(model, batch, Views(model, batch))


def row(**attributes):
    return Pair("1", Picture(), "a at p and b at q", "g", "train", attributes, "a / b")


def test_the_row_brings_its_own_negative():
    sample: dict = {"texts": {}, "part": {}}
    Binding().prepare(sample, row(swapped="b at p and a at q"), 0, None, None)
    assert sample["texts"] == {"caption": "a at p and b at q", "swapped": "b at p and a at q"}
    Binding("other").prepare(sample, row(other=None), 0, None, None)
    assert sample["texts"]["swapped"] == ""  # a joined source without scenes
    with pytest.raises(UserError, match="interlace data scenes"):
        Binding().prepare(sample, row(colour="red"), 0, None, None)
    assert isinstance(build_objective("binding", {"column": "other"}), Binding)


def test_who_knows_nothing_pays_ln_2_and_is_right_half_the_time():
    model = learner()
    nn.init.zeros_(model.heads["match"].out.weight)
    nn.init.zeros_(model.heads["match"].out.bias)
    scored = loss(model, scenes())
    assert scored.loss.item() == pytest.approx(math.log(2), rel=1e-5)
    assert set(scored.logs) == {"binding", "binding_accuracy"}


def test_rows_without_a_swapped_caption_are_not_scored():
    model, batch = learner(), scenes()
    model.eval()
    some = {k: v[:4] for k, v in batch.items()}
    expected = loss(model, some)
    batch["swapped_real"][4:] = False
    got = loss(model, batch)
    torch.testing.assert_close(got.loss, expected.loss * 4 / 6)  # by all rows, so that micro-batches average
    torch.testing.assert_close(got.logs["binding_accuracy"], expected.logs["binding_accuracy"])


@pytest.mark.parametrize("fusion, streams", [("early", "single"), ("early", "dual"), ("late", "single")])
def test_layers_learn_what_stands_where(fusion, streams):
    """Late fusion as well: layers over cells that know their places can say "red left" in one vector."""
    model, batch = learner(fusion, streams), scenes()
    # the difference of two captions with the same words is a product of four things, the word, its place in the text,
    # the colour and its place in the picture: from weights of 0.02 it is 1e-7 and hardly grows
    for weight in (model.text.words.weight, model.text.positions.weight, model.image.positions):
        nn.init.normal_(weight)
    nn.init.normal_(model.image.project.weight, std=0.3)
    for weight in model.schedule.parameters():
        weight.data *= 4 if weight.ndim == 2 else 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        scored = loss(model, batch)
        if scored.logs["binding_accuracy"] == 1 and scored.loss < 0.1:
            return
        optimiser.zero_grad()
        scored.loss.backward()
        optimiser.step()
    raise AssertionError(f"still {scored.loss:.2f}, {scored.logs}")


def test_bags_of_words_and_cells_cannot_know_what_stands_where():
    """No layer, no positions of words, means: both captions are one vector, and so are both pictures, whatever the
    weights. The 6 rows are 3 twins, 0 and 2 are red-green and green-red."""
    model, batch = learner("late", "single", layers=0, norm="post", pool="mean").eval(), scenes()
    nn.init.zeros_(model.text.positions.weight)
    views = Views(model, batch)
    with torch.no_grad():
        true, swapped = (model.fuse(views.text(name), views.image()) for name in ("caption", "swapped"))
    torch.testing.assert_close(true.pooled_text, swapped.pooled_text)
    torch.testing.assert_close(true.pooled_image[0], true.pooled_image[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(true.pooled_image[0], true.pooled_image[1], atol=1e-3)  # other colours are another mean
