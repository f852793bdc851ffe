"""What a config may not be, and what is said about it."""

from __future__ import annotations

import pytest

from interlace.errors import UserError
from interlace.objectives import build_objective
from interlace.settings import load_settings


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
