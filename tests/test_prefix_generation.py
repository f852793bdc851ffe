"""Writing with the model's own layers: what is kept between steps changes nothing, nor does padding or the batch."""

import pytest
import torch
from test_prefix_lm import SCHEDULES, WIDE_PRE, build, with_decoder, with_tower

from interlace import generate
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import Half
from interlace.objectives.mlm import word_logits
from interlace.objectives.prefix_lm import read_and_write
from interlace.prefix_generation import PrefixWriter
from interlace.presets import lxmert, mlim, uniter, vilbert, vilt, visual_bert
from tests.boxes import ordered

START, END, PAD = 1, 2, 0
MODELS = {**SCHEDULES, "gpt2": with_tower("gpt2"), "gpt2, wider": with_tower("gpt2", WIDE_PRE, "transformed")}
PROMPTS = torch.tensor([[START, 7, 8, 9], [START, 11, PAD, PAD], [START, PAD, PAD, PAD]])
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "two of four beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def writer(request):
    return PrefixWriter(build(MODELS[request.param]), START, END, PAD)


@pytest.fixture(scope="module")
def picture(writer):
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        half = writer.model.half_image(pixels)
    mask = torch.ones(half.states.shape[:2], dtype=torch.bool)
    mask[1, 3:] = False
    return Half(half.states, mask)


def write(writer, picture, prompts=PROMPTS, **options):
    torch.manual_seed(5)
    return writer.generate(prompts, prompts != PAD, picture, max_new_tokens=6, return_dict_in_generate=True,
                           output_logits=True, suppress_tokens=[PAD], **options)  # fmt: skip


def words(row):
    """The ids of a row without padding on either side."""
    return [n for n in row.tolist() if n != PAD]


@pytest.mark.parametrize("way", WAYS)
def test_cached_equals_uncached(writer, picture, way):
    cached, plain = (write(writer, picture, use_cache=kept, **WAYS[way]) for kept in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert len(cached.logits) == len(plain.logits) > 1
    for a, b in zip(cached.logits, plain.logits):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_each_step_says_what_one_pass_over_the_whole_text_does(writer, picture):
    out = write(writer, picture, do_sample=False)
    for row in range(3):
        ids = torch.tensor([words(out.sequences[row])])
        given = int((PROMPTS[row] != PAD).sum())
        image = picture.rows(torch.tensor([row]))
        with torch.no_grad():
            text = read_and_write(writer.model, ids, None, torch.tensor([given]), image).text
            whole = word_logits(writer.model, text)[0]
        for n in range(ids.shape[1] - given):
            torch.testing.assert_close(out.logits[n][row], whole[given - 1 + n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_row_of_a_batch_is_written_as_alone(writer, picture, way):
    together = write(writer, picture, **WAYS[way]).sequences
    for row in range(3):
        image = picture.rows(torch.tensor([row]))
        prompt = PROMPTS[row : row + 1]
        real = Half(image.states[:, : int(image.mask.sum())], None)
        alone = write(writer, real, prompt[prompt != PAD].unsqueeze(0), **WAYS[way]).sequences
        assert words(alone[0]) == words(together[row])


def test_prompts_may_be_padded_on_either_side(writer, picture):
    left = torch.tensor([[START, 7, 8, 9], [PAD, PAD, START, 11], [PAD, PAD, PAD, START]])
    assert torch.equal(write(writer, picture, left).sequences, write(writer, picture).sequences)


def test_the_picture_is_read_once_whatever_the_beams(writer, picture):
    rows = []
    hooks = [layer.register_forward_pre_hook(lambda layer, given: rows.append(len(given[0].image)) if
                                             given[0].image is not None and given[0].image.shape[1] else None)
             for layer in writer.model.schedule.layers()]  # fmt: skip
    write(writer, picture, **WAYS["beams"])
    for hook in hooks:
        hook.remove()
    assert rows == [3] * (len(hooks) - writer.model.fusion_depth)


def test_nothing_is_cached_wrongly_without_a_picture(writer):
    cached, plain = (write(writer, None, use_cache=kept, do_sample=False) for kept in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits[-1], plain.logits[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", [uniter, visual_bert, lxmert, vilbert, vilt, mlim], ids=lambda p: p.__name__[18:])
def test_the_published_single_stacks_write(preset):
    model = build(preset.tiny())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if preset in (vilt, mlim):
            image = model.half_image(torch.rand(2, 3, 32, 32, generator=draw))
        else:
            boxes = ordered(torch.rand(2, 4, model.config.image.boxes, generator=draw))
            regions = Regions(torch.rand(2, 4, 20, generator=draw), boxes if boxes.numel() else None)
            image = model.half_image(regions, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    writer = PrefixWriter(model, START, END, PAD)
    prompts = PROMPTS[:2]
    for way in ("greedy", "beams"):
        cached, plain = (write(writer, image, prompts, use_cache=kept, **WAYS[way]) for kept in (True, False))
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(cached.logits[-1], plain.logits[-1], atol=1e-5, rtol=1e-5)


def test_more_words_than_positions_are_explained(writer, picture):
    with pytest.raises(UserError, match="24 positions"):
        writer.generate(PROMPTS, PROMPTS != PAD, picture, max_length=25)


# --------------------------------------------------------------------------------------------- encoder and decoder


@pytest.fixture(scope="module", params=SCHEDULES)
def pair(request):
    """A model whose decoder goes on from what the whole of it has read of the prompt and the picture."""
    return with_decoder(SCHEDULES[request.param])


@pytest.fixture(scope="module")
def seen(pair):
    with torch.no_grad():
        half = pair.half_image(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
    mask = torch.ones(half.states.shape[:2], dtype=torch.bool)
    mask[1, 3:] = False
    return Half(half.states, mask)


DRAWN = {"beams": 1, "do_sample": True, "top_p": 0.9, "num_return_sequences": 2}


def describe(pair, seen, prompts=PROMPTS, **options):
    torch.manual_seed(5)
    return generate.describe(pair, seen, prompts, prompt_mask=prompts != PAD, max_length=10,
                             **{"min_length": 0, **options})  # fmt: skip


@pytest.mark.parametrize("way", [{"beams": 1}, {"beams": 3}, {"beams": 4, "num_return_sequences": 2}, DRAWN],
                         ids=["greedy", "beams", "two of four beams", "sampled"])  # fmt: skip
def test_a_decoder_that_goes_on_from_a_prompt_writes_alike_with_and_without_memory(pair, seen, way):
    cached, plain = (describe(pair, seen, use_cache=kept, **way) for kept in (True, False))
    assert torch.equal(cached, plain) and len(cached) == 3 * way.get("num_return_sequences", 1)
    for row, ids in enumerate(cached.view(3, -1, cached.shape[1])):
        prompt = PROMPTS[row][PROMPTS[row] != PAD]
        assert (ids[:, : len(prompt)] == prompt).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_goes_on_from_each_prompt_as_alone(pair, seen, beams):
    together = describe(pair, seen, beams=beams)
    left = torch.tensor([[START, 7, 8, 9], [PAD, PAD, START, 11], [PAD, PAD, PAD, START]])
    assert torch.equal(describe(pair, seen, left, beams=beams), together)
    for row in range(3):
        image = seen.rows(torch.tensor([row]))
        real = Half(image.states[:, : int(image.mask.sum())], None)
        prompt = PROMPTS[row][PROMPTS[row] != PAD]
        alone = generate.describe(pair, real, prompt, beams=beams, max_length=10, min_length=0)[0]
        assert torch.equal(together[row, : len(alone)], alone) and not (together[row, len(alone) :] != PAD).any()


def test_what_a_decoder_goes_on_from_is_read_once(pair, seen):
    rows, kept, layers = [], [], pair.decoder.schedule.layers()
    hooks = [layer.register_forward_pre_hook(lambda layer, given: rows.append(1)) for layer in pair.schedule.layers()]
    hooks += [layer.attend_image.key.register_forward_pre_hook(lambda *_: kept.append(1)) for layer in layers]
    generate.describe(pair, seen, torch.tensor([START, 7]), beams=3, max_length=9, min_length=9)
    for hook in hooks:
        hook.remove()
    assert len(rows) == len(pair.schedule.layers()) and len(kept) == len(layers)


def test_padded_prompts_without_a_mask_are_explained(pair, seen, writer, picture):
    for model, half in ((pair, seen), (writer.model, picture)):
        with pytest.raises(UserError, match="prompt_mask"):
            generate.describe(model, half, PROMPTS, (START, END, PAD))
