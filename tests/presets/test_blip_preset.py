"""BLIP: what it writes, with and without memory, and its slow copy."""

import copy

import pytest
import torch

from interlace import generate
from interlace.decoder import Decoder
from interlace.errors import UserError
from interlace.layers import JOINT, READ
from interlace.model import Half, VLModel
from interlace.objectives.lm import text_losses
from interlace.objectives.momentum import Momentum
from interlace.presets import blip

IDS = torch.tensor([[97, 5, 6, 7, 8, 3], [97, 9, 10, 3, 0, 0]])
MASK = (IDS != 0).long()
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loud(model):
    """Weights ten times the initial ones, so that the next word is not the same whatever came before."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or ("norm" not in name and "bias" in name):
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=[blip.blip, blip.blip_caption, blip.blip_vqa])
def writer(request):
    torch.manual_seed(0)
    return loud(VLModel(blip.tiny(request.param)))


def context(model):
    with torch.no_grad():
        if model.config.writes.context == "text":
            return generate.ask(model, IDS, MASK, PIXELS)
        return model.half_image(PIXELS)


def test_the_future_does_not_leak(writer):
    read, changed = context(writer), IDS.clone()
    changed[:, 3] = 50
    with torch.no_grad():
        a, b = writer.decoder(IDS, *read[:2]).logits, writer.decoder(changed, *read[:2]).logits
    torch.testing.assert_close(a[:, :3], b[:, :3], atol=1e-5, rtol=1e-5)
    assert (a[:, 3:] - b[:, 3:]).abs().amax(-1).gt(1e-3).all()


def test_the_context_is_read_but_not_its_padding(writer):
    read = context(writer)
    noise = torch.randn_like(read.states[:, :2])
    longer = Half(torch.cat([read.states, noise], 1), read.padded(read.states.shape[1] + 2).mask)
    other = Half(read.states.flip(0), None if read.mask is None else read.mask.flip(0))
    with torch.no_grad():
        a, b, c = (writer.decoder(IDS, *half[:2]).logits for half in (read, longer, other))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (a - c).abs().amax() > 1e-2


def test_steps_with_memory_are_the_whole_at_once(writer):
    from transformers import DynamicCache, EncoderDecoderCache

    read, cache = context(writer), EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        whole = writer.decoder(IDS, read.states, read.mask).logits
        parts = [writer.decoder(IDS[:, a:b], read.states, read.mask, past_key_values=cache).logits
                 for a, b in ((0, 3), (3, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"beams": 1}, {"beams": 3},
                                     {"beams": 4, "length_penalty": 2.0, "early_stopping": True}])  # fmt: skip
def test_cached_equals_uncached(writer, options):
    read = context(writer)
    cached, whole = (generate.write(writer.decoder, read, use_cache=memory, **options) for memory in (True, False))
    assert torch.equal(cached, whole)
    assert (cached[:, 0] == 97).all() and cached.shape[1] <= 20


def test_a_row_is_written_as_it_is_alone(writer):
    read = context(writer)
    together = generate.write(writer.decoder, read)
    for row in range(2):
        alone = generate.write(writer.decoder, read.rows(torch.tensor([row])))
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_question_is_answered_as_it_is_alone(beams):
    """The padding of a shorter question, and what stands in it, is not read."""
    torch.manual_seed(0)
    model = loud(VLModel(blip.tiny(blip.blip_vqa)))
    noise = torch.where(MASK.bool(), IDS, 60)
    with torch.no_grad():
        together, other = (generate.ask(model, ids, MASK, PIXELS) for ids in (IDS, noise))
        alone = generate.ask(model, IDS[1:, :4], None, PIXELS[1:])
    answers = generate.answer(model, together, beams=beams)
    expected = generate.answer(model, alone, beams=beams)
    assert torch.equal(answers[1:, : expected.shape[1]], expected)
    assert torch.equal(answers, generate.answer(model, other, beams=beams))


@pytest.mark.parametrize("options", [{"beams": 1}, {"beams": 3}, {"beams": 1, "do_sample": True, "top_p": 0.9}])
@pytest.mark.parametrize("make", [blip.blip, blip.blip_caption])
def test_a_picture_is_encoded_once_and_read_into_memory_once(make, options):
    torch.manual_seed(0)
    model, seen, kept = loud(VLModel(blip.tiny(make))), [], []
    layers = model.decoder.schedule.layers()
    hooks = [model.image.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))]
    hooks += [layer.attend_image.key.register_forward_hook(lambda _, given, out: kept.append(len(given[0])))
              for layer in layers]  # fmt: skip
    ids = generate.caption(model, PIXELS, max_length=9, min_length=9, **options)
    for hook in hooks:
        hook.remove()
    assert ids.shape == (2, 9) and seen == [2] and len(kept) == len(layers)


def test_prompts_of_unequal_lengths_are_gone_on_from_as_alone():
    torch.manual_seed(0)
    model = loud(VLModel(blip.tiny(blip.blip_caption)))
    prompts = torch.tensor([[97, 5, 6], [97, 9, 0]])
    together = generate.caption(model, PIXELS, prompts, prompt_mask=prompts != 0)
    for row, prompt in enumerate(([97, 5, 6], [97, 9])):
        alone = generate.caption(model, PIXELS[row : row + 1], torch.tensor([prompt]))
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert (together[row, alone.shape[1] :] == 0).all()
    with pytest.raises(UserError, match="prompt_mask"):
        generate.caption(model, PIXELS, prompts)


def test_beams_find_a_likelier_text_than_greed(writer):
    """By the search's own measure: the total over the length. Beams keep the greedy text unless they found better."""
    read, scores = context(writer), []
    for beams in (1, 8):
        ids = generate.write(writer.decoder, read, beams=beams, max_length=8, min_length=8)
        with torch.no_grad():
            scores.append(-text_losses(writer.decoder(ids, *read[:2]).logits, ids, smoothing=0.0).sum())
    assert scores[1] >= scores[0] - 1e-4


def test_save_and_load_change_nothing(writer, tmp_path):
    writer.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        a, b = (model.decoder(IDS, *context(model)[:2]).logits for model in (again, writer))
    torch.testing.assert_close(a, b)
    assert torch.equal(generate.write(again.decoder, context(again)), generate.write(writer.decoder, context(writer)))


def test_shared_parts_are_one_also_in_a_copy():
    model = copy.deepcopy(VLModel(blip.tiny()))
    write, fuse = model.decoder.schedule.write[1], model.schedule.fuse[1]
    assert write.ffn is fuse.ffn and write.attend_image is fuse.attend_image and model.decoder.words is model.text
    assert write.attend_self is not fuse.attend_self
    assert not any("write.1.ffn" in name for name in model.state_dict())


def test_a_text_alone_has_passed_the_whole_encoder():
    model = loud(VLModel(blip.tiny()))
    with torch.no_grad():
        end = model.fuse(model.half_text(IDS, MASK), None).text[:, 0]
        torch.testing.assert_close(model.encode_text(IDS, MASK), model.heads["contrast"].project(end, "text"))


def test_momentum_follows_slowly_and_the_queue_turns():
    model = VLModel(blip.tiny())
    slow = Momentum(model, queue=4, decay=0.9)
    before = slow.model.image.project.weight.clone()
    torch.testing.assert_close(before, model.image.project.weight)
    with torch.no_grad():
        model.image.project.weight.add_(1)
    slow.follow(model)
    torch.testing.assert_close(slow.model.image.project.weight, before + 0.1)
    vectors = torch.eye(2, 256)
    for at in (2, 0, 2):
        slow.push(vectors, -vectors)
        assert int(slow.at) == at
    assert torch.equal(slow.text[:, :2], vectors.T) and torch.equal(slow.image[:, 2:], -vectors.T)
    with pytest.raises(UserError, match="multiple"):
        slow.push(torch.zeros(3, 256), torch.zeros(3, 256))


@pytest.mark.parametrize("make,words", [
    (lambda: Decoder({"write": [READ]}, context="picture"), "image or of the text"),
    (lambda: Decoder({"write": [READ]}, shares=("head",)), "can share"),
    (lambda: Decoder({"write": [READ]}, shares=("ffn",)), "set `like`"),
    (lambda: VLModel(blip.tiny(writes=Decoder({"write": [JOINT]}, "text"))), "read and text layers"),
    (lambda: VLModel(blip.tiny(writes=Decoder({"write": [READ]}, "image", ("ffn",), "fuse"))), "cannot share"),
    (lambda: generate.caption(VLModel(blip.tiny(blip.blip_vqa)), PIXELS), "blip_caption"),
    (lambda: generate.answer(VLModel(blip.tiny()), None), "blip_vqa"),
])  # fmt: skip
def test_a_wrong_decoder_is_explained(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("prompt,options,words", [
    ([97, 500], {}, "word 500, but the model knows words 0 to 98"),
    ([97, -1], {}, "word -1, but"),
    ([[97, 5], [97, 6], [97, 7]], {}, "3 prompts and 2 pictures"),
    ([], {}, "begins with the start of a text, the id 97"),
    ([97, *[5] * 24], {}, "the prompt has 25 tokens.* at most 20"),
    ([97], {"max_length": 60, "min_length": 50}, "a text of 33 tokens, but the model has 32 positions"),
    ([97], {"beams": 0}, "at least 1; got 0"),
], ids=["unknown word", "no word", "other pictures", "empty", "longer than the text", "positions", "beams"])
def test_a_prompt_that_cannot_be_gone_on_from_is_explained(prompt, options, words):
    model = VLModel(blip.tiny(blip.blip_caption)).eval()
    with pytest.raises(UserError, match=words):
        generate.caption(model, PIXELS, torch.tensor(prompt, dtype=torch.long), **options)


def test_other_questions_than_pictures_are_explained():
    with pytest.raises(UserError, match="1 questions and 2 pictures"):
        generate.ask(VLModel(blip.tiny(blip.blip_vqa)), IDS[:1], None, PIXELS)
