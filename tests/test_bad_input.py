"""What training is given and cannot use: one clear error before the first step, or rows that hurt nobody."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from interlace import train as module
from interlace.checkpoints import newest_complete, step_of
from interlace.cli import main
from interlace.compose import Composition
from interlace.data.pictures import open_picture
from interlace.data.sources import open_source
from interlace.errors import Stopped, UserError
from interlace.objectives import MLM, MRFR
from interlace.run import Run, write_json
from interlace.settings import load_settings
from interlace.train import train
from tests.conftest import toy_settings, write_shapes

FAST = {"steps": 2, "batch": 8, "evaluate": False, "log_every": 1}


@pytest.fixture
def settings(shapes, text_tower, tmp_path):
    def made(**changes):
        return toy_settings(shapes, text_tower, tmp_path / "run", **{**FAST, **changes})

    return made


def small(recipe, source, text_tower, image_tower, out, *more):
    """A small recipe over toy towers."""
    made = load_settings(recipe, list(more))
    image = "patches" if made.model.image == "patches" else str(image_tower)
    made.model = Composition(system=made.model.system, text=str(text_tower), image=image, width=32, heads=4, layers=2,
                             size=64, patch=16, max_length=16)  # fmt: skip
    made.data.source, made.train.out = str(source), str(out)
    for key, value in FAST.items():
        setattr(made.train, key, value)
    return made


# ------------------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_all_or_none_cannot_be_hidden(share):
    with pytest.raises(UserError, match=r"mlm\.mask is the share of words to hide, above 0 .*below 1"):
        MLM(mask=share)
    with pytest.raises(UserError, match=r"mrfr\.mask is the share of regions to hide"):
        MRFR(mask=share)
    if share != 0.0:
        with pytest.raises(UserError, match=r"mrfr\.kept is the share of the chosen regions that stay visible"):
            MRFR(kept=share)


@pytest.mark.parametrize("objectives, words", [
    ({"itc": {"size": 8}}, "itc tells the rows of a batch apart, and a batch of 1 has nothing to tell"),
    ({"itc_sigmoid": {"size": 8}}, "itc_sigmoid tells the rows of a batch apart"),
    ({"itc": {"size": 8}, "itm": {"negatives": "hard"}}, "itc tells|among the 1 row of a micro-batch"),
])  # fmt: skip
def test_one_row_has_nobody_to_be_compared_with(objectives, words, settings):
    one = settings(batch=1)
    one.objectives = objectives
    with pytest.raises(UserError, match=words):
        train(one)
    assert not Path(one.train.out).exists()


def test_hard_negatives_want_more_than_a_row_at_a_time(settings):
    cut = settings(batch=8, accumulate=8)
    cut.objectives = {"itc": {"size": 8}, "itm": {"negatives": "hard"}}
    with pytest.raises(UserError, match=r"among the 1 row of a micro-batch: set objectives\.itm\.among=batch"):
        train(cut)


@pytest.mark.parametrize("change, words", [
    ({"batch": 0}, r"train\.batch is at least 1; got 0"),
    ({"batch": -8}, r"train\.batch is at least 1; got -8"),
    ({"accumulate": 0}, r"train\.accumulate is at least 1; got 0"),
    ({"steps": -1}, r"train\.steps is at least 0"),
    ({"steps": 0, "epochs": 0}, r"train\.epochs is above 0"),
    ({"lr": -1e-3}, r"train\.lr is at least 0"),
    ({"log_every": 0}, r"train\.log_every is at least 1"),
    ({"schedule": "linaer"}, r"train\.schedule is cosine, linear, epochs, constant.*Did you mean 'linear'"),
    ({"betas": [0.9]}, r"train\.betas are two numbers"),
    ({"betas": [0.9, 1.0]}, r"train\.betas are two numbers"),
    ({"eps": 0.0}, r"train\.eps is above 0"),
    ({"mix": "drawn"}, r"train\.mix is sum, draw, turns.*Did you mean 'draw'"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_named(change, words, settings):
    with pytest.raises(UserError, match=words):
        train(settings(**change))


@pytest.mark.parametrize("passes, words", [
    ("mlm", "passes: expected a list of mappings"),
    ({"mlm": {}}, "passes: expected a list of mappings"),
    (["mlm"], "passes: expected a list of mappings"),
    ([{}], "passes: expected a list of mappings"),
    ([{"mlm": {}, "share": 0}], r"passes\.share is how often a pass is drawn, above 0; got 0"),
    ([{"mlm": {}, "share": "often"}], r"passes\.share: expected a number, got 'often'"),
    ([{"mlm": {}, "image": "no picture"}], r"passes\.image: expected true or false"),
    ([{"mlmm": {}}], "no objective is called 'mlmm'.*Did you mean 'mlm'"),
    ([{"mlm": {"weight": "heavy"}}], r"mlm\.weight: expected a number"),
    ([{"mlm": 0.15}], "mlm: expected its options"),
    ([{"mlm": False}], "no objective is left to learn by"),
    ([{"share": 3}], "no objective is left to learn by"),
])  # fmt: skip
def test_malformed_passes_are_explained(passes, words, shapes, text_tower, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"passes": passes}))
    with pytest.raises(UserError, match=words):
        made = load_settings(file, [f"data.source={shapes}", f"train.out={tmp_path / 'run'}", "train.batch=8"])
        made.model = toy_settings(shapes, text_tower, tmp_path).model
        train(made)


@pytest.mark.parametrize("rows, mend", [(6, r"set train\.batch=3\."), (3, "it takes 4 rows to learn from")])
def test_a_table_smaller_than_a_batch_gets_advice_that_can_be_followed(rows, mend, text_tower, tmp_path):
    table = tmp_path / "table.csv"
    for n in range(rows):
        Image.new("RGB", (64, 64), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
    lines = [f"{n}.png,a thing,{n},train" for n in range(rows)]
    table.write_text("\n".join(["image,caption,group,split", *lines]))
    made = toy_settings(table, text_tower, tmp_path / "run")
    made.train.batch = 8
    with pytest.raises(UserError, match=f"has {rows} rows, fewer than one batch of 8: {mend}"):
        train(made)


def test_objectives_beside_passes_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"passes": [{"mlm": {}}], "objectives": {"itc": {}}}))
    with pytest.raises(UserError, match=r"give either objectives.*or passes"):
        load_settings(file)


def test_an_objective_its_system_has_no_part_for_says_which_have(shapes, text_tower, image_tower, tmp_path):
    before = small("blip-small", shapes, text_tower, image_tower, tmp_path / "before", "train.steps=1")
    made = small("blip-small", shapes, text_tower, image_tower, tmp_path / "run")
    made.model.start = str(train(before))  # none of its objectives hid a cell, so it has nothing to put there
    made.passes = [{"wra": {}, "mrfr": {}}]
    with pytest.raises(UserError, match=r"mrfr hides parts of the picture, and .* part 'image_stem' has nothing.*"
                       r"Systems that have it: vilbert, lxmert, visual_bert, vl_bert, uniter\."):  # fmt: skip
        train(made)


def test_a_decoder_that_reads_something_else_says_which_systems_have_one():
    from interlace.model import VLModel
    from interlace.objectives import LM
    from interlace.presets import uniter

    with pytest.raises(UserError, match=r"lm wants a decoder that reads the picture, and this model has none.*"
                       "Systems that have it: blip, vision_encoder_decoder"):  # fmt: skip
        LM().check(VLModel(uniter.tiny()))


@pytest.mark.parametrize("objective, systems", [("mrc", "uniter"), ("mrc_kl", "uniter"), ("mvrc", "vl_bert"),
                                                ("region_labels", "lxmert")])  # fmt: skip
def test_a_head_that_only_presets_bring_is_said_with_who_has_it(objective, systems, settings):
    made = settings()
    made.objectives = {objective: {}}
    with pytest.raises(UserError, match=rf"{objective}.* needs the '\w+' head.* Systems that have it: .*{systems}"):
        train(made)


# ------------------------------------------------------------------------------------------------------------- captions

WITH_CAPTIONS = ["uniter-small", "visual_bert-small", "vl_bert-small", "lxmert-small", "vilbert-small", "vilt-small",
                 "blip-small", "mlim-small", "vision_encoder_decoder-small", "clip-small"]  # fmt: skip


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """The shapes, two captions in three of them empty: some batches have none at all."""
    folder = write_shapes(tmp_path_factory.mktemp("silent") / "table", variants=4)
    rows = (folder / "pairs.csv").read_text().splitlines()
    for n in range(1, len(rows)):
        cells = rows[n].split(",")
        if n % 3:
            cells[2] = ""
        rows[n] = ",".join(cells)
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("recipe", WITH_CAPTIONS)
def test_rows_without_a_caption_hurt_no_objective(recipe, silent, text_tower, image_tower, tmp_path):
    made = small(recipe, silent, text_tower, image_tower, tmp_path / "run")
    made.train.batch, made.train.steps = 2, 6
    made.train.keep_checkpoints = False
    weights = torch.cat([p.flatten() for p in loaded(train(made))])
    assert weights.isfinite().all()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
              if '"loss"' in line]  # fmt: skip
    assert len(losses) == 6 and all(abs(loss) < 1e4 for loss in losses)


def loaded(folder):
    from safetensors.torch import load_file

    return [t.float() for t in load_file(folder / "model.safetensors").values() if t.is_floating_point()]


def test_no_caption_at_all_is_said_before_training(shapes, text_tower, image_tower, tmp_path):
    folder = tmp_path / "table"
    shutil.copytree(shapes, folder)
    rows = [line.split(",") for line in (folder / "pairs.csv").read_text().splitlines()]
    (folder / "pairs.csv").write_text("\n".join(",".join([*r[:2], "" if n else r[2], *r[3:]])
                                                for n, r in enumerate(rows)) + "\n")  # fmt: skip
    with pytest.raises(UserError, match=r"the mlm objective needs captions, and the first 1,000 rows .* have none"):
        train(small("visual_bert-small", folder, text_tower, image_tower, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ numbers that are none


def test_a_loss_that_is_no_number_stops_the_run_and_names_rows_and_losses(shapes, text_tower, image_tower, tmp_path):
    """A mixed pass whose weights flew apart: the rows are those of the step, the losses those of its objectives."""
    made = small("visual_bert-small", shapes, text_tower, image_tower, tmp_path / "run", "train.lr=1e20",
                 "train.clip=0", "train.mix=sum")  # fmt: skip
    made.train.steps, made.train.warmup, made.train.start_lr, made.train.checkpoint_every = 4, 0.0, 0.0, 1
    with pytest.raises(UserError, match=r"is not a finite number.*bad_batch\.json.*a lower learning rate"):
        train(made)
    bad = json.loads((tmp_path / "run/checkpoints/bad_batch.json").read_text())
    assert len(bad["ids"]) == 8 and all(row.count("-") == 2 for row in bad["ids"])
    assert {"mlm", "itm", "both/itm"} <= bad["ranks"][0]["losses"].keys()
    good = newest_complete(tmp_path / "run/checkpoints")
    assert step_of(good) == bad["step"] - 1  # of the last step whose loss was a number, and of none after it
    files = {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=f"step {bad['step']} is not a finite number"):
        train(made)  # going on comes to the same rows, which is how to look at them
    assert json.loads((tmp_path / "run/checkpoints/bad_batch.json").read_text())["ids"] == bad["ids"]
    assert {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()} == files


# --------------------------------------------------------------------------------------------------- data that changed


def test_a_run_does_not_go_on_over_other_data(shapes, text_tower, tmp_path, monkeypatch):
    folder = tmp_path / "table"
    shutil.copytree(shapes, folder)
    made = toy_settings(folder, text_tower, tmp_path / "run", **{**FAST, "steps": 4, "checkpoint_every": 2})
    step = module.VLTrainer.training_step

    def stops(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped("here", 1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module.VLTrainer, "training_step", stops)
        with pytest.raises(Stopped):
            train(made)
    table = folder / "pairs.csv"
    before = table.read_text()
    table.write_text(before.replace("a red circle", "a big red circle"))
    with pytest.raises(UserError, match=r"the data changed since the run in .* began \(as many rows, other contents\)"):
        train(made)
    table.write_text("\n".join(before.splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match=r"it had 144 rows to train on and 48 others, now 143 .*remove .*data\.json"):
        train(made)
    table.write_text(before)
    assert (train(made) / "run.json").is_file()  # as it was: the run goes on


# ------------------------------------------------------------------------------------------- runs that were damaged


@pytest.fixture(scope="module")
def hardly_trained(shapes, text_tower, tmp_path_factory):
    return train(toy_settings(shapes, text_tower, tmp_path_factory.mktemp("bad") / "run", **FAST))


@pytest.fixture
def copy(hardly_trained, tmp_path):
    return Path(shutil.copytree(hardly_trained, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["run.json", "config.json", "answers.json", "preprocessor_config.json",
                                  "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("content", ["{", "{}", "[]", "", "\xff"])
def test_a_damaged_run_names_the_file(name, content, copy):
    (copy / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as error:
        Run.load(copy)
    said = str(error.value)
    assert said.startswith(f"{copy} is damaged: {name} cannot be read (")
    assert said.endswith("): copy the run again, or train it again.") and "\n" not in said


def test_commands_say_so_without_a_traceback(copy, capsys):
    (copy / "config.json").write_text("{")
    assert main(["search", str(copy), "red"]) == 2
    assert f"error: {copy} is damaged: config.json cannot be read" in capsys.readouterr().err


def test_parts_of_a_run_that_are_missing(copy):
    answers = json.loads((copy / "answers.json").read_text())
    (copy / "answers.json").write_text(json.dumps({"answers": answers["answers"]}))
    with pytest.raises(UserError, match=r"answers\.json cannot be read \(it has no temperature\): copy the run again"):
        Run.load(copy)
    (copy / "answers.json").write_text(json.dumps(answers))
    (copy / "tokenizer_config.json").write_text("{")  # the words are whole, what is said of them is not
    with pytest.raises(UserError, match=r"damaged: tokenizer_config\.json cannot be read"):
        Run.load(copy)
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"copy has no tokenizer\.json: copy the run again"):
        Run.load(copy)


def test_weights_of_zeros_and_of_other_sizes(copy):
    size = (copy / "model.safetensors").stat().st_size
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"damaged: model\.safetensors cannot be read \(.*\): copy the run again"):
        Run.load(copy)
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    config["heads"]["contrast"]["size"] *= 2
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit its config\.json \(sizes differ\)"):
        Run.load(copy)
    config["text"] = {"embed": config["text"]["embed"]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"damaged: config\.json cannot be read \(it has no width\)"):
        Run.load(copy)


def test_a_damaged_config_of_the_training(copy):
    run = Run.load(copy)
    (copy / "config.yaml").write_text("objectives: [")
    with pytest.raises(UserError, match=r"damaged: config\.yaml cannot be read"):
        _ = run.learnt


# ---------------------------------------------------------------------------------------- other types than expected


@pytest.mark.parametrize("call, words", [
    (lambda run, red: run.encode_texts("hello"), r"expected a list of texts, got 'hello' \(str\): put it into a list"),
    (lambda run, red: run.encode_texts(None), r"expected a list of texts, got None \(NoneType\)\."),
    (lambda run, red: run.encode_texts(["a", 3]), r"expected a text, got 3 \(int\)"),
    (lambda run, red: run.encode_pictures(["0.png"]), r"expected a picture .*got '0\.png' \(str\): .*open_picture"),
    (lambda run, red: run.encode_pictures([np.zeros((9, 9))]), r"expected a picture .*\(ndarray\)\."),
    (lambda run, red: run.encode_pictures("0.png"), r"expected a list of pictures, got '0\.png'"),
    (lambda run, red: run.encode_pictures(red), r"expected a list of pictures, got .*put it into a list"),
    (lambda run, red: run.match(["red"], [red]), r"expected a text, got \['red'\] \(list\)"),
    (lambda run, red: run.match("red", red), "expected a list of pictures"),
    (lambda run, red: run.answer("0.png", "what is it?"), r"expected a picture .*open_picture opens one"),
    (lambda run, red: run.answer(red, None), r"expected a question, got None"),
    (lambda run, red: run.answer(red, "what is it?", "red"), r"expected a list of answers, got 'red'"),
    (lambda run, red: run.answer_logits([red], "what is it?"), r"expected a list of questions"),
])  # fmt: skip
def test_a_run_says_what_it_expects(call, words, hardly_trained):
    with pytest.raises(UserError, match=words):
        call(Run.load(hardly_trained), Image.new("RGB", (40, 30), "red"))


def test_pictures_of_any_mode_are_seen_as_their_files_are(hardly_trained, tmp_path):
    run, rng = Run.load(hardly_trained), np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    glass = colours.copy()
    glass.putalpha(Image.fromarray(rng.integers(0, 255, (40, 30), dtype=np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65535, (40, 30), dtype=np.uint16))
    pictures = {"grey.png": colours.convert("L"), "glass.png": glass, "palette.png": colours.convert("P"),
                "deep.png": deep, "ink.tif": colours.convert("CMYK"), "bits.png": colours.convert("1")}  # fmt: skip
    assert [p.mode for p in pictures.values()] == ["L", "RGBA", "P", "I;16", "CMYK", "1"]
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    files = run.encode_pictures([open_picture(tmp_path / name) for name in pictures])
    np.testing.assert_array_equal(run.encode_pictures(pictures.values()), files)
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # nothing of its red is to be seen
    white = Image.new("RGB", (40, 40), "white")
    np.testing.assert_array_equal(run.encode_pictures([clear]), run.encode_pictures([white]))


@pytest.mark.parametrize("given", [None, 5, [None], {"train": "t.csv"}, [["a.csv"]]])
def test_a_source_is_a_name_a_path_or_several(given):
    with pytest.raises(UserError, match="Expected a sample's name, a path to pictures and texts, or a list of"):
        open_source(given)


def test_columns_are_a_mapping(shapes):
    for given in (["caption"], "caption"):
        with pytest.raises(UserError, match=r"columns as a mapping of roles to names, such as .*got .*'caption'"):
            open_source(shapes, columns=given)


# -------------------------------------------------------------------------------------------------- what is written


def test_numbers_that_are_none_are_written_as_null(tmp_path):
    nan, file = float("nan"), tmp_path / "metrics.json"
    rows = [1, (np.float64("inf"), -0.5)]
    write_json(file, {"low": nan, "rows": rows, "name": "naïve", "of": {"high": -float("inf")}})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"low": None, "rows": [1, [None, -0.5]], "name": "naïve", "of": {"high": None}}


def test_a_score_without_an_interval_is_read_back_and_shown(tmp_path):
    from interlace.evaluate import markdown

    score = {"value": 0.5, "low": float("nan"), "high": float("nan"), "queries": 1, "blind": 0.25}
    write_json(tmp_path / "metrics.json", {"match": score})
    assert "| 50.0 |  to  |  | 25.0 |" in markdown(json.loads((tmp_path / "metrics.json").read_text()))


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder is a folder: expected the name of a file to write, such as .*folder/"):
        write_json(tmp_path / "folder", {})
    (tmp_path / "scores.json").write_text("before")
    with pytest.raises(TypeError):
        write_json(tmp_path / "scores.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "scores.json", {"a": "\ud800"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "scores.json"]
    assert (tmp_path / "scores.json").read_text() == "before"


def test_a_folder_of_ones_own_is_no_run_folder(shapes, text_tower, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("of my own")
    with pytest.raises(UserError, match=r"mine holds files that are no run's \(README\.md"):
        train(toy_settings(shapes, text_tower, mine, steps=2))
    assert [file.name for file in mine.iterdir()] == ["README.md"]
    with pytest.raises(UserError, match=r"README\.md is a file"):
        train(toy_settings(shapes, text_tower, mine / "README.md", steps=2))
    with pytest.raises(UserError, match="cannot be made"):
        train(toy_settings(shapes, text_tower, mine / "README.md" / "run", steps=2))


def test_rows_of_one_group_teach_no_matching(shapes, text_tower, tmp_path):
    table = tmp_path / "one"
    shutil.copytree(shapes, table)
    file = next(table.glob("*.csv"))
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *({"group"} - set(rows[0]))])
        writer.writeheader()
        writer.writerows(row | {"group": "all"} for row in rows)
    with pytest.raises(UserError, match="are one group"):
        train(toy_settings(table, text_tower, tmp_path / "run", steps=2))


def test_answers_that_are_given_have_to_be_answers(shapes, text_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=2)
    for given, said in ((["foo", "baz"], "none of objectives.vqa.answers"), ([1, 2], "list of different texts"),
                        ("red", "list of different texts"), (["red", "red"], "list of different texts")):  # fmt: skip
        settings.objectives["vqa"] = {"answers": given}
        with pytest.raises(UserError, match=said):
            train(settings)
    settings.objectives["vqa"] = {"min_count": 100_000}
    with pytest.raises(UserError, match="no answer stands 100000 times"):
        train(settings)
    settings.objectives["vqa"] = {"answers": ["red", "unheard of"]}
    assert (train(settings) / "answers.json").is_file()


def test_a_contrast_of_another_size_than_the_systems_own_is_refused(shapes, text_tower, image_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=2)
    settings.model.system, settings.model.image = "blip", str(image_tower)
    settings.objectives = {"itc": {"size": 64}}
    with pytest.raises(UserError, match=r"itc\.size=64, but the contrast head is the system's own.*size is 256"):
        train(settings)


def test_what_was_skipped_before_a_stop_and_by_other_ranks_is_listed(shapes, text_tower, tmp_path):
    table = tmp_path / "table"
    shutil.copytree(shapes, table)
    source = open_source(table)
    row = int(source.indices("train")[3])
    Path(source.picture(row).path).write_bytes(b"no picture")
    settings = toy_settings(table, text_tower, tmp_path / "run", steps=4, evaluate=False, keep_checkpoints=True)
    out = tmp_path / "run"
    out.mkdir()
    settings.save(out / "config.yaml")
    (out / "data.json").write_text("{}")
    for name, line in (("skipped.jsonl", {"id": "before", "reason": "gone"}), ("skipped-1.jsonl", {"id": "other"})):
        (out / name).write_text(json.dumps({"reason": "broken", **line}) + '\n{"id": "cut of')
    assert _list(train(settings)) == {"before", "other", source.pair(row).id}
    assert json.loads((out / "run.json").read_text())["skipped"] == 3 and not (out / "skipped-1.jsonl").exists()


def _list(run: Path) -> set[str]:
    return {json.loads(line)["id"] for line in (run / "skipped.jsonl").read_text().splitlines()}
