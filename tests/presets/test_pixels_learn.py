"""The tiny sizes of the systems that read pixels learn a handful of pairs by heart."""

import torch
from torch.nn import functional as F

from interlace import generate
from interlace.model import VLModel
from interlace.objectives.lm import next_word, written
from interlace.presets import blip, clip, vilt


def learn(model, loss, steps):
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
    model.eval()
    return value.item()


def pictures(n):
    """White, black, red, green, with noise."""
    colours = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, -1], [-1, 1, -1]])[:n, :, None, None]
    return colours + 0.1 * torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_blip_writes_the_captions_it_learned():
    torch.manual_seed(0)
    model, pixels = VLModel(blip.tiny(blip.blip_caption)), pictures(4)
    ids = torch.tensor([[97, 10, 11, 12, 3], [97, 20, 21, 3, 0], [97, 10, 31, 3, 0], [97, 40, 3, 0, 0]])
    learn(model, lambda: next_word(model.decoder(ids, model.half_image(pixels).states).logits, written(ids)), 100)
    for beams in (1, 3):
        found = generate.caption(model, pixels, beams=beams, max_length=8, min_length=0)
        assert torch.equal(found[:, :5], ids)


def test_blip_answers_by_the_question_and_the_picture():
    torch.manual_seed(0)
    model, pixels = VLModel(blip.tiny(blip.blip_vqa)), pictures(2)[[0, 0, 1, 1]]
    questions = torch.tensor([[98, 5, 3], [98, 6, 3]])[[0, 1, 0, 1]]
    answers = torch.tensor([[97, 10, 3], [97, 11, 3], [97, 12, 3], [97, 13, 3]])

    def loss():
        text = model.half_text(questions)
        states = model.fuse(text, model.half_image(pixels)).text
        return next_word(model.decoder(answers, states).logits, written(answers))

    learn(model, loss, 100)
    with torch.no_grad():
        asked = generate.ask(model, questions, None, pixels)
    kept, scores = generate.rank_answers(model, asked, answers, k=4)
    assert kept.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(generate.answer(model, asked)[:, :3], answers)


def test_vilt_reads_a_hidden_word_off_the_picture():
    torch.manual_seed(0)
    model, pixels = VLModel(vilt.tiny(heads={"mlm": vilt.words(99)})), pictures(4)
    ids, words = torch.tensor([[2, 4, 3]]).expand(4, -1), torch.tensor([10, 20, 30, 40])
    learn(model, lambda: F.cross_entropy(model.heads["mlm"](model(ids, pixels).text[:, 1]), words), 80)
    with torch.no_grad():
        assert model.heads["mlm"](model(ids, pixels).text[:, 1]).argmax(1).tolist() == words.tolist()


def test_clip_finds_each_picture():
    torch.manual_seed(0)
    model, pixels = VLModel(clip.tiny()), pictures(4)
    ids = torch.tensor([[97, 10 + n, 98] for n in range(4)])

    def logits():
        return model.heads["contrast"].scale * model.encode_text(ids) @ model.encode_image(pixels).T

    learn(model, lambda: F.cross_entropy(logits(), torch.arange(4)) + F.cross_entropy(logits().T, torch.arange(4)), 80)
    with torch.no_grad():
        assert logits().argmax(1).tolist() == list(range(4)) == logits().argmax(0).tolist()
