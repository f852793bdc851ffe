"""Layers and schedules: what may be seen, what padding does, where the streams meet."""

import pytest
import torch
from torch import nn

from interlace.config import VLConfig
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import BOTH, CO, EACH, IMAGE, JOINT, READ, TEXT, Kind, Width, build_layer, co
from interlace.model import VLModel
from interlace.schedule import Schedule, fused
from interlace.streams import Streams, Visibility, causal, everyone, prefix, sight

KINDS = {"text": TEXT, "image": IMAGE, "both": BOTH, "each": EACH, "joint": JOINT, "co": CO, "co tied": co(tied=True),
         "co, attention only": co(ffn=False), "co inner": co(inner=24, heads=3), "read": READ}  # fmt: skip
NORMS = ["pre", "post"]


def width(norm="post", size=16):
    return Width(size, heads=4, norm=norm, dropout=0.0, attention_dropout=0.0)


def streams(b=3, t=5, i=7, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Streams(torch.randn(b, t, d, generator=g), torch.randn(b, i, d, generator=g))


def run(layer, s, see):
    with torch.no_grad():
        return layer(s, see)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(name, norm):
    torch.manual_seed(0)
    layer = build_layer(KINDS[name], width(norm), width(norm)).eval()
    short = streams()
    more_words, more_cells = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    long = Streams(torch.cat([short.text, more_words], 1), torch.cat([short.image, more_cells], 1))
    text_mask, image_mask = torch.ones(3, 9), torch.ones(3, 9)
    text_mask[:, 5:], image_mask[:, 7:] = 0, 0
    a, b = run(layer, short, everyone(None, None)), run(layer, long, everyone(text_mask, image_mask))
    close(a.text, b.text[:, :5])
    close(a.image, b.image[:, :7])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_crosses_exactly_when_it_says_so(name, norm):
    torch.manual_seed(0)
    layer = build_layer(KINDS[name], width(norm), width(norm)).eval()
    a, other = streams(), streams(seed=1)
    seen = run(layer, a, everyone(None, None))
    text_moved = (run(layer, Streams(a.text, other.image), everyone(None, None)).text - seen.text).abs().max() > 1e-4
    image_moved = (run(layer, Streams(other.text, a.image), everyone(None, None)).image - seen.image).abs().max() > 1e-4
    assert bool(text_moved or image_moved) == layer.crosses
    if KINDS[name].name == "read":
        assert text_moved and not image_moved


@pytest.mark.parametrize("name", KINDS)
def test_an_absent_partner_is_no_error_and_the_rows_stay_independent(name):
    layer = build_layer(KINDS[name], width(), width()).eval()
    s = streams()
    for alone in (Streams(s.text, None), Streams(None, s.image)):
        out = run(layer, alone, everyone(None, None))
        assert (out.text is None, out.image is None) == (alone.text is None, alone.image is None)
        first = Streams(*(None if x is None else x[:1] for x in alone))
        one = run(layer, first, everyone(None, None))
        for whole, part in zip(out, one):
            if whole is not None:
                close(whole[:1], part)


def test_joint_with_closed_crossing_blocks_is_each():
    torch.manual_seed(0)
    joint, each = build_layer(JOINT, width(), width()).eval(), build_layer(EACH, width(), width()).eval()
    each.load_state_dict(joint.state_dict())
    s = streams()
    closed = Visibility(ti=torch.zeros(1, 1, 7, dtype=torch.bool), it=torch.zeros(1, 1, 5, dtype=torch.bool))
    a, b = run(joint, s, closed), run(each, s, everyone(None, None))
    close(a.text, b.text)
    close(a.image, b.image)


def test_joint_equals_one_transformer_over_the_concatenation():
    torch.manual_seed(0)
    joint = build_layer(JOINT, width(), width()).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu", batch_first=True,
                                        layer_norm_eps=1e-12).eval()  # fmt: skip
    a = joint.attend
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
    for ours, other in [(a.out, theirs.self_attn.out_proj), (a.norm, theirs.norm1), (joint.ffn.up, theirs.linear1),
                        (joint.ffn.down, theirs.linear2), (joint.ffn.norm, theirs.norm2)]:  # fmt: skip
        other.load_state_dict(ours.state_dict())
    s = streams()
    mask = torch.ones(3, 5)
    mask[1, 3:] = 0
    out = run(joint, s, everyone(mask, None))
    keep = torch.cat([mask, torch.ones(3, 7)], 1).bool()
    with torch.no_grad():
        expected = theirs(torch.cat([s.text, s.image], 1), src_key_padding_mask=~keep)
    ours = torch.cat([out.text, out.image], 1)
    close(ours[keep], expected[keep])


def test_co_reads_states_from_before_the_layer_in_both_directions():
    torch.manual_seed(0)
    layer = build_layer(CO, width(), width()).eval()
    s = streams()
    out = run(layer, s, everyone(None, None))
    with torch.no_grad():
        parallel = layer.image_ffn(layer.image_attend(s.image, s.text, None))
        text = layer.text_ffn(layer.text_attend(s.text, s.image, None))
        sequential = layer.image_ffn(layer.image_attend(s.image, text, None))
    close(out.image, parallel)
    assert (out.image - sequential).abs().max() > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_texts_of_one_image_read_it_as_if_each_had_a_copy(norm):
    torch.manual_seed(0)
    layer = build_layer(READ, width(norm), width(norm)).eval()
    text, image = streams(b=6).text, streams(b=2).image  # three texts an image
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    three = torch.arange(2).repeat_interleave(3)
    out = run(layer, Streams(text, image), everyone(None, real))
    close(out.text, run(layer, Streams(text, image[three]), everyone(None, real[three])).text)


@pytest.mark.parametrize("name", ["text", "both", "joint", "co", "read"])
def test_the_future_does_not_leak_through_two_layers(name):
    torch.manual_seed(0)
    between = KINDS["joint" if name == "joint" else "both"]
    schedule = Schedule({"a": [KINDS[name], between, KINDS[name]]}, width(), width()).eval()
    s = streams()
    see = causal(None, None, 5)
    changed = s.text.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        a, b = schedule(s, see), schedule(Streams(changed, s.image), see)
    close(a.text[:, :-1], b.text[:, :-1], atol=1e-6)
    close(a.image, b.image, atol=1e-6)
    assert (a.text[:, -1] - b.text[:, -1]).abs().max() > 1e-3


def test_a_prefix_is_seen_by_all_words_and_the_rest_only_by_later_ones():
    given = torch.tensor([[True, True, False, False]])
    see = prefix(None, None, given)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(see.tt[0], expected)
    assert not see.it.any()


def test_a_query_that_may_see_nothing_reads_zero():
    layer = build_layer(co(ffn=False), width(), width()).eval()
    s = streams(b=2)
    nothing = torch.ones(2, 1, 7, dtype=torch.bool)
    nothing[0] = False
    with torch.no_grad():
        read = layer.text_attend.read(s.text, s.image, sight(nothing))
    close(read[0], layer.text_attend.out.bias.expand_as(read[0]))
    assert torch.isfinite(read).all() and (read[1] - layer.text_attend.out.bias).abs().max() > 1e-3


def test_one_line_moves_the_fusion_and_keeps_the_parameters():
    sizes = {}
    for kind in ("single", "dual"):
        for when, depth in (("early", 0), ("mid", 3), ("late", 6)):
            schedule = Schedule(fused(when, kind, 6, "post"), width(), width())
            assert schedule.fusion_depth == depth
            sizes[kind, when] = sum(p.numel() for p in schedule.parameters())
    assert sizes["dual", "early"] == sizes["dual", "mid"] == sizes["dual", "late"]
    assert sizes["single", "early"] == sizes["single", "mid"] == sizes["single", "late"] < sizes["dual", "late"]


def small(fusion, kind, norm="pre"):
    w = width(norm)
    heads = {"contrast": {"size": 8}, "match": {}, "answers": {"labels": 5}}
    return VLConfig(Words(w, vocabulary=50, positions=12), Patches(w, size=16, patch=8), fusion=fusion, streams=kind,
                    layers=4, heads=heads)  # fmt: skip


ALL = [(f, s) for f in ("late", "mid", "early") for s in ("single", "dual")]


@pytest.mark.parametrize("fusion,kind", ALL)
def test_save_and_load_change_nothing(fusion, kind, tmp_path):
    torch.manual_seed(0)
    model = VLModel(small(fusion, kind)).eval()
    ids, pixels = torch.randint(1, 50, (2, 6)), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    model.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    assert again.config.segments == model.config.segments and list(again.config.segments) == list(model.config.segments)
    with torch.no_grad():
        a, b = model(ids, pixels, mask), again(ids, pixels, mask)
        close(a.text, b.text, 0)
        close(a.pooled_image, b.pooled_image, 0)
        close(model.encode_text(ids, mask), again.encode_text(ids, mask), 0)


def test_recomputing_the_layers_changes_no_gradient():
    torch.manual_seed(0)
    model = VLModel(small("mid", "dual"))
    ids, pixels = torch.randint(1, 50, (2, 6)), torch.randn(2, 3, 16, 16)

    def gradients():
        model.zero_grad()
        out = model(ids, pixels)
        (out.text.square().sum() + out.image.square().sum()).backward()
        return {name: p.grad.clone() for name, p in model.schedule.named_parameters() if p.grad is not None}

    kept = gradients()
    model.activation_checkpointing_enable()
    assert model.schedule.gradient_checkpointing
    again = gradients()
    assert kept and again.keys() == kept.keys()
    for name, gradient in kept.items():
        close(again[name], gradient, 0)


@pytest.mark.parametrize("fusion,kind", ALL)
def test_gradient_reaches_every_parameter(fusion, kind):
    torch.manual_seed(0)
    model = VLModel(small(fusion, kind))
    ids, pixels = torch.randint(1, 50, (2, 6)), torch.randn(2, 3, 16, 16)
    out = model(ids, pixels)
    loss = sum(model.heads[h](out.pooled_text, out.pooled_image).square().sum() for h in ("match", "answers"))
    (loss + (model.encode_text(ids) @ model.encode_image(pixels).T).sum() * model.heads["contrast"].scale).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # in early dual fusion a picture alone passes the co layers, and pooled-first states end there: nothing else is
    # silent
    allowed = ("attend.key.bias",)  # the softmax is blind to it
    assert [n for n in silent if not n.endswith(allowed) and "_attend.key.bias" not in n] == []


@pytest.mark.parametrize("fusion,kind", ALL)
def test_a_row_of_a_batch_equals_the_row_alone_whatever_its_padding(fusion, kind):
    torch.manual_seed(0)
    model = VLModel(small(fusion, kind)).eval()
    ids, pixels = torch.randint(1, 50, (3, 9)), torch.randn(3, 3, 16, 16)
    mask = torch.ones(3, 9)
    mask[0, 4:] = 0
    with torch.no_grad():
        batch, alone = model(ids, pixels, mask), model(ids[:1, :4], pixels[:1])
        close(batch.pooled_text[:1], alone.pooled_text)
        close(batch.pooled_image[:1], alone.pooled_image)
        close(model.encode_text(ids, mask)[:1], model.encode_text(ids[:1, :4]))


def test_halves_then_fuse_is_the_whole_forward():
    torch.manual_seed(0)
    model = VLModel(small("mid", "dual")).eval()
    ids, pixels = torch.randint(1, 50, (2, 6)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        text, image = model.half_text(ids), model.half_image(pixels)
        swapped = model.fuse(text, image.rows(torch.tensor([1, 0])))
        close(swapped.text, model(ids, pixels.flip(0)).text)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: VLConfig(fusion="middle"), "late, mid or early"),
        (lambda: VLConfig(streams="triple"), "single or dual"),
        (lambda: VLConfig(segments={"a": [JOINT]}, fusion="mid"), "not both"),
        (lambda: Width(10, heads=3), "does not divide"),
        (lambda: build_layer(Kind("jiont"), width(), width()), "Did you mean 'joint'"),
        (lambda: build_layer(JOINT, width(), width(size=32)), "widths must be equal"),
        (lambda: build_layer(co(inner=30), width(), width()), "30 does not divide into 4 heads"),
        (lambda: VLConfig(text={"embed": "wrods", "width": {"size": 4}}), "Did you mean 'words'"),
    ],
)
def test_a_wrong_line_is_explained(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_text_longer_than_the_positions_and_a_picture_smaller_than_a_patch_are_explained():
    model = VLModel(small("mid", "dual"))
    with pytest.raises(UserError, match="12 positions"):
        model.half_text(torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(UserError, match="smaller than one patch"):
        model.half_image(torch.zeros(1, 3, 4, 4))
