"""What a long run says of itself where its output is no terminal: a line now and then, and one at the end."""

import pytest

from bilevel.hypergradients import progress
from bilevel.hypergradients.progress import LINE_EVERY, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: `clock["now"]`, in seconds."""
    time = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: time["now"])
    return time


def test_a_line_each_half_minute_and_one_at_the_end(clock, capsys):
    with Progress("steps", 40) as display:
        for done in range(1, 41):
            clock["now"] += LINE_EVERY / 10
            display.advance(done, {"loss": done / 4})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["steps 10/40", "steps 20/40", "steps 30/40", "steps 40/40"]
    # 10 of 40 steps took 30 seconds, so that 30 more take 90.
    assert lines[0] == "steps 10/40  loss 2.5  1:30 left" and lines[-1] == "steps 40/40  loss 10  0:00 left"


def test_time_left_is_that_of_the_steps_done_here(clock, capsys):
    with Progress("steps", 100, start=90) as display:
        clock["now"] += LINE_EVERY
        display.advance(95, {})
    assert capsys.readouterr().err == "steps 95/100    0:30 left\n"


def test_nothing_is_shown_where_nothing_is_wanted(clock, capsys):
    with Progress("steps", 1, show=False) as display:
        display.advance(1, {})
    display.already_finished()
    assert capsys.readouterr().err == ""
    Progress("steps", 7, start=7).already_finished()
    assert capsys.readouterr().err == "steps 7/7  already finished\n"
