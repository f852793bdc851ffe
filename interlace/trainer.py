"""What vision-language training adds to the safe trainer, and an alarm for objectives that stop learning."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from interlace.checkpoints import SafeTrainer
from interlace.data.batches import EpochSampler
from interlace.data.step import Item, Step, items_of, pictures_of
from interlace.errors import UserError
from interlace.learner import Learner
from interlace.objectives import Objective
from interlace.objectives.whole import Ahead, look_ahead, set_random_state
from interlace.settings import Settings
from interlace.sharded import gathered, widen_scalars

BESIDE = "beside.safetensors"  # in a checkpoint: what objectives keep and the model does not


def skipped_file(settings: Settings, rank: int = 0) -> Path:
    """Where a rank lists the pictures that could not be read, in the run folder."""
    return Path(settings.train.out).expanduser() / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")


def read_skipped(files: list[Path]) -> dict[str, str]:
    """Row -> reason. A line that was cut off when the machine stopped is left out: its picture will be met again."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            with suppress(json.JSONDecodeError):
                one = json.loads(line)
                found[one["id"]] = one["reason"]
    return found


def write_skipped(file: Path, skipped: dict[str, str], mode: str = "w") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, mode, encoding="utf-8") as stream:
        stream.writelines(json.dumps({"id": row, "reason": why}) + "\n" for row, why in skipped.items())


class VLTrainer(SafeTrainer):
    """What vision-language training adds to the safe trainer: rows by (epoch, position), learning rates by part,
    objectives that compare all rows of an optimiser step or keep something beside the model, and pictures of a large
    batch that are read again instead of held."""

    def __init__(self, *args: Any, learner: Learner, settings: Settings, aligned: tuple[str, ...] = (),
                 hold: float = 2e9, **kwargs: Any):  # fmt: skip
        """`aligned`: what names of parameters begin with that start aligned. `hold`: bytes of pictures of one optimiser
        step that may stay in main memory."""
        super().__init__(*args, model=learner, **kwargs)
        self.learner, self.settings = learner, settings
        self.skipped: dict[str, str] = {}  # by this rank since it started; all of them: `read_skipped`
        self._listed: dict[str, str] | None = None  # the same with those of before it was stopped
        self.asked = 0
        self.aligned, self.hold = aligned, hold
        self._ahead: list[Ahead] = []
        self._partners: dict[Objective, Iterator[dict]] = {}
        self._left = 0  # micro-batches of this optimiser step
        self._unsynced: str | None = None  # the checkpoint whose random state is still to be taken up

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            # every rank has made the model; accelerate's way to give it to ranks that have not stops at buffers
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
            widen_scalars(self.learner)
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # objectives look at a batch outside the forward that gathers the weights
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.learner, "look")
        return prepared

    def whole_learner(self) -> Learner:
        """The learner with all its weights; where they are split over ranks, all ranks call this together."""
        return gathered(self.learner) if self.is_fsdp_enabled else self.learner

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        passes, mix = self.learner.passes, self.settings.train.mix
        shares = [one.share for one in passes] if mix != "sum" and len(passes) > 1 else None
        size = len(self.train_dataset)  # type: ignore[arg-type]
        return EpochSampler(size, self.args.seed, shares, self.step_rows, mix == "draw")

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            t = self.settings.train
            groups: dict[tuple[float, float], list[Tensor]] = {}
            started = set(self.learner.started)
            for name, p in self.learner.named_parameters():
                if not p.requires_grad:
                    continue
                rate = t.lr
                if name.startswith("text.tower."):
                    rate = t.text_lr
                elif name.startswith("image.tower."):
                    rate = t.image_lr
                elif name.startswith(self.aligned):
                    rate = t.aligned_lr
                elif name in started and t.start_lr:
                    rate = t.start_lr
                plain = p.ndim > 1 and "positions" not in name  # no norm, bias, scale
                decay = t.weight_decay if plain or t.decay_all else 0.0
                groups.setdefault((rate, decay), []).append(p)
            self.optimizer = torch.optim.AdamW(
                [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()],
                betas=(t.betas[0], t.betas[1]), eps=t.eps)  # fmt: skip
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """`schedule: epochs` is ours, the others are transformers' own."""
        t = self.settings.train
        if self.lr_scheduler is None and t.schedule == "epochs":
            optimizer = optimizer or self.create_optimizer()
            warm = self.args.get_warmup_steps(num_training_steps)
            steps = max(1, len(self.train_dataset) // self.step_rows)  # type: ignore[arg-type]
            self.lr_scheduler = LambdaLR(
                optimizer, lambda step: step / warm if step < warm else t.epoch_factor ** (step // steps))  # fmt: skip
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def step_rows(self) -> int:
        """Rows of one optimiser step over all ranks."""
        return self.settings.train.batch * self.args.world_size

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and what they must know of each other."""
        steps_an_epoch = max(1, len(self.train_dataset) // self.step_rows)  # type: ignore[arg-type]
        self.learner.before_step(self.state.global_step / steps_an_epoch)
        step = Step(self._read, self.hold if num_batches > 1 else math.inf)
        counts: list[list[dict[str, Tensor]]] = []
        taken = self._take(epoch_iterator, num_batches, step, counts)
        self._ahead, self._partners = [], {}
        if self.learner.looks(num_batches):
            self._ahead = look_ahead(self.learner, taken, num_batches, self.accelerator.autocast)
            self._find_partners()
        for _ in taken:  # those that nobody looked at
            pass
        self._add_totals(step.rest, counts)
        self._left = len(step)
        return step, None

    def _take(self, batches: Iterator[dict], most: int, step: Step, counts: list) -> Iterator[dict]:
        """Each next batch, ready for the model; afterwards it is in `step`."""
        for batch in islice(batches, most):
            if self._unsynced is not None:  # transformers takes it up after all were taken, which is too late to look
                self._load_rng_state(self._unsynced)
            counts.append([{} if part is None else one.totals(part, batch)
                           for one, part in zip(self.learner.passes, batch["parts"])])  # fmt: skip
            yield self._on_device({k: v for k, v in batch.items() if k not in ("ids", "skipped")})
            step.add(batch)

    def _on_device(self, batch: dict) -> dict:
        return cast(dict, self._prepare_input(batch))

    def _read(self, items: list[list[Item]]) -> Iterator[dict]:
        """The pictures of rows, once more."""
        if not items:
            return
        # a generator of its own: the run's random numbers are not to depend on what had to be read again
        loader = DataLoader(self.train_dataset, batch_sampler=items, collate_fn=self.data_collator,  # type: ignore
                            num_workers=self.args.dataloader_num_workers, generator=torch.Generator())  # fmt: skip
        for batch in loader:
            yield pictures_of(batch)

    def _find_partners(self) -> None:
        """Where micro-batches want pictures of rows that others have."""
        for objective in self._ahead[0].whole if self._ahead else []:
            wholes = [one.whole[objective] for one in self._ahead]
            rows = [objective.wants(whole) for whole in wholes]
            if rows[0] is not None:
                asked = [items_of(whole.rows["item"][which]) for whole, which in zip(wholes, rows)]
                self._partners[objective] = self._read(asked)

    def _add_totals(self, samples: list[dict], counts: list[list[dict[str, Tensor]]]) -> None:
        """What each objective scores in the whole batch, over micro-batches and ranks, divided by their number: so that
        the mean of what the micro-batches divide by it is what one process with all rows would have."""
        for number in range(len(self.learner.passes)):
            mine = [count[number] for count in counts]
            if not mine or not mine[0]:
                continue
            summed = torch.stack([torch.stack(list(count.values())) for count in mine]).sum(0).to(self.args.device)
            summed = self.accelerator.reduce(summed, "sum") / (len(samples) * self.args.world_size)
            for sample in samples:
                sample["parts"][number]["totals"] = dict(zip(mine[0], summed))

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        skipped = inputs.pop("skipped")
        self.asked += len(inputs["group"]) + len(skipped)
        if skipped:
            self._list_skipped(skipped)
        self._too_many_skipped()
        if self._ahead:
            ahead = self._ahead.pop(0)
            for objective, read in self._partners.items():
                ahead.whole[objective].partners = self._on_device(next(read))
            inputs["ahead"] = ahead
            set_random_state(ahead.random)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._left -= 1
        if not self._left:
            self.learner.after_step()
        return loss

    # ------------------------------------------------------------------------------- what is kept beside the model

    def _write(self, scratch: Path, final: Path) -> None:
        super()._write(scratch, final)
        tensors = self.learner.beside_tensors()
        if tensors and self.args.should_save:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, scratch / BESIDE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._unsynced = resume_from_checkpoint
        if self.learner.beside:
            try:
                self.learner.load_beside(load_file(Path(resume_from_checkpoint) / BESIDE))
            except (OSError, KeyError, RuntimeError) as error:
                raise UserError(f"{resume_from_checkpoint} does not hold what its objectives keep beside the model: "
                                f"{error}. Train again, to another train.out.") from None  # fmt: skip

    def _load_rng_state(self, checkpoint) -> None:
        super()._load_rng_state(checkpoint)
        self._unsynced = None

    def _list_skipped(self, skipped: list[tuple[str, str]]) -> None:
        """Each once, written down at once: a run that is stopped and goes on, and one of several ranks, lists all."""
        self.skipped.update(skipped)
        file = skipped_file(self.settings, self.args.process_index)
        if self._listed is None:
            self._listed = read_skipped([file])
            write_skipped(file, self._listed)  # without a line that was cut off
        if new := {row: why for row, why in skipped if row not in self._listed}:
            self._listed |= new
            write_skipped(file, new, "a")

    def _too_many_skipped(self) -> None:
        if self.asked >= 200 and len(self.skipped) > self.settings.data.max_skipped * self.asked:
            first = ", ".join(f"{row}: {why}" for row, why in list(self.skipped.items())[:3])
            raise UserError(f"{len(self.skipped)} of the first {self.asked} pictures could not be read ({first}, ...): "
                            f"more than data.max_skipped={self.settings.data.max_skipped:.0%}. "
                            "Run `interlace data check`.")  # fmt: skip


class CollapseAlarm(TrainerCallback):
    """Says so when an objective has stopped telling things apart: ITM predicts one class, or a contrast's loss is that
    of knowing nothing, which it logs as its `_chance`. Once per objective; a healthy log in between arms it again."""

    def __init__(self, after: int, patience: int = 5):
        self.after, self.patience = after, patience
        self.bad: Counter[str] = Counter()
        self.raised: list[str] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        logs = logs or {}
        if state.global_step < self.after:
            return
        signs = {}
        for key in logs:
            if key.endswith("itm_positive"):
                name, share = key.removesuffix("_positive"), logs[key]
                signs[name] = (share < 0.02 or share > 0.98,
                               f"{name} predicts one class ({share:.0%} match): lower train.lr, or start with "
                               "objectives.itm.negatives=drawn and let itc learn first")  # fmt: skip
            elif key.endswith("_chance") and key.removesuffix("_chance") in logs:
                name, chance = key.removesuffix("_chance"), logs[key]
                what = "ln(batch)" if name.endswith("itc") else "that of a constant"
                signs[name] = (logs[name] > 0.98 * chance,
                               f"{name} is at {logs[name]:.2f}, the loss of knowing nothing is {what} = {chance:.2f}: "
                               "raise train.lr or check that captions belong to their pictures")  # fmt: skip
        for name, (bad, why) in signs.items():
            self.bad[name] = self.bad[name] + 1 if bad else 0
            if self.bad[name] == self.patience:
                self.raised.append(why)
                logs[f"{name}_alarm"] = 1.0
                if state.is_world_process_zero:
                    print(f"\nCOLLAPSE at step {state.global_step}: {why}", flush=True)
