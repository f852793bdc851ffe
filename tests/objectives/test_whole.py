"""Losses over the whole batch: micro-batches and ranks give the loss and gradient of one process with all rows."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from interlace.config import VLConfig
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import ITC, ITM, MomentumITC, SigmoidITC
from interlace.objectives import whole as whole_file
from interlace.objectives.base import Views
from interlace.objectives.itm import chosen_by, hard_negatives
from interlace.objectives.whole import look_ahead, random_state, set_random_state

GROUPS = [0, 0, 1, 2, 3, 4, 5, 1]
NAMES = ["itc", "itc_sigmoid", "itc_momentum", "itm", "itm_slowly"]


def objectives(name):
    return {"itc": [ITC(size=8)], "itc_sigmoid": [SigmoidITC(size=8)],
            "itc_momentum": [MomentumITC(size=8, queue=16, momentum=0.9, ramp=0.0)],
            "itm": [ITC(size=8), ITM("hard", among="batch")],
            "itm_slowly": [MomentumITC(size=8, queue=16, momentum=0.9, ramp=0.0),
                           ITM("hard", among="batch", alike="momentum")]}[name]  # fmt: skip


def learner(name, dropout=0.0):
    torch.manual_seed(0)
    width = Width(16, heads=4, norm="pre", dropout=dropout, attention_dropout=0.0)
    learned = objectives(name)
    heads = {o.head: o.head_options() for o in learned}
    words, patches = Words(width, vocabulary=50, positions=12), Patches(width, size=16, patch=8)
    config = VLConfig(words, patches, layers=2, heads=heads)
    model = Learner(config).learn_by([(o, 1.0) for o in learned])
    for module in model.heads.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # at their start all vectors are nearly one; so that each row has its own
        for embed in (model.text.words.weight, model.image.project.weight):
            embed.normal_(std=1.0)
    model.attach(batch=8, rows=64)
    for state in model.beside.values():
        with torch.no_grad():  # as after some steps: the slow copy elsewhere, the queue with rows of these groups
            for slow in state.model.parameters():
                slow.add_(torch.randn_like(slow), alpha=0.05)
        state.group[:4] = torch.tensor([3, 1, 9, 9])
        state.real[5] = False
    return model


def batch(groups=GROUPS):
    g = torch.Generator().manual_seed(1)
    rows = len(groups)
    real = torch.ones(rows, dtype=torch.bool)
    real[4:5] = False
    return {
        "caption_ids": torch.randint(5, 50, (rows, 6), generator=g), "caption_real": real,
        "caption_mask": (torch.arange(6) < torch.randint(3, 7, (rows, 1), generator=g)).long(),
        "pixel_values": torch.randint(0, 256, (rows, 3, 16, 16), generator=g, dtype=torch.uint8),
        "group": torch.tensor(groups), "item": torch.arange(rows)[:, None],
        "parts": [{"lots": torch.rand(rows, 2, generator=g)}] * 2,
    }  # fmt: skip


def cut(full, rows):
    small = {key: x[rows] for key, x in full.items() if key != "parts"}
    small["parts"] = [{key: x[rows] for key, x in part.items()} for part in full["parts"]]
    longest = int(small["caption_mask"].sum(1).max())  # micro-batches differ in length
    return small | {key: small[key][:, :longest] for key in ("caption_ids", "caption_mask")}


def step(model, micro, full, forward=None):
    """An optimiser step's gradients, as the trainer makes them -> the loss."""
    model.before_step(1.0)
    total = 0.0
    parts = len(micro)
    for one, ahead in zip(micro, look_ahead(model, micro, parts) if model.looks(parts) else [None] * parts):
        if ahead is not None:
            for objective, whole in ahead.whole.items():
                wanted = objective.wants(whole)
                if wanted is not None:
                    whole.partners = {"pixel_values": full["pixel_values"][whole.rows["item"][wanted, 0]]}
            set_random_state(ahead.random)
        loss = (forward or model)(**one, **({} if ahead is None else {"ahead": ahead}))["loss"] / parts
        loss.backward()
        total += loss.item()
    model.after_step()
    return total


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys() and expected
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=3e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pairs", [2**22, 24])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, pairs, monkeypatch):
    monkeypatch.setattr(whole_file, "PAIRS", pairs)  # 24: blocks of three rows of eight
    full = batch()
    one, many = learner(name), learner(name)
    loss = step(one, [full], full)
    cut_up = step(many, [cut(full, slice(n, n + 2)) for n in range(0, 8, 2)], full)
    assert cut_up == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(many), gradients(one))
    for first, second in zip(one.beside_tensors().values(), many.beside_tensors().values()):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", ["itc", "itc_sigmoid"])
def test_dropout_of_the_first_encoding_is_that_of_the_second(name):
    """The same as one graph over vectors of micro-batches that were encoded one after another."""
    full, model = batch(), learner(name, dropout=0.3)
    micro = [cut(full, slice(n, n + 4)) for n in (0, 4)]
    torch.manual_seed(3)
    loss = step(model, micro, full)
    got = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    views = [Views(model, one) for one in micro]
    vectors = [(one.vector("image"), one.vector("caption")) for one in views]
    joined = Views(model, full)
    joined._vectors = {"image": torch.cat([v[0] for v in vectors]), "caption": torch.cat([v[1] for v in vectors])}
    whole = model.objectives[0][0].loss(model, full, joined).loss
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert_same(got, gradients(model))
    before = random_state()[0]
    look_ahead(model, micro, 2)
    assert not before.equal(random_state()[0])  # there was dropout at all


def test_running_statistics_see_each_row_once():
    model = learner("itc")
    model.norm = nn.BatchNorm1d(16)
    project = model.contrast.project
    model.contrast.project = lambda pooled, stream: project(model.norm(pooled), stream)
    full = batch()
    step(model, [cut(full, slice(n, n + 4)) for n in (0, 4)], full)
    assert int(model.norm.num_batches_tracked) == 4  # two micro-batches of two streams


RANK = """
import sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_whole import NAMES, batch, cut, gradients, learner, step
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, out = dist.get_rank(), {{}}
full = batch()
for name in NAMES:
    for size in (4, 2):
        model = learner(name)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        # the sampler's order: each rank's batch of the first micro-batch, then of the second
        micro = [cut(full, slice(n, n + size)) for n in range(rank * size, 8, 2 * size)]
        loss = torch.tensor(step(model, micro, full, wrapped))
        dist.all_reduce(loss)
        out[f"{{name}} {{size}}"] = {{"loss": loss / 2, **gradients(model), **model.beside_tensors()}}
if rank == 0:
    torch.save(out, {out!r})
dist.barrier()  # a rank that leaves early takes gloo's connections from under the other
dist.destroy_process_group()
"""


def test_two_ranks_give_the_loss_and_gradient_of_one_process(tmp_path):
    script, out = tmp_path / "rank.py", tmp_path / "out.pt"
    script.write_text(RANK.format(tests=str(Path(__file__).parent), out=str(out)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
                           "--standalone", str(script)], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks, full = torch.load(out, weights_only=True), batch()
    assert len(ranks) == 2 * len(NAMES)
    for key, got in ranks.items():
        model = learner(key.split()[0])
        loss = step(model, [full], full)
        assert got.pop("loss").item() == pytest.approx(loss, rel=1e-5), key
        assert_same(got, {**gradients(model), **model.beside_tensors()})


SIZES = """
import sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from test_whole import Views, batch, cut, learner

class Largest(TorchDispatchMode):
    seen = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {{}}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.seen = max(self.seen, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, full, found = dist.get_rank(), batch(list(range(8))), {{}}
for name in ("itc", "itc_sigmoid"):
    model, mine = learner(name), cut(full, slice(4 * rank, 4 * rank + 4))
    views = Views(model, mine)
    vectors = views.vector("image"), views.vector("caption")
    with Largest() as largest:
        model.objectives[0][0].loss(model, mine, views).loss.backward(inputs=list(vectors))
    found[name] = largest.seen
if rank == 0:
    torch.save(found, {out!r})
dist.barrier()
dist.destroy_process_group()
"""


def test_pairs_one_by_one_hold_no_more_than_a_rank_s_own(tmp_path):
    """Of two ranks with four rows each: a contrast over all holds 8 x 8 numbers, the vectors of all rows; one over
    pairs holds those of its four, however many ranks there are."""
    script, out = tmp_path / "sizes.py", tmp_path / "sizes.pt"
    script.write_text(SIZES.format(tests=str(Path(__file__).parent), out=str(out)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
                           "--standalone", str(script)], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(out, weights_only=True) == {"itc": 8 * 8, "itc_sigmoid": 4 * 8}


# ------------------------------------------------------------------------------------------------------ hard negatives


def test_a_share_of_zero_is_never_chosen_and_the_others_as_often_as_they_say():
    share = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(1001, -1)
    lots = torch.linspace(0, 1 - 2**-24, 1001)
    chosen = chosen_by(lots, share)
    assert set(chosen.tolist()) == {1, 3} and (chosen == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_hard_negatives_are_the_alike_of_other_groups():
    image = torch.eye(4)
    text = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0.0]])  # each text is like its neighbour
    group, real, lots = torch.tensor([0, 1, 2, 3]), torch.ones(4, dtype=torch.bool), torch.full((4, 2), 0.5)
    wrong_text, wrong_image, found = hard_negatives(slice(None), text, image, group, real, lots, torch.tensor(50.0))
    assert found.all() and wrong_text.tolist() == [1, 0, 3, 2] == wrong_image.tolist()
    neighbours = torch.tensor([0, 0, 2, 3])
    wrong_text, wrong_image, _ = hard_negatives(slice(0, 2), text, image, neighbours, real, lots, torch.tensor(50.0))
    assert min(*wrong_text.tolist(), *wrong_image.tolist()) >= 2
    real[3] = False  # a text that is not there is nobody's negative
    assert hard_negatives(slice(2, 3), text, image, group, real, lots, torch.tensor(50.0))[0].item() != 3


def test_what_is_found_may_have_other_vectors():
    mine, slow = torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]  # by the slow copy, each row is its neighbour
    group, real, lots = torch.arange(4), torch.ones(4, dtype=torch.bool), torch.full((4, 2), 0.5)
    wrong_text, wrong_image, _ = hard_negatives(slice(None), mine, mine, group, real, lots, torch.tensor(50.0), slow,
                                                slow)  # fmt: skip
    assert wrong_text.tolist() == [1, 0, 3, 2] == wrong_image.tolist()


@pytest.mark.parametrize("looked", [True, False])
def test_the_slow_copy_s_neighbours_are_the_hard_negatives(looked):
    model, full = learner("itm_slowly"), batch(list(range(8)))
    (momentum, _), (itm, _) = model.objectives
    itm.among = "micro"
    model.before_step(1.0)
    full["parts"][1]["lots"] = torch.full((8, 2), 0.5)
    views = Views(model, full, full["parts"][1], model.passes[1])
    if looked:
        (views.ahead,) = look_ahead(model, [full], 1)
    image, text = torch.eye(8)[:, :8], torch.eye(8)[[1, 0, 3, 2, 5, 4, 7, 6]]
    views._vectors = {"image": image, "caption": text}  # online, rows are alike in pairs
    online = ITM("hard").mine(model, full, views)
    slowly = itm.mine(model, full, views)
    copy = model.beside[momentum].model
    own = Views(copy, full)
    expected = hard_negatives(slice(None), text, image, full["group"], full["caption_real"], full["parts"][1]["lots"],
                              model.contrast.scale, own.vector("caption"), own.vector("image"))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(slowly, expected))
    assert not torch.equal(slowly[0], online[0]) or not torch.equal(slowly[1], online[1])


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("make,words", [
    (lambda: ITC(temperature=2.0), "itc.temperature .* from 0.01 to 1; got 2.0"),
    (lambda: SigmoidITC(temperature=0.0), "itc_sigmoid.temperature .* from 0.01 to 1"),
    (lambda: MomentumITC(momentum=1.0), "itc_momentum.momentum .* below 1; got 1.0"),
    (lambda: MomentumITC(alpha=1.5), "itc_momentum.alpha .* from 0 to 1; got 1.5"),
    (lambda: MomentumITC(queue=-1), "not below 0"),
    (lambda: ITM("hard", among="all"), "itm.among is micro or batch; got 'all'"),
    (lambda: ITM("hard", alike="slow"), "itm.alike is online or momentum; got 'slow'"),
    (lambda: learner("itc").learn_by([(ITC(), 1.0), (ITM("hard", alike="momentum"), 1.0)]), "needs the 'match' head"),
    (lambda: learner("itm").learn_by([(ITC(), 1.0), (ITM("hard", alike="momentum"), 1.0)]),
     "slow copy that itc_momentum keeps: add that objective"),
    (lambda: ITC().check_batch(1, 1, 100), "a batch of 1 has nothing to tell"),
    (lambda: SigmoidITC().check_batch(1, 1, 100), "a batch of 1 has nothing to tell"),
    (lambda: ITM("hard").check_batch(8, 1, 100), "objectives.itm.among=batch, or lower train.accumulate"),
    (lambda: MomentumITC(queue=100).check_batch(8, 8, 1000), "does not divide into batches of 8.* instance 96"),
    (lambda: MomentumITC(queue=64).check_batch(8, 8, 50), "50 rows .* more than once: set it to 48"),
    (lambda: learner("itc").learn_by([(SigmoidITC(), 1.0)]), "needs a contrast head with a bias"),
    (lambda: learner("itc").learn_by([(MomentumITC(), 1.0)])(**batch()), "call learner.attach"),
])  # fmt: skip
def test_what_cannot_work_is_explained(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_batch_of_one_is_fine_where_negatives_are_drawn():
    ITM("drawn").check_batch(1, 1, 100)
    ITM("hard", among="batch").check_batch(8, 1, 100)


@pytest.mark.parametrize("name, chance", [
    ("itc", math.log(6)),
    ("itc_momentum", math.log(6 + 15)),  # six captioned rows, and the queue's
    ("itc_sigmoid", math.log(6) + 5 * math.log(6 / 5)),  # six pairs a row, of which one is a positive
])  # fmt: skip
def test_knowing_nothing_costs_what_the_log_says(name, chance):
    logs = learner(name)(**batch([0, 1, 2, 3, 4, 5, 6]))["losses"]
    assert {name, f"{name}_accuracy"} <= logs.keys()
    assert logs[f"{name}_chance"].item() == pytest.approx(chance)
