"""What is seen of a run while it goes: the bar at every width, nothing but plain lines elsewhere, the time left."""

import contextlib
import importlib.machinery
import io
import itertools
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import bilevel
from bilevel.hypergradients.progress import Progress
from bilevel.running.loop import Loop
from tests.bilevel.helpers import LINE_SOLVER

CONTROL = r"\x1b\[[?\d;]*[A-Za-z]"
NUMBERS = {"outer_loss": 1.0901, "inner_loss": 1.2171, "hypergradient_norm": 0.0026781, "decay": 0.51234}


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """What the terminal of whoever runs the tests asks for is not what is tested."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def bar_of(line: str) -> int:
    """How wide the bar in a line is: done and not done differ in colour, and between them may be half a character."""
    return len("".join(re.findall("[\u2501\u2578\u257a]", line)))


def terminal(width: int) -> Console:
    return Console(width=width, height=20, force_terminal=True, file=io.StringIO(), legacy_windows=False)


def seen(console: Console) -> list[str]:
    """What stands on the terminal in the end, line by line: each frame of the bar is drawn over the one before."""
    lines = [""]
    for text, control in re.findall(rf"([^\x1b\r\n]*)({CONTROL}|\r|\n|$)", console.file.getvalue()):
        lines[-1] += text
        if control == "\n":
            lines.append("")
        elif control == "\x1b[2K":
            lines[-1] = ""
        elif control == "\x1b[1A":
            lines.pop()
    return [line.rstrip() for line in lines if line.strip()]


def drawn(width: int, clock, title: str = "outer steps") -> str:
    """A run of 200 steps, the first of which took 40 seconds and the 66 after it one each."""
    with Progress(title, 200, console=(console := terminal(width))) as display:
        clock["now"] += 40
        display.advance(1, NUMBERS)
        clock["now"] += 66
        display.advance(67, NUMBERS)
    (line,) = seen(console)
    return line


@pytest.mark.parametrize(("width", "bar", "numbers"), [(60, 12, 0), (80, 16, 1), (100, 20, 2), (200, 40, 4)])
def test_bar_count_and_time_left_are_seen_at_every_width(clock, width, bar, numbers):
    line = drawn(width, clock)
    assert len(line) <= width
    title, _, rest = line.partition("  ")
    assert title == "outer steps"
    assert bar_of(rest[:bar]) == bar
    shown = "".join(f"  {name} {value:.4g}" for name, value in [*NUMBERS.items()][:numbers])
    assert rest[bar:] == f"   67/200  2:13 left{shown}" + ("  1:46 elapsed" if width == 200 else "")


def test_numbers_go_from_the_right_the_narrower_it_is(clock):
    before, narrowest = len(NUMBERS) + 1, None
    for width in range(200, 29, -1):
        line = drawn(width, clock)
        assert len(line) <= width and " 67/200  2:13 left" in line and bar_of(line) >= 10
        shown = [name for name in NUMBERS if name in line]
        assert shown == [*NUMBERS][: len(shown)] and len(shown) <= before
        assert "elapsed" not in line or len(shown) == len(NUMBERS)
        before, narrowest = len(shown), width
    assert before == 0 and narrowest == 30


def test_a_long_title_is_cut_before_the_bar(clock):
    for title in ("hypergradients of all the weights of a language model", "\u8a9e" * 30):
        line = drawn(60, clock, title)
        assert bar_of(line) == 12 and line.endswith(" 67/200  2:13 left")


def test_what_is_left_runs_down_between_two_steps(clock):
    display = Progress("steps", 10, console=(console := terminal(80)))
    for done in (1, 2):
        clock["now"] += 60
        display.advance(done, {})
    console.file.truncate(0)  # it was never entered, and has printed lines
    for passed, left in ((0, "8:00 left"), (45, "7:15 left"), (1000, "0:00 left")):
        clock["now"] += passed
        console.print(display)
        assert left in seen(console)[-1]


def test_a_run_that_goes_on_begins_where_it_was_with_no_time_known(clock):
    with Progress("steps", 100, start=90, console=(console := terminal(60))):
        pass
    (line,) = seen(console)
    assert line.endswith("90/100  -:-- left  0:00 elapsed")


def test_a_bar_below_another_one_is_gone_when_it_is_done(clock):
    console = terminal(60)
    with Progress("outer steps", 2, console=console) as outer:
        for done in (1, 2):
            with Progress("replay", 4) as inner:
                inner.advance(3, {})
                assert inner._console is console
                outer._live.refresh()
                assert [line.split()[0] for line in seen(console)] == ["outer", "replay"]
            outer.advance(done, {})
    (line,) = seen(console)
    assert line.startswith("outer steps") and "2/2  0:00 left" in line


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}], ids=str)
def test_no_control_characters_where_there_is_no_terminal(monkeypatch, capfd, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bilevel.run(LINE_SOLVER, steps=3)
    said = capfd.readouterr()
    assert re.fullmatch(r"outer steps 3/3(  \w+ [\d.e+-]+)+  0:00 left\n", said.err) and not said.out


def test_nor_on_a_terminal_that_knows_none(monkeypatch, capfd):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bilevel.run(LINE_SOLVER, steps=3)
    assert "\x1b" not in (said := capfd.readouterr().err) and "3/3" in said


def test_on_a_terminal_a_run_draws_on_stderr_and_shows_the_outer_loss_first(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert len(bilevel.run(LINE_SOLVER, steps=3).history["outer_loss"]) == 3
    said = capfd.readouterr()
    text = re.sub(CONTROL, "", said.err.split("\x1b[2K")[-1])
    assert re.search(r"\u2501{40}  3/3  0:00 left  outer_loss [\d.e+-]+  inner_loss ", text) and not said.out


def test_a_notebook_without_widgets_gets_lines(monkeypatch, clock):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    console = Console(force_jupyter=True, file=io.StringIO())
    with Progress("steps", 1, console=console) as display:
        display.advance(1, {})
    assert console.file.getvalue() == "steps 1/1  0:00 left\n"


def test_a_notebook_with_widgets_gets_the_bar(monkeypatch, clock):
    shown = []

    class Output(contextlib.nullcontext):
        def clear_output(self, wait):
            shown.clear()

    fakes = {"ipywidgets": {"Output": Output}, "IPython": {}, "IPython.display": {"display": shown.append}}
    for name, contents in fakes.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    console = Console(force_jupyter=True, width=115, file=io.StringIO())
    with Progress("steps", 4, console=console) as display:
        display.advance(3, {"loss": 0.5})
    texts = [re.sub(CONTROL, "", text) for each in shown if (text := getattr(each, "text", ""))]
    assert "3/4  -:-- left  loss 0.5" in texts[-1] and not console.file.getvalue()


def test_the_first_step_of_every_program_is_no_measure_of_the_time_left(clock, capfd):
    """Batches of two lengths, a program each: the first step of either takes 1,000 seconds, the others 10."""
    known = {2}

    def batches():
        for number in itertools.count():
            yield np.ones(2 + number % 2)

    def seconds(step, state, metrics):
        length = 2 + step % 2  # of the next step, in whose time this falls
        clock["now"] += 10 if length in known else 1000
        known.add(length)

    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o * b) ** 2), lambda w, o, b, k: jnp.sum((w - 2) ** 2),
        lambda key, o: jnp.zeros(()), lambda key: jnp.ones(()),
    )  # fmt: skip
    solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.1), 1), optax.sgd(0.1))
    bilevel.run(solver, inner_data=batches(), steps=100, callbacks=[seconds])
    said = re.findall(r"outer steps (\d+)/100 .*  (\S+) left", capfd.readouterr().err)
    later = {int(step): left for step, left in said if int(step) > 2}
    expected = {step: f"{(100 - step) * 10 // 60}:{(100 - step) * 10 % 60:02d}" for step in later}
    assert later == expected and len(later) > 20


def test_a_resumed_run_counts_its_own_steps_and_no_compilation(monkeypatch, clock, capfd, tmp_path):
    compiled = Loop._compiled

    def slowly(loop):
        clock["now"] += 1000
        return compiled(loop)

    def ten_seconds(step, state, metrics):
        clock["now"] += 10

    monkeypatch.setattr(Loop, "_compiled", slowly)
    go = lambda steps: bilevel.run(LINE_SOLVER, steps=steps, callbacks=[ten_seconds], checkpoint_dir=tmp_path)  # noqa: E731
    go(3)
    capfd.readouterr()
    go(10)
    counts = re.findall(r"outer steps (\d+/10) .*  (\S+) left", capfd.readouterr().err)
    # Compiled before the fourth; 10 seconds each from then on.
    assert counts == [("4/10", "-:--"), ("7/10", "0:30"), ("10/10", "0:00")]
