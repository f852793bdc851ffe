"""How fast the published systems run, against transformers' classes with the same weights, in the same process.

    python -m bench.models --out docs/bench/models.json
    python -m bench.models lxmert vilt --layers 12 --batch 8 --repeats 9
    python -m bench.models --tiny                                                  # does it run at all: seconds

forward  states of a batch, in evaluation, without gradients; of CLIP the vectors, of BLIP whether they match
train    forward, loss, backward, AdamW (fused), with the dropout of the release on both sides
write    captions of a fixed length: the picture encoded, then word by word with a cache

Both sides have the same random weights and read the same batch. Before a case is timed its results are compared: states
of a forward; of a step the loss and the gradient of the first weight the picture meets, without dropout; written ids. A
case whose sides differ ends the run. transformers has SDPA attention where its class supports it (which is its default
then, too): CLIP and VisionEncoderDecoder; the other classes are eager only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.common import Row, alternating, clocked, faster, keep, load, machine, parser, peak_tensors, show
from bench.model_cases import MODELS, TINY, Case, Sizes

COLUMNS = ["model", "task", "ours ms", "other ms", "faster", "range", "quickest", "work", "ours MB", "other MB",
           "differs"]  # fmt: skip
CLOSE = 1e-3  # of values around 1, after a few layers in float32


def measure(case: Case, repeats: int, clock: str = "wall") -> Row:
    differs = case.differ()
    if not differs < CLOSE:
        sys.exit(f"{case.model}, {case.task}: the results differ by {differs:.1e}, so there is nothing to compare")
    work = operations(case.other) / operations(case.ours)
    before, times = load(), alternating([case.ours, case.other], repeats, clock)
    ratio, spread = faster(*times)
    return {
        "model": case.model, "task": case.task, "rival": case.rival, "faster": ratio, "range": spread, "work": work,
        "quickest": min(times[1]) / min(times[0]),
        "ours ms": 1000 * median(times[0]), "other ms": 1000 * median(times[1]),
        "ours MB": peak_tensors(case.holds[0]), "other MB": peak_tensors(case.holds[1]),
        "differs": differs, "load": before, "seconds": {"ours": times[0], "other": times[1]},
    }  # fmt: skip


def operations(side: Callable[[], Any]) -> int:
    """Floating point operations of matrix products and attention in one run, as torch counts them."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention,
              torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: of_attention_backward}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        side()
    return counter.get_total_flops()


def of_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def of_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None,
                          **__: Any) -> int:  # fmt: skip
    return sdpa_backward_flop_count(grad, query, key, value)


def main(argv: list[str] | None = None) -> list[Row]:
    options = clocked(parser(__doc__))
    options.add_argument("models", nargs="*", help=f"some of {', '.join(MODELS)}; default all")
    options.add_argument("--layers", type=int, help="of each stack; of LXMERT altogether, then of each of its three "
                                                    "(default 4)")  # fmt: skip
    options.add_argument("--batch", type=int, help="rows of a batch (default 4)")
    options.add_argument("--task", default="", help="only tasks that begin so, e.g. train")
    options.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    given = options.parse_args(argv)
    if unknown := set(given.models) - set(MODELS):
        options.error(f"unknown models {', '.join(sorted(unknown))}: choose from {', '.join(MODELS)}")
    changes = {name: value for name in ("layers", "batch") if (value := getattr(given, name)) is not None}
    size = replace(TINY if given.tiny else Sizes(), **changes)
    torch.set_num_threads(given.threads)
    facts, rows = machine("torch", "transformers"), []
    content = {"machine": facts, "threads": given.threads, "clock": given.clock, "sizes": vars(size), "rows": rows}
    hf.logging.set_verbosity_error()
    for name in given.models or MODELS:
        torch.manual_seed(0)
        for case in MODELS[name](size):
            if case.task.startswith(given.task):
                row = measure(case, given.repeats, given.clock)
                rows.append(row)
                keep(given.out, content, say=False)  # what there is, should the rest be stopped
                print(f"{row['model']}, {row['task']}: {row['faster']:.2f} ({row['range']})", flush=True)
    notes = [
        f"{facts['cpu']}, {given.threads} threads, load {facts['load']} at the start; "
        f"torch {facts['packages']['torch']}, transformers {facts['packages']['transformers']}",
        f"float32, width {size.width}, {size.layers} layers a stack (LXMERT altogether), batch {size.batch}, "
        f"{size.words} words, {size.regions} regions or {size.pixels} pixels (ViLT {size.large}; BLIP {size.large} and "
        f"half the batch); {given.clock} time, median of {given.repeats} alternating rounds",
        "faster: the other's time over ours, above 1 we are faster, with the range over the rounds; the other is "
        "transformers unless the task says otherwise",
        "quickest: the same of the quickest round of each, which the rest of the machine disturbed least",
        "work: the other's floating point operations over ours, matrix products and attention alone: what `faster` "
        "would be if time went by them; our attention's backward computes the probabilities again, which counts too",
        "MB: peak of the tensors made in one run; of a step, what the forward and its loss hold for the backward "
        "(weights, gradients and optimiser are the same); differs: largest difference of the results",
    ]
    shown = [row | ({} if row["rival"] == "transformers" else {"task": f"{row['task']} ({row['rival']})"})
             for row in rows]  # fmt: skip
    show("Models against transformers", COLUMNS, shown, notes)
    keep(given.out, content)
    return rows


if __name__ == "__main__":
    main()
