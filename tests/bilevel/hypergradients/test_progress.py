"""How long a run says that it will take, and what it says where its output is no terminal. The bar: running/."""

import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel.hypergradients.progress import LINE_EVERY, Progress
from bilevel.testing import ridge
from tests.bilevel.helpers import KEY


def test_a_line_each_half_minute_and_one_at_the_end(clock, capsys):
    with Progress("steps", 40) as display:
        for done in range(1, 41):
            clock["now"] += LINE_EVERY / 10
            display.advance(done, {"loss": done / 4})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["steps 10/40", "steps 20/40", "steps 30/40", "steps 40/40"]
    # Each of the 9 steps after the first took 3 seconds, so that 30 more take 90.
    assert lines[0] == "steps 10/40  loss 2.5  1:30 left" and lines[-1] == "steps 40/40  loss 10  0:00 left"


def test_time_left_is_that_of_the_steps_done_here_after_the_first_which_compiled(clock, capsys):
    with Progress("steps", 100, start=90) as display:
        clock["now"] += 10 * LINE_EVERY
        display.advance(91, {})
        for done in (93, 95):
            clock["now"] += LINE_EVERY
            display.advance(done, {})
    said = ["steps 91/100  -:-- left", "steps 93/100  1:45 left", "steps 95/100  1:15 left"]
    assert capsys.readouterr().err.splitlines() == said


def test_hours_are_told(clock, capsys):
    with Progress("steps", 1000) as display:
        for done in (1, 2):
            clock["now"] += LINE_EVERY
            display.advance(done, {})
    assert capsys.readouterr().err.splitlines()[-1] == "steps 2/1000  8:19:00 left"


def test_one_step_is_done_when_it_is_done(capsys):
    with Progress("steps", 1) as display:
        display.advance(1, {})
    assert capsys.readouterr().err == "steps 1/1  0:00 left\n"


def test_each_program_was_compiled_before_its_first_steps(clock, capsys):
    with Progress("steps", 6) as display:
        for done, program, seconds in ((1, "there", 500), (2, "there", 40), (3, "back", 900), (4, "back", 60)):
            clock["now"] += seconds
            display.advance(done, {}, program)
    assert capsys.readouterr().err.splitlines()[1::2] == ["steps 2/6  2:40 left", "steps 4/6  1:40 left"]


@pytest.mark.parametrize("steps", [8, 7])
def test_replay_tells_the_programs_that_it_compiles(monkeypatch, steps):
    told = []
    monkeypatch.setattr(Progress, "advance", lambda display, done, numbers, program=None: told.append(program))
    problem, train, val = ridge()
    estimator = bilevel.Replay(optax.sgd(0.5), steps=steps, segment=2, progress=True)
    estimator.estimate(problem, None, jnp.zeros(()), lambda step: train, val, KEY)
    short = steps % 2 == 1
    there, back = [("advance", False)] * 3, [("reverse", False)] * 3
    assert [program for program in told if program[0] != "outer"] == [
        *there, ("advance", short), ("reverse", short), *back
    ]  # fmt: skip
    assert len(told) == 9  # the outer loss is taken once


def test_nothing_is_shown_where_nothing_is_wanted(clock, capsys):
    with Progress("steps", 1, show=False) as display:
        display.advance(1, {})
    display.already_finished()
    assert capsys.readouterr().err == ""
    Progress("steps", 7, start=7).already_finished()
    assert capsys.readouterr().err == "steps 7/7  already finished\n"
