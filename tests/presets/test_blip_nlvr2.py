"""BLIP judging a text by two pictures (NLVR2)."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from interlace.convert import convert
from interlace.errors import UserError
from interlace.layers import Width, build_layer
from interlace.model import VLModel
from interlace.presets import blip
from interlace.streams import Streams, everyone
from interlace.weights import save_foreign

GOLDEN = Path(__file__).parents[1] / "parity/golden"
IDS = torch.tensor([[98, 5, 6, 7, 8, 3], [98, 9, 10, 3, 0, 0]])
MASK = (IDS != 0).long()
# both pictures of the first text, then of the second
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build():
    """One layer that takes the mean, one that merges; weights as large as learnt ones."""
    torch.manual_seed(0)
    model = VLModel(blip.tiny(blip.blip_nlvr2, mean=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or ("norm" not in name and "bias" in name):
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


def judge(model, ids=IDS, mask=MASK, pixels=PIXELS):
    return blip.compare(model, model.half_text(ids, mask), model.half_image(pixels))


# ------------------------------------------------------------------------------- the same in plain torch, by the paper


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def normed(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)


def attention(w, name, x, context, heads):
    """(T, D), (I, C) -> (T, D): softmax(q k' / sqrt(d)) v, head by head, then the output's linear."""
    q, k, v = linear(w, f"{name}.query", x), linear(w, f"{name}.key", context), linear(w, f"{name}.value", context)
    size = q.shape[1] // heads
    read = [(q[:, a : a + size] @ k[:, a : a + size].T / size**0.5).softmax(-1) @ v[:, a : a + size]
            for a in range(0, q.shape[1], size)]  # fmt: skip
    return linear(w, f"{name}.out", torch.cat(read, -1))


def by_hand(w, layers, x, first, second, heads):
    """Words (T, D) of one text, both pictures' states -> (2,)."""
    for at, merges in layers:
        x = normed(w, f"{at}.attend_self.norm", x + attention(w, f"{at}.attend_self", x, x, heads))
        a = attention(w, f"{at}.attend_first", x, first, heads)
        b = attention(w, f"{at}.attend_second", x, second, heads)
        x = normed(w, f"{at}.norm", x + (linear(w, f"{at}.merge", torch.cat([a, b], -1)) if merges else (a + b) / 2))
        x = normed(w, f"{at}.ffn.norm", x + linear(w, f"{at}.ffn.down", F.gelu(linear(w, f"{at}.ffn.up", x))))
    return linear(w, "heads.nlvr2.out", torch.relu(linear(w, "heads.nlvr2.dense", x[0])))


def test_two_pictures_are_judged_by_the_formula(model):
    w, said = model.state_dict(), judge(model)
    assert said.shape == (2, 2)
    words, pictures = model.half_text(IDS, MASK).states, model.half_image(PIXELS).states
    layers = [("schedule.fuse.0", False), ("schedule.merge.0", True)]
    for n in range(2):
        real = words[n, : int(MASK[n].sum())]
        expected = by_hand(w, layers, real, pictures[2 * n], pictures[2 * n + 1], heads=4)
        torch.testing.assert_close(said[n], expected, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- properties


def test_each_picture_has_an_attention_of_its_own(model):
    said, turned = judge(model), judge(model, pixels=PIXELS[[1, 0, 2, 3]])
    assert (said[0] - turned[0]).abs().max() > 1e-3
    torch.testing.assert_close(said[1], turned[1])


def test_a_text_reads_its_own_pictures_alone(model):
    other = PIXELS.clone()
    other[3] = 0
    said, changed = judge(model), judge(model, pixels=other)
    torch.testing.assert_close(said[0], changed[0])
    assert (said[1] - changed[1]).abs().max() > 1e-3
    longer = judge(model, F.pad(IDS, (0, 3)), F.pad(MASK, (0, 3)))
    torch.testing.assert_close(said, longer, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_a_layer_does_not_see_the_padding_of_either_picture(merge):
    torch.manual_seed(0)
    layer = build_layer(blip.read_two(merge), Width(16, heads=4), Width(24, heads=4)).eval()
    text, image, noise = torch.randn(3, 5, 16), torch.randn(6, 7, 24), torch.randn(6, 2, 24)
    mask = torch.tensor([[1] * 7 + [0] * 2] * 6)
    uneven = mask.clone()
    uneven[1, 3:] = 0  # of the first text's second picture alone

    def read(cells, mask=None):
        with torch.no_grad():
            return layer(Streams(text, cells), everyone(None, mask)).text

    long = torch.cat([image, noise], 1)
    torch.testing.assert_close(read(image), read(long, mask), atol=1e-5, rtol=1e-5)
    for picture, seen in ((0, True), (1, False)):
        other = long.clone()
        other[picture, 3:7] = 0
        moved = (read(other, uneven)[0] - read(long, uneven)[0]).abs().max()
        assert moved > 1e-4 if seen else moved == 0


def test_absent_partners_and_a_single_picture(model):
    alone = model.fuse(model.half_text(IDS, MASK), None)
    assert alone.text.isfinite().all() and alone.image is None
    assert model.fuse(None, model.half_image(PIXELS)).text is None
    one = model(IDS, PIXELS[:2], MASK)  # both attentions read it
    twice = model.fuse(model.half_text(IDS, MASK), model.half_image(PIXELS[[0, 0, 1, 1]]))
    torch.testing.assert_close(one.text, twice.text, atol=1e-5, rtol=1e-5)


def test_the_gradient_reaches_every_weight_and_both_pictures():
    model, pixels = build(), PIXELS.clone().requires_grad_()
    F.cross_entropy(judge(model, pixels=pixels), torch.tensor([1, 0])).backward()
    assert pixels.grad.flatten(1).norm(dim=1).min() > 0
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still


# ------------------------------------------------------------------------------------------------------ release, saving


def released(layers=8):
    """A fine-tuned file: names and sizes of the encoders recorded from the release, the text's first layer again and
    again, so that some of them merge, with what a second picture adds."""
    tensors, g = load_file(GOLDEN / "blip-a.safetensors"), torch.Generator().manual_seed(2)
    given = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    out = {k: v for k, v in given.items() if k.startswith(("visual_encoder.", "text_encoder.embeddings."))}
    first = "text_encoder.encoder.layer.0."
    size = len(given[f"{first}output.dense.bias"])

    def like(tensor):
        return torch.randn(tensor.shape, generator=g)

    for n in range(layers):
        at = f"text_encoder.encoder.layer.{n}."
        for name, tensor in given.items():
            if not name.startswith(first):
                continue
            name = name.removeprefix(first)
            if name.startswith("crossattention.self."):
                out |= {at + name.replace("self", f"self{which}"): like(tensor) for which in (0, 1)}
            elif name.startswith("crossattention.output.dense."):
                out |= {at + name.replace("dense", f"dense{which}"): like(tensor) for which in (0, 1)}
            else:
                out[at + name] = like(tensor)
        if n >= 6:
            merge = f"{at}crossattention.output.merge_layer"
            out |= {f"{merge}.weight": torch.randn(size, 2 * size, generator=g), f"{merge}.bias": torch.randn(size)}
    shapes = {"0.weight": (size, size), "0.bias": (size,), "2.weight": (2, size), "2.bias": (2,)}
    return out | {f"cls_head.{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}


def test_a_release_fine_tuned_on_two_pictures(tmp_path):
    given = released()
    torch.save({"model": given, "epoch": 3}, tmp_path / "model_base_nlvr.pth")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((GOLDEN / "blip-a.json").read_text())["config"]))
    done = convert(tmp_path / "model_base_nlvr.pth", tmp_path / "ours", "blip_nlvr2", Console(quiet=True))
    assert done.report.dropped == [n for n in given if n.endswith("position_ids")] and not done.report.fresh
    assert len(done.report.mapped) + len(done.report.dropped) == len(given)
    kinds = done.model.config.segments
    assert kinds["fuse"] == [blip.read_two()] * 6 and kinds["merge"] == [blip.read_two(merge=True)] * 2
    back = save_foreign(done.model, blip.NLVR2_KEYS)
    assert set(back) == set(given) - set(done.report.dropped)
    assert all(torch.equal(tensor, given[name]) for name, tensor in back.items())


def test_a_saved_judge_says_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(judge(VLModel.from_pretrained(tmp_path).eval()), judge(model))


def test_what_cannot_be_compared_is_explained(model):
    text, pictures = model.half_text(IDS, MASK), model.half_image(PIXELS)
    with pytest.raises(UserError, match=r"expected two pictures for each text, 4 for 2, and got 3: give both"):
        blip.compare(model, text, pictures.rows(torch.tensor([0, 1, 2])))
    other = VLModel(blip.tiny(blip.blip_retrieval)).eval()
    with pytest.raises(UserError, match=r"a head 'nlvr2', .* has contrast, match: build it with blip_nlvr2\(\)"):
        blip.compare(other, text, pictures)
    with pytest.raises(UserError, match=r"expected a text of norm 'post', as BERT's, got 'pre'"):
        build_layer(blip.read_two(), Width(16, heads=4, norm="pre"), Width(16, heads=4))
