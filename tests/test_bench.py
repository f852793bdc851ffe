"""The measurements run, at toy sizes, and measure what they say. No assertion is about time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is no part of the installed package

from bench import common, input_path, model_cases, models, passes
from interlace.compose import Composition
from interlace.data.sources import open_source
from interlace.objectives import Pass
from interlace.settings import load_settings
from interlace.train import build_passes, make_learner


def test_sides_take_turns_and_turns_at_going_first():
    order = []
    times = common.alternating([lambda: order.append("a"), lambda: order.append("b")], repeats=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(side) for side in times] == [3, 3]
    assert common.faster([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == (2.0, "1.00-3.00")


def test_peak_of_tensors_is_what_stood_at_once():
    def work():
        for _ in range(3):  # one after the other, 4 MB each, and 1 MB beside them
            small = torch.ones(250_000)
            torch.ones(1_000_000)
        return small

    kept = torch.ones(10_000_000)  # there before, so not counted
    assert common.peak_tensors(work) == pytest.approx(5, abs=1.1)
    assert len(kept) == 10_000_000


def test_figures_have_three_digits():
    shown = {0.012345: "0.0123", 0.9999: "1", 12.345: "12.3", 123456.7: "123,457", 1400: "1,400", None: "-", "1%": "1%"}
    assert {value: common.text(value) for value in shown} == shown


def test_input_path_measures_equal_results(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 480))
    smooth = np.stack([x, y, 255 - x], axis=2).astype(np.uint8)
    for i in range(3):
        Image.fromarray(np.roll(smooth, 50 * i, axis=2)).save(tmp_path / f"{i}.jpg", quality=95)
    out = tmp_path / "docs" / "figures.json"
    rows = input_path.main([str(tmp_path), "--size", "32", "--repeats", "1", "--limit", "2", "--out", str(out)])
    assert [row["threads"] for row in rows] == [1, 2]
    assert rows[0]["pictures"] == 2 and rows[0]["Mpx"] == pytest.approx(0.3072)
    assert rows[0]["differs"] < 2  # of 255: a fraction of the decoding gives nearly the same picture
    assert 0 < rows[0]["decode share"] < 1
    kept = json.loads(out.read_text())
    assert kept["rows"][0]["set"] == tmp_path.name and str(tmp_path) not in out.read_text()


def test_search_finds_in_the_index_what_numpy_finds(tmp_path):
    pytest.importorskip("lancedb")
    from bench import search

    folder, out = tmp_path / "index", tmp_path / "search.json"
    assert search.build(folder, 300, 16)["peak_mb"] > 0
    assert search.ask(folder, 300, 16, 3)["found"] == search.alone("ask_numpy", folder, 300, 16, 3)["found"] == 30
    rival, index = search.Rival.of_synthetic(300, 16), search.Index.open(folder)
    rows = search.latency(index, rival, search.queries_for(300, 16, 3), search.FILTERS, repeats=1)
    assert [row["filter"] for row in rows] == ["none", "1%", "30%"]
    assert all(row["recall@10"] == 1 for row in rows)
    none, narrow, wide = (row["passes"] for row in rows)
    assert narrow < 15 and narrow < wide < none == 300

    arguments = ["--sizes", "--index", str(folder), "--where", "price < 500", "--queries", "3", "--repeats", "1"]
    content = search.main([*arguments, "--out", str(out)])
    assert [row["recall@10"] for row in content["latency"]] == [1, 1]
    assert 100 < content["latency"][1]["passes"] < 200
    assert content["cost"][0]["disk MB"] > content["cost"][0]["vectors MB"] == 300 * 16 * 4 / 1e6
    assert json.loads(out.read_text())["latency"] == content["latency"]


def test_synthetic_rows_are_the_same_for_all_and_clustered():
    from bench import search

    vectors = np.concatenate([block for block, _ in search.synthetic(2500, 24)])  # two blocks
    again = search.Rival.of_synthetic(2500, 24)
    np.testing.assert_array_equal(again.vectors, vectors)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    best = [again.nearest(query, None)[1] for query in search.queries_for(2500, 24, 20)]
    assert 0.6 < np.median(best) < 0.95  # near ones exist, and none is the query itself
    rows, cosines = again.nearest(vectors[7], "price < 10", k=10**6)
    assert len(rows) == again.passes["price < 10"].sum() and (np.diff(cosines) <= 0).all()


def test_frozen_towers_score_far_above_chance_where_pictures_show_their_caption(tmp_path):
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    from bench import frozen

    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}
    table = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{c: n + 2 for n, c in enumerate(colours)}}, "[UNK]"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.set_seed(0)
    hf.ViTModel(
        hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
                     patch_size=8),
        add_pooling_layer=False,
    ).save_pretrained(tmp_path / "sees")  # fmt: skip
    hf.BertModel(
        hf.BertConfig(vocab_size=6, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        add_pooling_layer=False,
    ).save_pretrained(tmp_path / "reads")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=table, **special).save_pretrained(tmp_path / "reads")

    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    pairs, questions = ["id,image,caption,group,split,colour"], []
    for i in range(64):
        colour = list(colours)[i % 4]
        pixels = np.clip(np.array(colours[colour]) + rng.normal(scale=20, size=(40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i}.png")
        pairs.append(f"p{i},{i}.png,{colour},{colour}-{i},{'train' if i < 44 else 'test'},{colour}")
        asked = {"id": f"q{i}", "pair_id": f"p{i}", "question": "Which colour?", "kind": "c"}
        questions.append(json.dumps(asked | {"answers": [[colour, 1.0]]}))
    (tmp_path / "set" / "pairs.csv").write_text("\n".join(pairs) + "\n")
    (tmp_path / "set" / "questions.jsonl").write_text("\n".join(questions) + "\n")

    towers = ["--image", str(tmp_path / "sees"), "--text", str(tmp_path / "reads"), "--size", "32", "--fit", "squash"]
    (figures,) = frozen.main([str(tmp_path / "set"), *towers, "--out", str(tmp_path / "out.json")])
    assert (figures["train_rows"], figures["rows"]) == (44, 20)
    # five test pictures of each colour share their caption, so the right one is hard to tell, but not among ten
    recall = figures["retrieval"]["t2i"]["R@10"]
    assert recall["queries"] == 20 and recall["value"] > recall["chance"]
    assert figures["image_to_image"]["colour"]["mAP"]["value"] > 0.8
    assert figures["vqa"]["nearest pictures"]["value"] == 1.0
    assert figures["vqa"]["question only"]["value"] == 0.25 == figures["vqa"]["chance_by_kind"]["c"]
    assert json.loads((tmp_path / "out.json").read_text())["sources"] == [figures]


def test_models_equal_transformers_before_they_are_timed(tmp_path):
    out = tmp_path / "models.json"
    rows = models.main(["--tiny", "--threads", "1", "--repeats", "1", "--out", str(out)])
    assert {row["model"] for row in rows} == {"LXMERT", "VisualBERT", "ViLT", "BLIP", "CLIP", "ViT + BERT"}
    assert {row["task"] for row in rows if row["model"] == "BLIP"} == {
        "forward", "write, greedy", "write, beam 3", "train, captions"}  # fmt: skip
    assert all(row["differs"] < 1e-5 and row["ours MB"] > 0 for row in rows)
    assert {row["rival"] for row in rows} == {"transformers", "ours, logits everywhere"}
    scored, everywhere = (row for row in rows if (row["model"], row["task"]) == ("VisualBERT", "train, hidden words"))
    assert scored["other MB"] > scored["ours MB"] == everywhere["ours MB"] < everywhere["other MB"]
    assert json.loads(out.read_text())["rows"] == rows


def test_models_that_differ_are_not_timed():
    layer, other, x = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.ones(1, 4)
    timed = []

    def loss(model):
        timed.append(model)
        return model(x).square().sum()

    case = model_cases.train("toy", "step", (layer, "weight", lambda: loss(layer)),
                             (other, "weight", lambda: loss(other)))  # fmt: skip
    with pytest.raises(SystemExit, match="toy, train, step: the results differ"):
        models.measure(case, repeats=1)
    assert timed == [layer, other]
    with pytest.raises(SystemExit, match="nothing was measured"):
        models.measure(model_cases.write("toy", "write", lambda: x, lambda: x[:, :2]), repeats=1)


def test_a_step_of_the_bench_learns():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    before = layer.weight.detach().clone()
    model_cases.step(layer, lambda: layer(x).square().sum())()
    assert not torch.equal(layer.weight, before) and layer.weight.grad is None


def test_passes_measure_every_pass_of_several_objectives(shapes, text_tower, image_tower, tmp_path):
    out = tmp_path / "passes.json"
    small = [f"data.source={shapes}", f"model.text={text_tower}", f"model.image={image_tower}", "model.width=32",
             "model.heads=4", "model.layers=2", "model.size=64", "model.max_length=16"]  # fmt: skip
    options = [option for setting in small for option in ("--set", setting)]
    rows = passes.main(["vl_bert-small", "visual_bert-small", *options, "--rows", "4", "--repeats", "1",
                        "--threads", "1", "--out", str(out)])  # fmt: skip
    # VL-BERT's pass of text alone has one objective, and nothing to share
    assert [(row["recipe"], row["pass"]) for row in rows] == [
        ("vl_bert-small", "mlm + mrfr"), ("visual_bert-small", "mlm + itm")]  # fmt: skip
    assert all(row["separate MB"] > row["shared MB"] > 0 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows


def test_the_two_sides_of_the_passes_score_the_same(shapes, text_tower, image_tower):
    settings = load_settings("visual_bert-small")
    source = open_source(str(shapes))
    settings.model = Composition(system="visual_bert", text=str(text_tower), image=str(image_tower), width=32, heads=4,
                                 layers=2, size=64, max_length=16)  # fmt: skip
    shared = build_passes(settings, source)
    learner, processor = make_learner(settings, shared)
    logged = []
    for plan in (shared[:1], [Pass([pair]) for pair in build_passes(settings, source)[0].objectives]):
        learner.passes = plan
        logged.append(set(learner(**passes.batch_of(learner, plan, source, processor, 4))["losses"]))
    assert logged[0] == logged[1] != set()


def test_cached_gradients_take_less_memory_and_differ_by_rounding(tmp_path):
    from bench import cached

    arguments = ["--rows", "8", "64", "--at-once", "8", "--repeats", "1", "--threads", "1"]
    rows = cached.main([*arguments, "--out", str(tmp_path / "cached.json")])
    assert [(row["objective"], row["rows"]) for row in rows] == [("itc", 8), ("itc", 64), ("itc_sigmoid", 8),
                                                                 ("itc_sigmoid", 64)]  # fmt: skip
    assert all(row["differs"] < 1e-5 for row in rows) and rows[0]["whole MB"] == rows[0]["cached MB"]
    assert rows[1]["whole MB"] > 4 * rows[1]["cached MB"]
    assert json.loads((tmp_path / "cached.json").read_text())["rows"] == rows


def test_values_of_queries_survive_the_archive(tmp_path):
    from bench import archive
    from interlace.held import Kept

    rng = np.random.default_rng(0)
    asked = Kept(rng.random(9).round(3), np.arange(9) * 2, np.array([f"group {n // 2}" for n in range(9)]))
    other = Kept(np.array([1.0, np.nan, 0.0]), np.array([4, 1, 7]), np.array(["a", "b", "a"]))
    runs = {("uniter", 0, "finetune", "after"): {"answers, accuracy": asked, "captions, CIDEr": other},
            ("uniter", 1, "finetune", "without"): {"answers, accuracy": asked}}  # fmt: skip
    archive.save(tmp_path / "values.npz", runs)
    back = archive.load(tmp_path / "values.npz")
    assert back.keys() == runs.keys()
    for run, measures in runs.items():
        assert back[run].keys() == measures.keys()
        for measure, kept in measures.items():
            np.testing.assert_allclose(back[run][measure].values, kept.values, rtol=1e-6)
            assert (back[run][measure].ids == kept.ids).all() and (back[run][measure].groups == kept.groups).all()
    assert archive.load(tmp_path / "nothing.npz") == {}
    before = archive.digest(["uniter-small", "finetune"])
    assert before == archive.digest(["uniter-small", "finetune"]) != archive.digest(["vilt-small", "finetune"])


def test_a_seed_that_is_in_the_archive_is_not_lost_when_another_is_measured(tmp_path):
    from bench import archive, systems
    from interlace.held import Kept

    one = Kept(np.array([1.0, 0.0]), np.array([3, 5]), np.array(["a", "b"]))
    known = {("uniter", 0, "finetune", which): {"answers, accuracy": one} for which in systems.WHICH}
    archive.save(tmp_path / "figures.npz", known)
    now = archive.digest(systems.names("uniter"), systems.scored_by("uniter"))
    before = {"source": "mine", "recipes": {"uniter": now},
              "results": {"uniter": {"0": {"finetune": "as it was"}}}}  # fmt: skip
    (tmp_path / "figures.json").write_text(json.dumps(before))
    results, values = {"uniter": {1: {"finetune": "new"}}}, {}
    systems.add_earlier(tmp_path / "figures.json", results, values, "mine")
    assert results == {"uniter": {1: {"finetune": "new"}, 0: {"finetune": "as it was"}}}
    assert values.keys() == known.keys()
    (tmp_path / "figures.json").write_text(json.dumps({**before, "recipes": {"uniter": "another"}}))
    results = {"uniter": {1: {"finetune": "new"}}}
    systems.add_earlier(tmp_path / "figures.json", results, {}, "mine")
    assert list(results["uniter"]) == [1]  # its recipe is not what it was


def test_matching_that_was_scored_in_another_way_is_not_set_beside_todays(tmp_path):
    from bench import archive, systems
    from interlace.held import Kept

    one, match = Kept(np.array([1.0, 0.0]), np.array([3, 5]), np.array(["a", "b"])), "match or not, balanced accuracy"
    archive.save(tmp_path / "figures.npz", {("uniter", 0, "finetune", which): {"answers, accuracy": one, match: one}
                                            for which in systems.WHICH})  # fmt: skip
    scores = {"scores": {match: 1, "answers, accuracy": 2}}
    (tmp_path / "figures.json").write_text(json.dumps({
        "source": "mine", "recipes": {"uniter": archive.digest(systems.names("uniter"))},
        "results": {"uniter": {"0": {"pretrained": scores, "finetune": {"after": scores, "without": scores}}}},
    }))  # fmt: skip
    results, values = {}, {}
    systems.add_earlier(tmp_path / "figures.json", results, values, "mine")
    left = {"scores": {"answers, accuracy": 2}}
    assert results["uniter"][0] == {"pretrained": left, "finetune": {"after": left, "without": left}}
    assert [list(measures) for measures in values.values()] == [["answers, accuracy"]] * 2
