"""A process that is told to end, or simply ends, loses nothing that was saved or could be."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from bilevel.running.interrupts import terminable, uninterrupted
from tests.bilevel.helpers import LINE_SOLVER, assert_equal
from tests.bilevel.trainings import DATA, run

pytestmark = pytest.mark.usefixtures("at_a_terminal")
ROOT = Path(__file__).parents[3]

PROGRAM = """
import os, sys
import jax

jax.config.update("jax_enable_x64", True)

from tests.bilevel.trainings import DATA, run  # made as the test that imports it makes it: before the next line

jax.config.update("jax_disable_most_optimizations", True)

def callback(step, state, rows):
    print(step, flush=True)
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[3]))

run(steps=7, **DATA, checkpoint_dir=sys.argv[1], checkpoint_every=float(sys.argv[4]), callbacks=[callback])
print("end", flush=True)
"""


def killed(folder, at, number, every):
    """A run in a process of its own that is sent signal `number` after step `at`: its exit status and steps."""
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(at), str(int(number)), str(every)]
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout.split()


def test_a_process_that_is_killed_again_and_again_is_one_that_was_not(tmp_path):
    """SIGTERM saves and then ends the process as it does by default; SIGKILL leaves what was saved before."""
    assert killed(tmp_path, 2, signal.SIGTERM, 60.0) == (-signal.SIGTERM, ["1", "2"])
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["2"]
    # Step 2 was done, its callback had not returned: it is called again.
    assert killed(tmp_path, 5, signal.SIGKILL, 0.0) == (-signal.SIGKILL, ["2", "3", "4", "5"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["3", "4"]
    resumed, whole = run(steps=7, **DATA, checkpoint_dir=tmp_path), run(steps=7, **DATA)
    assert_equal(resumed.state, whole.state)
    assert_equal(resumed.history, whole.history)


def test_sigterm_unwinds_the_stack_and_what_must_be_whole_is():
    program = """
    import os, signal, sys
    from bilevel.running.interrupts import terminable, uninterrupted
    with terminable():
        try:
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                print("whole", flush=True)
            print("not reached", flush=True)
        finally:
            print("saved", flush=True)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (-signal.SIGTERM, ["whole", "saved"], "")


def test_a_ctrl_c_while_something_is_saved_comes_after_it():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")
        done.append("not reached")
    assert done == ["whole"]


def test_handlers_are_put_back_and_those_of_others_kept(tmp_path):
    came = []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    inside = []
    run(LINE_SOLVER, 1, checkpoint_dir=tmp_path, callbacks=[lambda *_: inside.append(signal.getsignal(signal.SIGTERM))])
    assert inside[0] is not signal.SIG_DFL and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    mine = lambda number, frame: came.append(number)  # noqa: E731
    signal.signal(signal.SIGTERM, mine)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is mine
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                assert not came
            assert came == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)))
    thread.start()
    thread.join()
    assert len(found) == 1 and (tmp_path / "2").is_dir()


def interrupting(number):
    return lambda step, *_: os.kill(os.getpid(), number) if step == 3 else None


def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        run(LINE_SOLVER, 9, checkpoint_dir=tmp_path, callbacks=[interrupting(signal.SIGINT)])
    (said,) = caplog.messages
    saved = f"outer steps: interrupted after 3 of 9, which are saved in {tmp_path}: "
    assert said == f"{saved}the same call goes on from there."
    assert (tmp_path / "3").is_dir()


def test_an_interrupted_run_without_a_folder_says_that_nothing_is_saved(caplog):
    with pytest.raises(KeyboardInterrupt):
        run(LINE_SOLVER, 9, callbacks=[interrupting(signal.SIGINT)])
    (said,) = caplog.messages
    assert said.startswith("outer steps: interrupted after 3 of 9, which are not saved: give checkpoint_dir=")
    assert "\n" not in said


def test_an_interrupted_run_that_could_not_be_saved_says_so(tmp_path, caplog, monkeypatch):
    import orbax.checkpoint as ocp

    def full(self, step, **kwargs):
        raise OSError(28, "No space left on device")

    run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(KeyboardInterrupt), pytest.warns(RuntimeWarning, match="No space left"):
        run(LINE_SOLVER, 9, checkpoint_dir=tmp_path, callbacks=[interrupting(signal.SIGINT)])
    assert "interrupted after 3 of 9, which are lost after step 2: the same call" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_written_finds_it_saved(tmp_path, number):
    """It waits until the checkpoint is whole, and is then told of as saved, without a second attempt."""
    program = f"""
    import os, orbax.checkpoint as ocp
    from tests.bilevel.helpers import LINE_SOLVER
    from tests.bilevel.trainings import run
    save = ocp.CheckpointManager.save
    def interrupted(self, step, **settings):
        if step == 3:
            os.kill(os.getpid(), {int(number)})
        return save(self, step, **settings)
    ocp.CheckpointManager.save = interrupted
    settings = dict(checkpoint_dir={str(tmp_path)!r}, checkpoint_every=0, callbacks=[lambda *_: None])
    run(LINE_SOLVER, 9, **settings)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT)
    assert f"interrupted after 3 of 9, which are saved in {tmp_path}: the same call" in ended.stderr
    assert "could not be written" not in ended.stderr and ended.returncode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "fingerprint.json"]


def test_an_interrupt_before_the_first_step_says_that_there_is_nothing(tmp_path, caplog, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("bilevel.running.loop"), "chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(LINE_SOLVER, 9, checkpoint_dir=tmp_path)
    (said,) = caplog.messages
    assert said == "outer steps: interrupted before the first of 9 was done: the same call begins anew."


def test_a_run_without_a_folder_that_is_terminated_says_so_and_ends_as_it_would_have():
    program = """
    import os, signal
    from tests.bilevel.helpers import LINE_SOLVER
    from tests.bilevel.trainings import run
    run(LINE_SOLVER, 9, callbacks=[lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None])
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stderr.startswith("outer steps: interrupted after 3 of 9, which are not saved")
    assert "Traceback" not in ended.stderr
