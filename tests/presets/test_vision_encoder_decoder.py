"""Nine pairs of towers that write captions: built, trained, saved; and the misfits, each with its own message."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from interlace.captioner import (
    CaptionModel,
    Ids,
    caption_labels,
    caption_model,
    caption_model_from_towers,
    labels_of,
    load_captioner,
    load_decoder,
    longest_text,
)
from interlace.cli import main
from interlace.errors import UserError
from interlace.towers import load_tower

WORDS = ["a", "red", "blue", "round", "circle", "bar", "with", "two", "ends"]
IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
BERT = {"vocab_size": 20, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
# as wide as the image: no projection
GPT2 = {"vocab_size": 20, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
VISION = {"vit": (ViTConfig, ViTModel), "beit": (BeitConfig, BeitModel), "deit": (DeiTConfig, DeiTModel)}
# special tokens in order of their ids, template, names of the special tokens; RoBERTa's specials are 0, 1, 2
TOKENS = {
    "gpt2": (["<end>"], None, {"bos_token": "<end>", "eos_token": "<end>"}),
    "roberta": (["<s>", "<pad>", "</s>"], "<s> $A </s>",
                {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>"}),
    "bert": (["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]",
             {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}),
}  # fmt: skip
IDS = {"gpt2": Ids(0, 0, 0), "roberta": Ids(0, 1, 2), "bert": Ids(2, 0, 3)}
TEXT = {"gpt2": (lambda: GPT2Config(**GPT2), GPT2LMHeadModel), "bert": (lambda: BertConfig(**BERT), BertForMaskedLM),
        "roberta": (lambda: RobertaConfig(**BERT), RobertaForMaskedLM)}  # fmt: skip
CAPTIONS = ["a red circle", "a blue bar with two round ends", "bar", "circle with two ends"]
EVERY_PAIR = pytest.mark.parametrize("vision,text", [(vision, text) for vision in VISION for text in TEXT])


def vision_config(name):
    return VISION[name][0](**IMAGE, **({"drop_path_rate": 0.0} if name == "beit" else {}))


def text_config(name):
    return TEXT[name][0]()


def tokenizer_of(name, words=WORDS):
    specials, template, names = TOKENS[name]
    vocabulary = {word: n for n, word in enumerate([*specials, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[-1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        ends = [template.split()[0], template.split()[-1]]
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(e, vocabulary[e]) for e in ends])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if name == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token  # as load_tokenizer does
    return tokenizer


def build(vision, text, **options):
    torch.manual_seed(0)
    return caption_model(vision_config(vision), text_config(text), tokenizer_of(text), **options)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tower as a pre-trained folder."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(1)
    for name, (_, model) in VISION.items():
        model(vision_config(name)).save_pretrained(root / name)
    for name, (_, model) in TEXT.items():
        model(text_config(name)).save_pretrained(root / name)
        tokenizer_of(name).save_pretrained(root / name)
    return root


def contract(model):
    own = model.generation_config
    return {"config": Ids.of_config(model.config), "bos": (model.config.bos_token_id, own.bos_token_id),
            "decoder": (model.config.decoder.bos_token_id, model.config.decoder.pad_token_id,
                        model.config.decoder.eos_token_id),
            "generation": Ids(own.decoder_start_token_id, own.pad_token_id, own.eos_token_id),
            "suppressed": own.suppress_tokens, "length": own.max_length}  # fmt: skip


def trainer(model, rows, folder, tokenizer=None, smoothed=False, **arguments):
    def collate(batch):
        labels = caption_labels(tokenizer, [row["caption"] for row in batch])
        tensors = {"pixel_values": torch.stack([row["pixels"] for row in batch]), "labels": labels}
        if smoothed:
            tensors["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        return tensors

    args = Seq2SeqTrainingArguments(**{
        "output_dir": str(folder), "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
        "save_strategy": "no", "use_cpu": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "logging_steps": 1000, **arguments})  # fmt: skip
    return Seq2SeqTrainer(model, args, data_collator=collate, train_dataset=rows, eval_dataset=rows,
                          processing_class=tokenizer)  # fmt: skip


def rows_of(pixels):
    return [{"pixels": picture, "caption": caption} for picture, caption in zip(pixels, CAPTIONS)]


# ------------------------------------------------------------------------------------------------------------- pairs


@EVERY_PAIR
def test_built_from_configs(vision, text, pixels):
    image, words = vision_config(vision), text_config(text)
    before = image.to_dict(), words.to_dict()
    tokenizer = tokenizer_of(text)
    model = caption_model(image, words, tokenizer)
    assert (image.to_dict(), words.to_dict()) == before
    assert hasattr(model, "enc_to_dec_proj") == (text != "gpt2")
    ids = IDS[text]
    assert contract(model)["config"] == contract(model)["generation"] == ids
    assert contract(model)["decoder"] == (ids.start, ids.pad, ids.end)

    labels = caption_labels(tokenizer, CAPTIONS)
    out = model(pixel_values=pixels, labels=labels)
    assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == []  # no pooler
    assert out.past_key_values is None
    library = VisionEncoderDecoderModel.forward(model, pixel_values=pixels, labels=labels)
    assert_close(out.loss, library.loss)
    assert_close(model(pixel_values=pixels, labels=labels, return_dict=False)[0], out.loss)


@EVERY_PAIR
def test_built_from_pretrained_folders(vision, text, folders, pixels, tmp_path):
    captioner = caption_model_from_towers(folders / vision, folders / text, max_length=12)
    model = captioner.model
    original = load_tower(folders / vision, "image").model
    with torch.no_grad():
        assert_close(model.encoder(pixels).last_hidden_state, original(pixels).last_hidden_state, rtol=0, atol=0)
    theirs = TEXT[text][1].from_pretrained(folders / text).state_dict()
    ours = model.decoder.state_dict()
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert contract(model)["config"] == contract(model)["generation"] == IDS[text]
    captioner.save(tmp_path)
    again = load_captioner(tmp_path)
    assert contract(again.model) == contract(model)
    assert again.pixels == captioner.pixels
    assert again.model.generate(pixels).equal(model.generate(pixels))
    assert caption_labels(again.tokenizer, CAPTIONS).equal(caption_labels(captioner.tokenizer, CAPTIONS))


@EVERY_PAIR
def test_a_folder_of_transformers_writes_from_the_terminal(vision, text, folders, tmp_path, capsys):
    captioner = caption_model_from_towers(folders / vision, folders / text, max_length=12)
    torch.manual_seed(3)
    for parameter in captioner.model.parameters():  # else all pictures are told the same
        parameter.data.normal_(std=0.3)
    VisionEncoderDecoderModel.save_pretrained(captioner.model, tmp_path)
    captioner.tokenizer.save_pretrained(tmp_path)
    told = {"do_normalize": True, "do_resize": True, "size": 32, "resample": 2, "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3}  # fmt: skip  # as older image processors wrote it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    rng, files = np.random.default_rng(0), []
    for n, (height, width) in enumerate([(40, 60), (32, 32), (70, 30)]):
        files.append(str(tmp_path / f"{n}.png"))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(files[-1])
    seen = [Image.open(file).resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0) for file in files]
    pixels = (torch.from_numpy(np.stack([np.asarray(s) for s in seen])).permute(0, 3, 1, 2) / 255 - 0.4) / 0.2
    ids = captioner.model.generate(pixel_values=pixels, num_beams=2)
    expected = [line.strip() for line in captioner.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert main(["caption", str(tmp_path), *files, "--beams", "2", "--json"]) == 0
    assert [line["caption"] for line in json.loads(capsys.readouterr().out)] == expected
    again = load_captioner(tmp_path)
    assert again.caption([Image.open(files[2])], beams=2) == expected[2:]  # alone as among others
    begun = again.caption(map(Image.open, files), prompt="a red", batch=2)
    assert len(begun) == 3 and all(line.startswith("a red") for line in begun)
    assert again.caption([Image.open(files[0])], sample=True, seed=5) == again.caption([Image.open(files[0])],
                                                                                      sample=True, seed=5)  # fmt: skip
    with pytest.raises(UserError, match="the prompt has 11 tokens and the text at most 12"):
        again.caption([seen[0]], prompt="a " * 11)


@EVERY_PAIR
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
                         ids=["greedy", "beams", "sampling"])  # fmt: skip
def test_the_cache_changes_nothing_and_a_picture_is_encoded_once(vision, text, how, pixels):
    model, runs, seen = build(vision, text), [], []
    hook = model.encoder.register_forward_hook(lambda _, args, out: seen.append(len(out[0])))
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(model.generate(pixel_values=pixels, use_cache=use_cache, max_length=10, **how))
    hook.remove()
    assert runs[0].equal(runs[1])
    assert seen == [4, 4]
    assert runs[0][:, 0].eq(IDS[text].start).all()
    assert len(runs[0]) == 4 * how.get("num_return_sequences", 1)
    if text != "gpt2":
        ended = runs[0].eq(IDS[text].end).cumsum(1).gt(0)
        assert not (runs[0].eq(IDS[text].pad) & ~ended).any()  # padding is never a word


@EVERY_PAIR
def test_padding_changes_nothing(vision, text, pixels):
    model, tokenizer = build(vision, text), tokenizer_of(text)
    labels = caption_labels(tokenizer, CAPTIONS)
    padded = F.pad(labels, (0, 4), value=-100)
    with torch.no_grad():
        short, long = (model(pixel_values=pixels, labels=l) for l in (labels, padded))
        assert_close(short.loss, long.loss)
        assert_close(short.logits, long.logits[:, : labels.shape[1]])
        alone = model(pixel_values=pixels[2:3], labels=caption_labels(tokenizer, CAPTIONS[2:3])).logits
        assert_close(alone, short.logits[2:3, : alone.shape[1]])


@EVERY_PAIR
def test_fresh_trained_and_reloaded_alike(vision, text, pixels, tmp_path):
    """Captions of unequal lengths, learnt by heart: it starts, writes and stops as it was trained to."""
    model, tokenizer = build(vision, text, max_length=16), tokenizer_of(text)
    fresh = contract(model)
    run = trainer(model, rows_of(pixels), tmp_path / "run", tokenizer, max_steps=30, learning_rate=1e-2,
                  per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    run.train()
    model.eval()
    assert contract(model) == fresh
    learnt = model.generate(pixel_values=pixels)
    assert tokenizer.batch_decode(learnt, skip_special_tokens=True) == CAPTIONS
    for row, picture in zip(learnt, pixels):
        alone = model.generate(pixel_values=picture[None])[0]
        assert row[: len(alone)].equal(alone)
        assert row[len(alone):].eq(IDS[text].pad).all()
    assert tokenizer.batch_decode(model.generate(pixels, num_beams=3), skip_special_tokens=True) == CAPTIONS

    run.save_model(str(tmp_path / "saved"))
    again = CaptionModel.from_pretrained(tmp_path / "saved").eval()
    assert contract(again) == fresh
    assert again.generate(pixel_values=pixels).equal(learnt)
    library = VisionEncoderDecoderModel.from_pretrained(tmp_path / "saved").eval()
    assert library.generate(pixel_values=pixels).equal(learnt)
    labels = caption_labels(tokenizer, CAPTIONS)
    with torch.no_grad():
        first, second = (m(pixel_values=pixels, labels=labels).logits for m in (model, again))
    assert first.equal(second)


@EVERY_PAIR
def test_gradients_of_small_batches_add_up_to_those_of_a_big_one(vision, text, pixels, tmp_path):
    model, tokenizer = build(vision, text), tokenizer_of(text)
    after, losses = [], []
    for batch, steps in ((4, 1), (1, 4)):
        twin = copy.deepcopy(model)
        run = trainer(twin, rows_of(pixels), tmp_path, tokenizer, max_steps=1, learning_rate=1.0, optim="sgd",
                      per_device_train_batch_size=batch, gradient_accumulation_steps=steps)  # fmt: skip
        losses.append(run.train().training_loss)
        after.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    with torch.no_grad():
        whole = model(pixel_values=pixels, labels=caption_labels(tokenizer, CAPTIONS)).loss
    assert losses == pytest.approx([whole.item()] * 2, rel=1e-5)
    assert (after[0] - torch.cat([p.detach().flatten() for p in model.parameters()])).norm() > 0.1
    assert_close(after[1], after[0], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("text", TEXT)
def test_trainer_smooths_labels_evaluates_and_predicts(text, pixels, tmp_path):
    model, tokenizer = build("vit", text, max_length=8), tokenizer_of(text)
    run = trainer(model, rows_of(pixels), tmp_path, tokenizer, smoothed=True, label_smoothing_factor=0.1, max_steps=1,
                  predict_with_generate=True, per_device_eval_batch_size=2)  # fmt: skip
    run.train()
    predicted = run.predict(rows_of(pixels))
    assert predicted.predictions.shape == (4, 8)
    assert (predicted.predictions[:, 0] == IDS[text].start).all()
    plain = trainer(model, rows_of(pixels), tmp_path, tokenizer, per_device_eval_batch_size=2)
    assert plain.evaluate()["eval_loss"] > 0


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("text,expected", [
    ("gpt2", [[1, 2, 5, 0], [6, 0, -100, -100]]),
    ("roberta", [[3, 4, 7, 2], [8, 2, -100, -100]]),
    ("bert", [[4, 5, 8, 3], [9, 3, -100, -100]])])  # fmt: skip
def test_labels_have_no_start_and_one_end(text, expected):
    tokenizer, ids = tokenizer_of(text), IDS[text]
    labels = caption_labels(tokenizer, ["a red circle", "bar"])
    assert labels.tolist() == expected
    read = build("vit", text).prepare_decoder_input_ids_from_labels(labels)
    assert read.tolist() == [[ids.start, *expected[0][:-1]], [ids.start, expected[1][0], ids.end, ids.pad]]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        made = tokenizer(["a red circle", "bar"], padding=True, return_tensors="pt")
        assert labels_of(made["input_ids"], made["attention_mask"], ids).tolist() == expected
    assert caption_labels(tokenizer, ["a red circle"], max_length=3).tolist() == [[*expected[0][:2], ids.end]]


def test_labels_padded_on_the_left_are_refused(pixels):
    model = build("vit", "bert")
    with pytest.raises(UserError, match="before a scored token"):
        model(pixel_values=pixels[:1], labels=torch.tensor([[-100, 5, 3]]))
    prompt = torch.tensor([[2, 4, 5]])  # read, its first word not scored
    given = model(pixel_values=pixels[:1], labels=torch.tensor([[-100, 5, 3]]), decoder_input_ids=prompt)
    assert_close(given.loss, F.cross_entropy(given.logits[0, 1:], torch.tensor([5, 3])))


def test_one_caption_is_no_list():
    with pytest.raises(UserError, match="list of captions"):
        caption_labels(tokenizer_of("bert"), "a bar")


# --------------------------------------------------------------------------------------------------------------- ids


def test_ids_are_changed_together_or_not_used(pixels):
    model = build("vit", "roberta")
    model.config.decoder_start_token_id = 2  # as TrOCR starts; training would shift by it, generate would not
    with pytest.raises(UserError, match="set_ids"):
        model.generate(pixels)
    model.set_ids(Ids(2, 1, 2))
    assert model.generate(pixels, max_length=4)[:, 0].eq(2).all()
    model.set_ids(Ids(2, 1, 5))
    said = contract(model)
    assert said["config"] == said["generation"] == Ids(2, 1, 5)
    assert (said["bos"], said["decoder"]) == ((2, 2), (2, 1, 5))


@pytest.mark.parametrize("ids,message", [(Ids(2, 0, 99), "0 to 19"), (Ids(2, 1, 3), "built to pad with 0")])
def test_ids_the_tower_cannot_have(ids, message):
    with pytest.raises(UserError, match=message):
        build("vit", "bert").set_ids(ids)


def test_roberta_cannot_start_with_padding():
    with pytest.raises(UserError, match="counts positions"):
        caption_model(vision_config("vit"), text_config("roberta"), Ids(1, 1, 2))


@pytest.mark.parametrize("name,lost,message", [
    ("gpt2", "pad_token", "no padding token. Set tokenizer.pad_token"),
    ("roberta", "eos_token", "no end"), ("bert", "cls_token", "no start"),
    ("bert", "pad_token", "no padding")])  # fmt: skip
def test_a_tokenizer_without_one_of_them(name, lost, message):
    tokenizer = tokenizer_of(name)
    setattr(tokenizer, lost, None)
    with pytest.raises(UserError, match=message):
        caption_model(vision_config("vit"), text_config(name), tokenizer)


def test_a_config_without_ids_is_refused():
    make = VisionEncoderDecoderModel.config_class.from_encoder_decoder_configs
    config = make(vision_config("vit"), text_config("bert"))
    with pytest.raises(UserError, match="decoder_start_token_id, pad_token_id, eos_token_id"):
        CaptionModel(config)


def test_a_saved_tokenizer_of_other_ids(folders, tmp_path):
    captioner = caption_model_from_towers(folders / "vit", folders / "bert")
    captioner.save(tmp_path)
    tokenizer_of("roberta").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with"):
        load_captioner(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no preprocessor_config"):
        load_captioner(tmp_path)


# ----------------------------------------------------------------------------------------------------------- misfits


def test_towers_in_each_others_place(folders):
    image, words, tokenizer = vision_config("beit"), text_config("bert"), tokenizer_of("bert")
    with pytest.raises(UserError, match="Expected the image tower, got bert"):
        caption_model(words, image, tokenizer)
    with pytest.raises(UserError, match="Expected the text tower, got beit"):
        caption_model(image, image, tokenizer)
    with pytest.raises(UserError, match=r"Expected a text tower, but .* is an image tower"):
        caption_model_from_towers(folders / "vit", folders / "deit")
    with pytest.raises(UserError, match=r"Expected an image tower, but .* is a text tower"):
        caption_model_from_towers(folders / "bert", folders / "gpt2")
    with pytest.raises(UserError, match="caption_model_from_towers"):
        caption_model("vit", words, tokenizer)


def test_towers_that_do_not_fit():
    image, words, tokenizer = vision_config("vit"), text_config("bert"), tokenizer_of("bert")
    llama = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="no layers that read a picture"):
        caption_model(image, llama, tokenizer)
    with pytest.raises(UserError, match="gives a map"):
        caption_model(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), words, tokenizer)
    with pytest.raises(UserError, match="load_decoder"):
        caption_model(image, BertModel(words), tokenizer)
    with pytest.raises(UserError, match="no layers that read a picture"):
        caption_model(image, GPT2LMHeadModel(text_config("gpt2")), tokenizer)
    words.cross_attention_hidden_size = 32
    with pytest.raises(UserError, match="enc_to_dec_proj"):
        caption_model(image, words, tokenizer)


def test_a_classifier_folder_is_read_without_its_head(folders, tmp_path, pixels):
    original = ViTForImageClassification(vision_config("vit")).eval()
    original.save_pretrained(tmp_path)
    model = caption_model_from_towers(tmp_path, folders / "bert").model
    with torch.no_grad():
        assert_close(model.encoder(pixels).last_hidden_state, original.vit(pixels).last_hidden_state)
    with pytest.raises(UserError, match="which has a head"):
        caption_model(original, text_config("bert"), tokenizer_of("bert"))


def test_a_pooler_that_came_along_is_dropped(pixels, tmp_path):
    tower = BeitModel(vision_config("beit"))
    assert tower.pooler is not None
    model = caption_model(tower, text_config("bert"), tokenizer_of("bert"))
    model(pixel_values=pixels[:1], labels=torch.tensor([[5, 3]])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_vocabularies(folders, pixels):
    image, larger = vision_config("vit"), tokenizer_of("gpt2", [*WORDS, *map(str, range(12))])
    with pytest.raises(UserError, match=r"ids up to 21, but the text tower's vocabulary is 20.*vocab_size=22"):
        caption_model(image, text_config("gpt2"), larger)
    text = load_decoder(folders / "gpt2")
    with pytest.raises(UserError, match=r"resize_token_embeddings\(22\)"):
        caption_model(image, text, larger)
    text.resize_token_embeddings(22)
    model = caption_model(image, text, larger)
    assert model(pixel_values=pixels[:1], labels=caption_labels(larger, ["a 11"])).logits.shape == (1, 3, 22)
    with pytest.raises(UserError, match="was trained with 300"):
        wide = GPT2Config(**{**GPT2, "vocab_size": 300}, add_cross_attention=True)
        caption_model(image, GPT2LMHeadModel(wide), larger)


def test_growing_the_vocabulary_keeps_the_model_whole(pixels, tmp_path):
    model = build("vit", "gpt2")
    model.resize_token_embeddings(26)
    assert model.config.decoder.vocab_size == 26
    labels = torch.tensor([[25, 0]])
    loss = model(pixel_values=pixels[:1], labels=labels).loss
    model.save_pretrained(tmp_path)
    assert CaptionModel.from_pretrained(tmp_path).eval()(pixel_values=pixels[:1], labels=labels).loss == loss


@pytest.mark.parametrize("text,longest", [("gpt2", 24), ("bert", 24), ("roberta", 22)])
def test_lengths_end_with_the_positions(text, longest, pixels):
    model = build("vit", text)
    assert longest_text(model.decoder) == model.generation_config.max_length == longest
    model(pixel_values=pixels[:1], labels=torch.full((1, longest), 5))
    with pytest.raises(UserError, match=f"positions for {longest}"):
        model(pixel_values=pixels[:1], labels=torch.full((1, longest + 1), 5))
    with pytest.raises(UserError, match=f"positions for {longest}"):
        build("vit", text, max_length=longest + 1)
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), IDS[text].end]
    assert model.generate(pixels[:1]).shape == (1, longest)


def test_a_folder_of_an_encoder_alone_gets_a_new_head_and_says_so(folders, tmp_path, capsys):
    BertModel(text_config("bert")).save_pretrained(tmp_path)
    load_decoder(tmp_path)
    assert "no word head" in capsys.readouterr().err
    GPT2Model(text_config("gpt2")).save_pretrained(tmp_path / "gpt2")
    load_decoder(tmp_path / "gpt2")  # its head is its word table
    assert "no word head" not in capsys.readouterr().err
    config = json.loads((folders / "bert" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="unfilled"):
        load_decoder(tmp_path)


def test_keys_on_disk_are_those_of_the_hub(tmp_path):
    from safetensors import safe_open

    build("vit", "roberta").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "encoder.encoder.layer.0.attention.attention.query.weight" in names
    assert "decoder.roberta.encoder.layer.1.crossattention.self.key.weight" in names
    assert "decoder.lm_head.decoder.weight" not in names  # tied
