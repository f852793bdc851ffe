"""Attention between the streams that begins by likeness."""

import pytest
import torch
from torch.nn import functional as F

from interlace.alike import meeting, start_alike
from interlace.compose import Composition
from interlace.layers import Attend
from interlace.learner import Learner
from interlace.objectives import ITM
from interlace.systems import build_system


def build(system, text_tower, image_tower, **changes):
    what = Composition(system=system, text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=3,
                       size=64, dropout=0.0, max_length=16, **changes)  # fmt: skip
    torch.manual_seed(0)
    return build_system(what, [ITM()], None, Learner)[0]


def finds(attend: Attend) -> bool:
    """Does a word whose state is one cell's, up to a small difference, read that cell more than any other?"""
    torch.manual_seed(0)
    cells = F.layer_norm(torch.randn(8, 9, 32), (32,))
    with torch.no_grad():
        said = attend.query(cells[:, 4:5] + 0.1 * torch.randn(8, 1, 32)) @ attend.key(cells).transpose(1, 2)
    return bool((said[:, 0].argmax(-1) == 4).all())


@pytest.mark.parametrize("system, attentions", [("lxmert", 1), ("vilbert", 2)])
def test_systems_whose_streams_read_each_other_begin_by_likeness(system, attentions, text_tower, image_tower):
    model = build(system, text_tower, image_tower)
    found = meeting(model)
    assert len(found) == attentions
    assert all(finds(attend) for attend in found.values())
    rough = build(system, text_tower, image_tower, align=False)  # cells are in no space of words then
    assert not any(finds(attend) for attend in meeting(rough).values())


def test_what_came_trained_reads_what_it_learnt_to(text_tower, image_tower):
    model = build("lxmert", text_tower, image_tower, align=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    name = next(iter(meeting(model)))
    assert start_alike(model, {f"{name}.query.weight"}) == 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert start_alike(model) == 1
    assert {n for n, p in model.named_parameters() if not torch.equal(before[n], p)} == {
        f"{name}.query.weight", f"{name}.key.weight"}  # fmt: skip


def test_where_only_words_read_they_look_where_they_like(text_tower, image_tower):
    found = meeting(build("blip", text_tower, image_tower))
    assert len({id(attend) for attend in found.values()}) == len(found) == 3  # its decoder shares them
    assert not any(finds(attend) for attend in found.values())


def test_a_system_of_one_sequence_has_no_such_attention(text_tower, image_tower):
    assert not meeting(build("uniter", text_tower, image_tower))
