"""A figure as SVG: two lanes from left to right, layers as blocks, arrows where one stream reads the other. It follows
the reader's light or dark scheme."""

from __future__ import annotations

from interlace.draw import READ_BY_DECODER, STREAMS, Figure, Group, Step, millions, priced

BLOCK, TALL, NARROW = 124, 60, 76  # width and height of a layer, width of one that reads nothing
PAD, GAP, TITLE, FOOT = 12, 30, 24, 24  # around the layers of a group, between groups, its first and last line
LANE = {"text": 172, "image": 312, "writes": 458}  # the middle of each stream
LIGHT = {  # class -> fill, edge
    "page": ("#ffffff", "none"), "frame": ("#f8fafc", "#cfd6de"), "heads": ("#f1f4f7", "#9aa5b1"),
    "text": ("#e3edf9", "#2f6299"), "image": ("#fcecd6", "#a9671b"), "joint": ("#e9e4f6", "#5d4a9c"),
}  # fmt: skip
DARK = {
    "page": ("#12161c", "none"), "frame": ("#191f27", "#3a4450"), "heads": ("#232a33", "#5b6775"),
    "text": ("#17304c", "#7db2ea"), "image": ("#40290f", "#e6aa5c"), "joint": ("#2c2550", "#b3a3f2"),
}  # fmt: skip
INKS = {"ink": ("#1f2733", "#e8edf3"), "faint": ("#626d7a", "#9aa7b5"), "meet": ("#2e7d4f", "#64c68d")}


def style() -> str:
    """Rules for both schemes. Plain values, no variables: not every viewer of SVG knows those."""

    def rules(boxes: dict[str, tuple[str, str]], dark: int) -> str:
        out = [f"rect.{name}{{fill:{fill};stroke:{edge}}}" for name, (fill, edge) in boxes.items()]
        for name, colour in [*((n, c[1]) for n, c in boxes.items()), *((n, c[dark]) for n, c in INKS.items())]:
            if name not in ("page", "frame", "heads"):
                out.append(f"text.{name},path.{name}{{fill:{colour}}}polyline.{name}{{stroke:{colour}}}")
        return "".join(out)

    return (f"<style>polyline{{fill:none;stroke-width:1.6}}{rules(LIGHT, 0)}"
            f"@media (prefers-color-scheme:dark){{{rules(DARK, 1)}}}</style>")  # fmt: skip


def rect(x: float, y: float, w: float, h: float, sort: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" class="{sort}"/>'


class Canvas:
    """Pieces of an SVG, drawn in layers: lines lie under boxes."""

    def __init__(self) -> None:
        self.under: list[str] = []
        self.over: list[str] = []

    def text(self, x: float, y: float, say: str, size: int = 12, ink: str = "ink", weight: int = 400,
             anchor: str = "middle") -> None:  # fmt: skip
        say = say.replace("&", "&amp;").replace("<", "&lt;")
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        self.over.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}"{bold} text-anchor="{anchor}" class="{ink}">'
                         f"{say}</text>")  # fmt: skip

    def box(self, x: float, y: float, w: float, h: float, sort: str, lines: list[str]) -> None:
        self.over.append(rect(x, y, w, h, sort))
        for n, line in enumerate(lines):
            at = y + h / 2 + 4.2 + 16 * (n - (len(lines) - 1) / 2)
            self.text(x + w / 2, at, line, 12, *((sort, 600) if n == 0 else ("ink", 400)))

    def line(self, points: list[tuple[float, float]], sort: str, head: bool = False, dash: str = "") -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        tip = f' marker-end="url(#{sort})"' if head else ""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.under.append(f'<polyline points="{path}" class="{sort}"{tip}{dashed}/>')


def svg(drawn: Figure) -> str:
    """The figure, left to right as the model runs: text above, image below, and the decoder, if any, beneath."""
    canvas, left = Canvas(), 28
    start = left + 158
    for stream, part in (("text", drawn.text), ("image", drawn.image)):
        amount = f"{drawn.words} words" if stream == "text" else f"{drawn.cells} cells"
        lines = [part.title, f"{amount}, {part.width} wide", priced(part.parameters, part.flops)]
        canvas.box(left, LANE[stream] - 36, 158, 72, stream, lines)
    free = dict.fromkeys(STREAMS, float(start + GAP))
    marked = None
    for group in drawn.groups:
        x = max(free[lane] for lane in group.lanes)
        if group.first <= drawn.depth < group.first + len(group.steps) * group.times:
            x = max(free.values())
            marked = x - GAP / 2
        end = _group(canvas, group, x, {stream: LANE[stream] for stream in STREAMS})
        for lane in group.lanes:
            free[lane] = end + GAP
    end = max(free.values()) - GAP
    stop = end + GAP + 6
    heads = {name: n for name, n in drawn.ends.items() if n and not name.startswith("decoder")}
    reading = {"both": STREAMS, "": ()}.get(drawn.context if drawn.writes else "", (drawn.context,))
    for stream in STREAMS:
        if heads or stream in reading:
            last = stop + (14 if heads else 0)
            canvas.line([(start, LANE[stream]), (last, LANE[stream])], stream, bool(heads))
        else:
            canvas.line([(start, LANE[stream]), (end + 16, LANE[stream])], stream)
    right, low = end + 16, LANE["image"] + TALL / 2 + FOOT
    if heads:
        lines = [f"{name}  {millions(n)}" for name, n in heads.items()]
        tall = max(LANE["image"] - LANE["text"] + TALL, 17 * len(lines) + 44)
        x, top = stop + 22, (LANE["text"] + LANE["image"] - tall) / 2
        wide = max(96, 7.2 * max(map(len, lines)) + 20)
        canvas.over.append(rect(x, top, wide, tall, "heads"))
        middle = (LANE["text"] + LANE["image"]) / 2
        canvas.text(x + wide / 2, middle - 8.5 * len(lines) - 4, "heads", weight=600)
        for n, line in enumerate(lines):
            canvas.text(x + wide / 2, middle - 8.5 * len(lines) + 17 + 17 * n, line)
        right, low = x + wide, max(low, top + tall)
    if drawn.writes:
        right, low = max(right, _decoder(canvas, drawn, left, start, stop)), LANE["writes"] + TALL / 2 + FOOT
    high = LANE["text"] - TALL / 2 - TITLE - 12
    if marked is None:
        canvas.text(end, high - 8, drawn.meet, 12, "meet", 600, "end")
    else:
        canvas.line([(marked, high), (marked, LANE["image"] + TALL / 2 + FOOT + 8)], "meet", dash="5 4")
        canvas.text(marked + 8, high - 4, drawn.meet, 12, "meet", 600, "start")
    canvas.text(left, 42, drawn.title, 20, weight=650, anchor="start")
    canvas.text(left, 64, drawn.costs, 12, "faint", anchor="start")
    legend = "In each box: parameters, FLOPs (a multiply-add is two). An arrow points to the stream that reads."
    canvas.text(left, low + 30, legend, 11, "faint", anchor="start")
    wide = max(right, left + 6.3 * max(len(drawn.costs), len(legend) - 8), (marked or 0) + 8 + 6.8 * len(drawn.meet))
    return _page(canvas, wide + 28, low + 48)


def _group(canvas: Canvas, group: Group, x: float, lanes: dict[str, float]) -> float:
    """Draws a group from `x` on and returns where it ends."""
    own = [lanes[lane] for lane in group.lanes]
    wide = [BLOCK if any(step.reads.values()) else NARROW for step in group.steps]
    # a title or a cost must not stick out of its frame
    inner = max(sum(wide) + PAD * (len(wide) - 1), 6.2 * len(group.price) - PAD)
    width, top, bottom = inner + 2 * PAD, min(own) - TALL / 2 - TITLE, max(own) + TALL / 2 + FOOT
    canvas.under.append(rect(x, top, width, bottom - top, "frame"))
    canvas.text(x + width / 2, top + 17, group.title, 13, weight=600)
    canvas.text(x + width / 2, bottom - 9, group.price, 11, "faint")
    at = x + PAD + (inner - sum(wide) - PAD * (len(wide) - 1)) / 2
    for step, w in zip(group.steps, wide):
        _step(canvas, step, at, w, lanes)
        at += w + PAD
    return x + width


def _step(canvas: Canvas, step: Step, x: float, w: float, lanes: dict[str, float]) -> None:
    top, bottom, middle = lanes["text"] + TALL / 2, lanes["image"] - TALL / 2, x + w / 2
    if step.joint:
        canvas.box(x, lanes["text"] - TALL / 2, w, lanes["image"] - lanes["text"] + TALL, "joint", step.says("text"))
        return
    for stream in STREAMS:
        if stream in step.reads:
            canvas.box(x, lanes[stream] - TALL / 2, w, TALL, stream, step.says(stream))
    up, down = "image" in step.reads.get("text", ()), "text" in step.reads.get("image", ())
    apart = 14 if up and down else 0
    if up:
        foot = bottom if "image" in step.reads else lanes["image"]
        canvas.line([(middle - apart, foot), (middle - apart, top + 5)], "image", True)
    if down:
        foot = top if "text" in step.reads else lanes["text"]
        canvas.line([(middle + apart, foot), (middle + apart, bottom - 5)], "text", True)
    if step.tied and len(step.reads) == 2 and all(step.reads.values()):
        canvas.text(middle + (apart + 10 if up else 0), (top + bottom) / 2 + 4, "one weight", 11, "faint",
                    anchor="start" if up else "middle")  # fmt: skip


def _decoder(canvas: Canvas, drawn: Figure, left: float, start: float, stop: float) -> float:
    """The decoder's lane: what was written so far, and its layers, which read a stream's last states."""
    lane, own = LANE["writes"], drawn.ends["decoder's words and head"]
    canvas.box(left, lane - 36, 158, 72, "text", ["written so far", f"{drawn.words} words, {drawn.text.width} wide",
                                                  f"{millions(own)} with its head"])  # fmt: skip
    x = stop - PAD - 24  # the arrow comes down left of the title
    for group in drawn.writes:
        width = max(len(group.steps) * (BLOCK + PAD) + PAD, 6.2 * len(group.price) + PAD)
        top = lane - TALL / 2 - TITLE
        canvas.under.append(rect(x, top, width, TALL + TITLE + FOOT, "frame"))
        canvas.text(x + width - PAD, top + 17, group.title, 13, weight=600, anchor="end")
        canvas.text(x + width / 2, lane + TALL / 2 + FOOT - 9, group.price, 11, "faint")
        at = x + (width - len(group.steps) * (BLOCK + PAD) + PAD) / 2
        reads = f"reads {READ_BY_DECODER[drawn.context]}"
        for n, step in enumerate(group.steps):
            says = [line.replace("reads image", reads) for line in step.says("text")]
            canvas.box(at + n * (BLOCK + PAD), lane - TALL / 2, BLOCK, TALL, "text", says)
        for n, stream in enumerate(STREAMS if drawn.context == "both" else (drawn.context,)):
            canvas.line([(stop - 7 * n, LANE[stream]), (stop - 7 * n, lane - TALL / 2 - 5)], stream, True)
        x += width + GAP
    canvas.line([(start, lane), (x - GAP + 18, lane)], "text", True)
    canvas.text(x - GAP + 30, lane + 4, "next word", 12, anchor="start")
    return x + 70


def _page(canvas: Canvas, width: float, height: float) -> str:
    tips = "".join(f'<marker id="{c}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
                   f'orient="auto"><path d="M0,0 L8,4 L0,8 z" class="{c}"/></marker>' for c in STREAMS)  # fmt: skip
    # frames first, then lines, then boxes and words
    under = sorted(canvas.under, key=lambda piece: not piece.startswith("<rect"))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="Inter, Helvetica, Arial, sans-serif">',
        style(), f"<defs>{tips}</defs>", f'<rect width="{width:.0f}" height="{height:.0f}" class="page"/>',
        *under, *canvas.over, "</svg>", ""])  # fmt: skip
