"""A bar in a log is a few lines, however many steps it has."""

from __future__ import annotations

import io

import pytest

from interlace.bars import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, quick", [(io.StringIO(), True), (Terminal(), False)])
def test_only_a_terminal_sees_a_quick_loop(stream, quick, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    for _ in bar(range(1000), mininterval=0):
        pass
    assert (stream.getvalue() == "") is quick


def test_a_long_loop_says_something_every_half_minute(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    shown, now = bar(total=3600), [0.0]
    shown._time = lambda: now[0]
    shown.start_t = shown.last_print_t = 0.0
    for _ in range(3600):  # a step a second
        now[0] += 1
        shown.update()
    shown.close()
    assert 60 <= stream.getvalue().count("3600") <= 125
