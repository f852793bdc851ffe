"""The loss plot and the model card of a run folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from interlace.model import VLModel
from interlace.settings import Settings


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl that hold numbers of a step; a torn last line is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            lines.append(entry)
    return lines


def plot_losses(log: Path, out: Path) -> None:
    """One panel per objective: its loss, and its accuracy where it logs one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from interlace.objectives.base import Objective

    entries = read_log(log)
    logged = dict.fromkeys(name for entry in entries for name in entry)
    # a loss is logged by its objective's name, after that of its pass where that has one; figures beside it add a word
    losses = [name for name in logged if name.rpartition("/")[2] in Objective.known]
    names = [name for name in ("loss", *losses) if name in logged]
    if not names:
        return
    across = min(len(names), 4)
    down = -(-len(names) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.4 * across, 2.8 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        points = [(e["step"], e[name]) for e in entries if name in e]
        axis.plot(*zip(*points), color="#1f5f8b", linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel("step")
        right = [(e["step"], e[f"{name}_accuracy"]) for e in entries if f"{name}_accuracy" in e]
        if right:
            twin = axis.twinx()
            twin.plot(*zip(*right), color="#c4622d", linewidth=1, linestyle="--")
            twin.set_ylim(0, 1)
            twin.set_ylabel("accuracy (dashed)")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def model_card(out: Path, settings: Settings, model: VLModel, facts: dict[str, Any]) -> str:
    """README.md of the run folder, in the form model hubs read."""
    from interlace.evaluate import markdown, notes

    file = out / "metrics.json"
    metrics = json.loads(file.read_text()) if file.is_file() else None
    data = json.loads((out / "data.json").read_text())
    count, learnt = facts["parameters"], facts["trained"]
    made, names = settings.model, objective_names(settings)
    if made.start:
        kind, size = f"Trained on from the run `{made.start}`", ""
    else:
        how = f"{made.fusion.capitalize()} fusion, {made.streams} stream"
        kind = f"The system `{made.system}`" if made.system else how
        size = (f", {made.layers} layers of width {made.width}\nover `{made.image}` ({made.size} pixels) and "
                f"`{made.text}`")  # fmt: skip
    said = "\n".join(notes(metrics)) if metrics else ""
    results = f"""## Results

Split `{metrics["split"]}`, {metrics["rows"]} rows, per cent.

{markdown(metrics)}

{said}
""" if metrics else ""  # fmt: skip
    return f"""---
library_name: interlace
tags: [vision-language, image-text-retrieval, visual-question-answering]
---
# {out.name}

{kind}{size}. {count / 1e6:.1f} M parameters, of
which {learnt / 1e6:.1f} M were trained, by {", ".join(names)}, for {facts["steps"]} steps of
{settings.train.batch} rows in {facts["train_seconds"] / 60:.1f} minutes.

```
{model.config.describe()}
```

## Data

{data_in_words(data, facts["skipped"])}

Licence: {data["licence"] or "not stated"}

{results}
![losses](loss.png)

## Use

```
{use(out, settings, set(model.heads))}
```
"""


def objective_names(settings: Settings) -> list[str]:
    """Of the objectives and of those in passes, each once."""
    plain = ("share", "image", "name")
    in_passes = [name for one in settings.passes for name in one if name not in plain]
    return list(dict.fromkeys([*settings.objectives, *in_passes]))


def data_in_words(data: dict[str, Any], skipped: int) -> str:
    """Sentences about what data.json holds: rows, questions, attributes, fingerprint."""

    def counted(counts: dict[str, int], noun: str) -> str:
        parts = [f"{counts[split]:,} {what}" for split, what in
                 (("train", "for training"), ("val", "for validation"), ("test", "for testing"))]  # fmt: skip
        return f"{sum(counts.values()):,} {noun}: {parts[0]}, {parts[1]} and {parts[2]}."

    lines = [f"Trained on `{data['source']}`, {counted(data['rows'], 'rows')}"]
    if any(data["questions"].values()):
        lines.append(f"There are {counted(data['questions'], 'questions about them')}")
    if data["columns"]:
        lines.append(f"Each row has the attributes {', '.join(data['columns'])}.")
    lines.append(f"{skipped:,} pictures were unreadable and skipped." if skipped else "Every picture could be read.")
    return "\n".join(lines) + f"\nThe data's fingerprint begins with `{data['fingerprint'][:16]}`."


def use(out: Path, settings: Settings, heads: set[str]) -> str:
    """Commands that work where `interlace train` was started."""
    run, given = shlex.quote(str(out)), settings.data.source
    source = shlex.quote(",".join(given) if isinstance(given, list) else given) or "SOURCE"
    lines = [f"interlace evaluate {run} {source}"]
    if "contrast" in heads:
        lines += [f"interlace index {run} {source}", f'interlace search {run} "a wooden chair"']
    if "answers" in heads:
        lines.append(f'interlace answer {run} picture.jpg "what is it?"')
    return "\n".join([*lines, f"interlace demo {run}"] if "contrast" in heads else lines)
