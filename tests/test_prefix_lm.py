"""PrefixLM: nobody learns of a word before it is written, whatever the schedule."""

import pytest
import torch

from interlace.config import VLConfig
from interlace.decoder import Decoder
from interlace.embed.patches import Patches
from interlace.embed.stem import TextStem
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import BOTH, IMAGE, JOINT, READ, TEXT, Width, co, norm
from interlace.model import Half, VLModel
from interlace.objectives.mlm import word_logits
from interlace.objectives.prefix_lm import check_writes, next_words, read_and_write, read_prefix, rest
from interlace.presets import vl_bert
from interlace.streams import first_words, prefix

VOCABULARY, LENGTH = 50, 8
POST, PRE = Width(32, heads=4), Width(32, heads=4, norm="pre", eps=1e-6)
WIDE, WIDE_PRE = Width(48, heads=4, ffn=64), Width(48, heads=4, norm="pre", eps=1e-6)


def config(text=POST, image=None, **changes):
    return VLConfig(**{
        "text": Words(text, vocabulary=VOCABULARY, positions=24),
        "image": Patches(image or text, size=16, patch=8),
        "heads": {"mlm": {"kind": "tied", "labels": VOCABULARY}},
        **changes,
    })  # fmt: skip


SCHEDULES = {
    "joint": config(segments={"joint": [JOINT] * 3}),
    "joint, pre-norm": config(PRE, segments={"joint": [JOINT] * 3, "close": [norm(shared=True)]}),
    "vilbert": config(POST, WIDE, segments={"text": [TEXT] * 2, "cross": [co(inner=48, heads=2), BOTH] * 2}),
    "lxmert": config(segments={"language": [TEXT] * 2, "objects": [IMAGE],
                               "cross": [co(tied=True, ffn=False), BOTH] * 2}),
    "read": config(POST, WIDE_PRE, segments={"image": [IMAGE] * 2, "close": [norm(stream="image")],
                                             "fuse": [READ] * 3}),
    **{f"{fusion}, {streams}": config(PRE, fusion=fusion, streams=streams, layers=4)
       for fusion in ("mid", "early") for streams in ("single", "dual")},
}  # fmt: skip


def build(config, seed=0):
    torch.manual_seed(seed)
    model = VLModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # BERT's initial weights are so small that a leak could hide
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request):
    return build(SCHEDULES[request.param])


@pytest.fixture(scope="module")
def batch():
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, LENGTH), generator=draw)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 6:], mask[2, 5:] = 0, 0
    return ids, mask, torch.tensor([4, 1, 3]), torch.rand(3, 3, 16, 16, generator=draw)


def half_image(model, pixels):
    half = model.half_image(pixels)
    mask = torch.ones(half.states.shape[:2], dtype=torch.bool)
    mask[1, 3:] = False
    return Half(half.states, mask)


def run(model, ids, mask, given, pixels):
    out = read_and_write(model, ids, mask, given, half_image(model, pixels))
    return word_logits(model, out.text), out


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_future_does_not_leak(model, batch):
    ids, mask, given, pixels = batch
    with torch.no_grad():
        before, states = run(model, ids, mask, given, pixels)
        for row in range(3):
            for place in range(int(given[row]), int(mask[row].sum())):
                other = ids.clone()
                other[row, place] = 5 + (other[row, place] - 4) % (VOCABULARY - 5)
                after, changed = run(model, other, mask, given, pixels)
                close(after[row, :place], before[row, :place])
                close(changed.image, states.image)
                moved = (after[row] - before[row]).abs().amax(-1)[place : int(mask[row].sum())]
                assert moved.min() > 1e-4


def test_every_written_word_reads_the_whole_prefix_and_the_picture(model, batch):
    ids, mask, given, pixels = batch
    with torch.no_grad():
        before, states = run(model, ids, mask, given, pixels)
        for row in (0, 2):
            for place in range(int(given[row])):
                other = ids.clone()
                other[row, place] = 5 + (other[row, place] - 4) % (VOCABULARY - 5)
                after, changed = run(model, other, mask, given, pixels)
                moved = (after[row] - before[row]).abs().amax(-1)[: int(mask[row].sum())]
                assert moved.min() > 1e-4  # the words of the prefix before it, too: they see both ways
                close(changed.image, states.image)
        after, _ = run(model, ids, mask, given, pixels.flip(-1))
        assert (after - before).abs().amax(-1)[mask.bool()].min() > 1e-4


def test_no_gradient_from_a_prediction_to_the_words_it_must_not_know(model, batch):
    ids, mask, given, pixels = batch
    kept = []
    handle = model.text.register_forward_hook(lambda module, inputs, out: kept.append(out) or out.retain_grad())
    labels = next_words(ids, mask, given)
    try:
        for row, place in (labels >= 0).nonzero().tolist():
            kept.clear()
            logits, _ = run(model, ids, mask, given, pixels)
            logits[row, place].log_softmax(-1)[labels[row, place]].backward()
            size = kept[0].grad[row].abs().amax(-1)  # (T,)
            assert (size[place + 1 :] == 0).all() and size[: place + 1].min() > 0
    finally:
        handle.remove()
        model.zero_grad()


def test_padding_and_the_rest_of_the_batch_change_nothing(model, batch):
    ids, mask, given, pixels = batch
    with torch.no_grad():
        whole, _ = run(model, ids, mask, given, pixels)
        for row in range(3):
            n = int(mask[row].sum())
            image = half_image(model, pixels).rows(torch.tensor([row]))
            cells = int(image.mask.sum())
            image = Half(image.states[:, :cells], None)
            out = read_and_write(model, ids[row : row + 1, :n], None, given[row : row + 1], image)
            close(word_logits(model, out.text)[0], whole[row, :n])


def test_a_prefix_of_one_word_is_a_causal_model(model, batch):
    ids, mask, _, pixels = batch
    ones = torch.ones_like(mask)
    with torch.no_grad():
        first, _ = run(model, ids, ones, torch.ones(3, dtype=torch.long), pixels)
        none, _ = run(model, ids, ones, torch.zeros(3, dtype=torch.long), pixels)
        close(first, none)  # one word alone sees what it would as a prefix


def test_the_mask_is_that_of_the_paper():
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    given = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()  # the second prefix has a written word within
    see = prefix(valid, None, given)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                expected = valid[b, j] and (given[b, j] or (not given[b, i] and j <= i))
                assert bool(see.tt[b, i, j]) == bool(expected), (b, i, j)
    assert not see.it.any()
    assert first_words(torch.tensor([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]


def test_labels():
    ids = torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert next_words(ids, mask, torch.tensor([2, 1])).tolist() == [[-100, 8, 9, 2, -100], [7, 2, -100, -100, -100]]


# --------------------------------------------------------------------------------------------- encoder and decoder


def with_decoder(config):
    config = VLConfig(**{"text": config.text, "image": config.image, "segments": config.segments,
                         "writes": Decoder({"write": [READ] * 2}, "both", ("words",), start=1, end=2)})  # fmt: skip
    return build(config)


@pytest.fixture(scope="module", params=[*SCHEDULES])
def pair(request):
    return with_decoder(SCHEDULES[request.param])


def run_pair(model, ids, mask, given, pixels):
    context = read_prefix(model, ids, mask, given, half_image(model, pixels))
    words, labels = rest(model.decoder, ids, mask, given)
    return model.decoder(words, context.states, context.mask, first=given).logits, labels, context


def test_an_encoder_and_a_decoder_factorise_alike(pair, batch):
    ids, mask, given, pixels = batch
    with torch.no_grad():
        before, labels, read = run_pair(pair, ids, mask, given, pixels)
        assert ((labels >= 0).sum(1) == mask.sum(1) - given).all()
        for row in range(3):
            first = int(given[row])
            for place in range(int(mask[row].sum())):
                other = ids.clone()
                other[row, place] = 5 + (other[row, place] - 4) % (VOCABULARY - 5)
                after, _, context = run_pair(pair, other, mask, given, pixels)
                moved = (after[row] - before[row]).abs().amax(-1)[: int(mask[row].sum()) - first]
                if place < first:
                    assert moved.min() > 1e-4
                else:
                    close(context.states[row][context.mask[row]], read.states[row][read.mask[row]])
                    assert moved[: place - first + 1].max() < 1e-5
        after, _, _ = run_pair(pair, ids, mask, given, pixels.flip(-1))
        assert (after - before).abs().amax(-1)[labels >= 0].min() > 1e-4


def test_an_encoder_and_a_decoder_do_not_see_padding(pair, batch):
    ids, mask, given, pixels = batch
    with torch.no_grad():
        whole, labels, _ = run_pair(pair, ids, mask, given, pixels)
        for row in range(3):
            n, image = int(mask[row].sum()), half_image(pair, pixels).rows(torch.tensor([row]))
            image = Half(image.states[:, : int(image.mask.sum())], None)
            one = ids[row : row + 1, :n], torch.ones(1, n), given[row : row + 1]
            context = read_prefix(pair, *one, image)
            words, _ = rest(pair.decoder, *one)
            alone = pair.decoder(words, context.states, context.mask, first=one[2]).logits
            scored = int((labels[row] >= 0).sum())
            close(alone[0, :scored], whole[row, :scored])


def test_what_the_decoder_reads_goes_into_the_config(tmp_path):
    model = with_decoder(SCHEDULES["vilbert"])
    assert model.decoder.beside.project.weight.shape == (32, 48)  # cells are brought to the width of the words
    model.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path)
    assert again.config.writes == model.config.writes
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# -------------------------------------------------------------------------------------------------- who cannot write


def tower(name):
    from transformers import BertConfig, GPT2Config

    if name == "bert":
        return BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                          intermediate_size=64, max_position_embeddings=24).to_dict()  # fmt: skip
    return GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=24).to_dict()


def with_tower(name, width=PRE, head="tied", **changes):
    return VLConfig(**{"text": TextStem(width, tower=tower(name)), "image": Patches(width, size=16, patch=8),
                       "fusion": "mid", "layers": 2, "heads": {"mlm": {"kind": head, "labels": VOCABULARY}},
                       **changes})  # fmt: skip


def test_a_tower_that_looks_ahead_is_refused():
    with pytest.raises(UserError, match=r"bert.*later words"):
        check_writes(build(with_tower("bert")))
    check_writes(build(with_tower("gpt2")))


def test_a_tower_that_looks_ahead_may_read_for_a_decoder(batch):
    words = Words(Width(40, heads=4), vocabulary=VOCABULARY, positions=24)
    write = Decoder({"write": [READ]}, "both", start=1, end=2, words=words)
    model = build(with_tower("bert", writes=write))
    ids, mask, given, pixels = batch
    with torch.no_grad():
        before, _, _ = run_pair(model, ids, mask, given, pixels)
        other = ids.clone()
        other[0, 6] = 5 + (other[0, 6] - 4) % (VOCABULARY - 5)
        after, _, _ = run_pair(model, other, mask, given, pixels)
    close(after[0, :3], before[0, :3])  # 4 words are given: 4, 5 and 6 are predicted before 6 is read
    assert (after[0, 3] - before[0, 3]).abs().max() > 1e-4
    with pytest.raises(UserError, match="words of its own"):
        VLModel(with_tower("bert", writes=Decoder({"write": [READ]}, "both")))


def test_who_cannot_write_is_told_why():
    with pytest.raises(UserError, match="late fusion"):
        check_writes(VLModel(config(PRE, fusion="late", layers=2)))
    with pytest.raises(UserError, match="no head 'mlm'"):
        check_writes(VLModel(config(PRE, fusion="mid", layers=2, heads={})))
    with pytest.raises(UserError, match=r"vl_bert_meet.*later ones"):  # its regions are placed after the last word
        check_writes(VLModel(vl_bert.tiny()))
    with pytest.raises(UserError, match=r"have 32 numbers and the head .* 48"):
        check_writes(VLModel(with_tower("gpt2", WIDE_PRE)))
    check_writes(VLModel(with_tower("gpt2", WIDE_PRE, "transformed")))
