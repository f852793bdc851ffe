"""What a config may not be, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlace.errors import UserError
from interlace.objectives import build_objective
from interlace.ranges import RANGES
from interlace.settings import load_settings

RECIPES = Path(__file__).parent.parent / "interlace/recipes"


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.lr=fast", "train.lr: expected a number, got 'fast'."),
        ("train.batch=2.5", "train.batch: expected a whole number, got '2.5'."),
        ("train.bf16=maybe", "train.bf16: expected true or false, got 'maybe'."),
        ("train.seed=null", "train.seed: expected a whole number, got nothing."),
        ("data.source=3", "data.source: expected a text or a list of texts, got '3'."),
        ("data.columns=caption", "data.columns: expected names of columns, ours to theirs, such as {caption: title}, "
                                 "got 'caption'."),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named_plainly(override, said):
    with pytest.raises(UserError) as error:
        load_settings("demo", [override])
    assert str(error.value) == said


@pytest.mark.parametrize("override", ["train.lr=1e-3", "train.lr=1", "data.source=[a, b]", "data.columns={caption: t}"])
def test_values_of_the_right_type_pass(override):
    load_settings("demo", [override])


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.seed=-1", "train.seed is from 0 to 4294967295; got -1."),
        ("train.seed=4294967296", "train.seed is from 0 to 4294967295; got 4294967296."),
        ("train.lr=.nan", "train.lr is at least 0; got nan."),
        ("train.lr=.inf", "train.lr is a finite number; got inf."),
        ("train.epochs=0", "train.epochs is above 0; got 0."),
        ("train.warmup=-0.1", "train.warmup is at least 0; got -0.1."),
        ("model.heads=0", "model.heads is at least 1; got 0."),
        ("model.heads=-4", "model.heads is at least 1; got -4."),
        ("model.width=0", "model.width is at least 1; got 0."),
        ("model.size=0", "model.size is at least 1; got 0."),
        ("model.patch=0", "model.patch is at least 1; got 0."),
        ("model.grid=-1", "model.grid is at least 0; got -1."),
        ("model.dropout=1", "model.dropout is from 0 to below 1; got 1."),
        ("model.layers=-1", "model.layers is at least 0; got -1."),
        ("model.text_layers=-2", "model.text_layers is at least -1; got -2."),
        ("model.max_length=2", "model.max_length is at least 3; got 2."),
        ("data.workers=-1", "data.workers is at least 0; got -1."),
        ("data.views=0", "data.views is at least 1; got 0."),
        ("data.max_skipped=1.5", "data.max_skipped is from 0 to 1; got 1.5."),
        ("augment.colour=2", "augment.colour is from 0 to 1; got 2."),
        ("augment.smallest_crop=0", "augment.smallest_crop is above 0 and at most 1; got 0."),
        ("objectives.itc.weight=-1", "objectives.itc.weight is at least 0; got -1."),
        ("objectives.itc.weight=.nan", "objectives.itc.weight is at least 0; got nan."),
        ("data.source=[food, ./furniture, furniture]", "data.source names ./furniture twice: name each source once."),
        ("data.source=food,food", "data.source names food twice: name each source once."),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_before_anything_is_loaded(override, said):
    with pytest.raises(UserError) as error:
        load_settings("demo", [override])
    assert str(error.value) == said


def test_a_weight_in_passes_has_the_same_range():
    with pytest.raises(UserError, match=r"^objectives\.wra\.weight is at least 0; got -1\.$"):
        load_settings(None, ["objectives={}", "passes=[{itm: {negatives: swap}, wra: {weight: -1}}]"])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"train\.warmup is 100 steps, more than the run has \(train\.steps=20\)"):
        load_settings("demo", ["train.steps=20", "train.warmup=100"])
    load_settings("demo", ["train.steps=20", "train.warmup=20"])
    load_settings("demo", ["train.warmup=100"])  # how many steps the epochs have is known with the data


@pytest.mark.parametrize("override", [
    "train.seed=4294967295", "train.clip=.inf", "data.keep_states_gb=.inf", "model.text_layers=0", "model.dropout=0",
    "objectives.itc.weight=0", "augment.smallest_crop=1", "data.max_skipped=1", "data.source=[]", "data.source=''",
])  # fmt: skip
def test_the_ends_of_the_ranges_pass(override):
    load_settings("demo", [override])


def test_every_number_of_a_config_has_a_range():
    numbers = {f"{section}.{name}" for section, values in load_settings(None).to_dict().items()
               if section in ("data", "model", "augment", "train")
               for name, value in values.items() if type(value) in (int, float)}  # fmt: skip
    assert RANGES.keys() == numbers - {"train.epochs"}  # which count only where train.steps does not


@pytest.mark.parametrize("name", sorted(shipped.stem for shipped in RECIPES.glob("*.yaml")))
def test_no_shipped_recipe_is_out_of_range(name):
    load_settings(name)


@pytest.mark.parametrize(
    "override, said",
    [
        ("objectives=", "objectives: expected objectives and their options, such as {itc: {size: 256}}; got nothing."),
        ("objectives=5", "objectives: expected objectives and their options, such as {itc: {size: 256}}; got 5."),
        ("objectives.itc=5", "objectives.itc takes options, such as itc: {weight: 0.5}, or false to leave it out; "
                             "got 5."),
        ("objectives.itk=1", "objectives.itk takes options, such as itk: {weight: 0.5}, or false to leave it out; "
                             "got 1. No objective is called 'itk'. Did you mean 'itm'?"),
    ],
)  # fmt: skip
def test_objectives_that_are_no_options_are_named_plainly(override, said):
    with pytest.raises(UserError) as error:
        load_settings("demo", [override])
    assert str(error.value) == said


@pytest.mark.parametrize("content", ["# größe".encode("latin-1"), "train: {lr: 1}".encode("utf-16"), b"\x89PNG\xff"])
def test_a_config_that_is_no_text_is_refused(content, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml is not UTF-8 text \(byte 0x"):
        load_settings(tmp_path / "mine.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  lr: 1\n  steps: 5\n  lr: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml: the key 'lr' stands twice, in lines 2 and 4: keep one\.$"):
        load_settings(file)
    with pytest.raises(UserError, match=r"'layers' stands twice, in line 1: keep one"):
        load_settings("demo", ["model={layers: 1, layers: 2}"])
    file.write_text("augment: &none {flip: false, colour: 0}\ntrain: {lr: 1}\n")
    assert load_settings(file).augment.flip is False
    file.write_text("passes:\n- &one {mlm: {mask: 0.2}}\n- {<<: *one, itm: , mlm: {mask: 0.4}}\n")
    assert load_settings(file).passes[1] == {"mlm": {"mask": 0.4}, "itm": {}}  # an override, not a second one


def test_a_system_keeps_its_own_fusion_and_says_so(tmp_path):
    for override in ("model.fusion=late", "model.fusion=mid", "model.streams=dual"):  # defaults too, if asked for
        key, value = override.removeprefix("model.").split("=")
        with pytest.raises(UserError, match=rf"model\.{key}={value} has no effect beside model\.system=uniter"):
            load_settings("uniter-small", [override])
    file = tmp_path / "mine.yaml"
    file.write_text("model: {system: uniter, streams: single}\n")
    with pytest.raises(UserError, match=r"model\.streams=single has no effect"):
        load_settings(file)
    load_settings("uniter-small").save(file)
    assert load_settings(file).model.system == "uniter"  # where every key stands


def test_an_objective_is_left_out_of_passes_too():
    """Whoever has no questions is told `objectives.answers=false`, of every recipe."""
    before, after = load_settings("lxmert-small"), load_settings("lxmert-small", ["objectives.answers=false"])
    assert any("answers" in one for one in before.passes) and not any("answers" in one for one in after.passes)
    assert [set(one) for one in after.passes] == [set(one) - {"answers"} for one in before.passes]
    text = load_settings("vl_bert-small")
    alone = load_settings("vl_bert-small", ["objectives.mrfr=false", "objectives.mlm=false"])
    assert len(text.passes) == 2 and alone.passes == []  # a pass of which nothing is left is gone


def test_an_objective_may_be_asked_for_by_true():
    assert load_settings("demo", ["objectives.mlm=true"]).objectives["mlm"] == {}


def test_leaving_out_what_is_no_objective_is_refused():
    with pytest.raises(UserError, match=r"no objective is called 'answer'.* Did you mean 'answers'"):
        load_settings("lxmert-small", ["objectives.answer=false"])


def test_data_named_as_a_config_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.csv").write_text("image,caption\n")
    (tmp_path / "photos").mkdir()
    for name in ("furniture", "furniture,food", "shop.csv", "photos", "shards-{000..003}.tar"):
        with pytest.raises(UserError) as error:
            load_settings(name)
        assert f"interlace train demo data.source={name}" in str(error.value)
    (tmp_path / "photos/config.yaml").write_text("train: {lr: 1}\n")
    with pytest.raises(UserError, match="is a run folder"):
        load_settings("photos")
    assert load_settings("photos/config.yaml").train.lr == 1
    with pytest.raises(UserError, match="Did you mean 'demo'"):
        load_settings("demoo")


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("itm", {"negative": "hard"}, "objective itm has no option 'negative'; it has negatives, rate, among, alike, "
                                      "weight. Did you mean 'negatives'?"),
        ("itc", {"size": "wide"}, "objectives.itc.size: expected a whole number, got 'wide'."),
        ("itc", {"temperature": True}, "objectives.itc.temperature: expected a number, got True."),
        ("itc", {"colour": 1}, "objective itc has no option 'colour'; it has size, temperature, weight."),
    ],
)  # fmt: skip
def test_an_option_an_objective_does_not_have_is_named_with_those_it_has(name, options, said):
    with pytest.raises(UserError) as error:
        build_objective(name, options)
    assert str(error.value) == said
