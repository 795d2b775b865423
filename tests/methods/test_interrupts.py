"""What a Ctrl-C is answered while the main thread does not hear of it."""

import signal
import subprocess
import sys
import time

import pytest

from methods import cli
from methods.causes import reading
from methods.interrupts import WAITS, interrupted

SCRIPT = """
import hashlib, signal, time
from methods.interrupts import acknowledged

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
begun = time.perf_counter()
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
rounds = max(1, int(100_000 * {seconds} / (time.perf_counter() - begun)))
try:
    with acknowledged():
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)  # as a compiled step: no signal ends it
        time.sleep(5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def started(seconds):
    script = SCRIPT.format(seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    return process


def test_a_step_that_runs_on_is_told_and_ended_at_its_end():
    out, err = started(4).communicate(timeout=60)
    assert err == f"\n{WAITS}\n" and out.endswith("interrupted\n")


def test_what_ends_at_once_is_not_told():
    out, err = started(0).communicate(timeout=60)
    assert err == "" and out.endswith("interrupted\n")


def test_a_second_one_ends_the_process():
    process = started(30)
    assert process.stderr.readline() == "\n" and process.stderr.readline() == f"{WAITS}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stdout.close()
    process.stderr.close()


DROPS = {
    "a callback of the garbage collector": "gc.callbacks.append(lambda *_: drop()); gc.collect(); gc.callbacks.pop()",
    "a callback of a weak reference": "one = type('One', (), {})(); ref = weakref.ref(one, lambda _: drop()); del one",
    "a __del__": "one = type('One', (), {'__del__': lambda _: drop()})(); del one",
    "one after another": "for _ in range(9): one = type('One', (), {'__del__': lambda _: drop(0.05)})(); del one",
}
DROPPED = """
import gc, hashlib, os, signal, sys, threading, time, weakref
from methods import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
hook, sent = sys.unraisablehook, []

def drop(lasts=0.0):
    if not sent:
        sent.append(1)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(lasts)

def late():
    begun = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = int(100_000 * 4 / (time.perf_counter() - begun))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)  # as a compiled step

def run():
    {drops}
    time.sleep(5)
    print("went on", flush=True)

class Command(dict):
    def __contains__(self, name):
        run()

cli.COMMANDS = Command()
print(cli.run(["lora"]), sys.unraisablehook is hook, signal.set_wakeup_fd(-1))
"""


def after(drops):
    """What a command prints that is interrupted where Python drops the error."""
    script = [sys.executable, "-c", DROPPED.format(drops=drops)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


@pytest.mark.parametrize("kind", DROPS)
def test_one_that_python_drops_comes_again_and_ends_the_command(kind):
    assert after(DROPS[kind]) == ("130 True -1\n", "\nInterrupted; nothing was written yet.\n")


def test_one_that_is_dropped_after_it_was_told_to_wait_is_no_second_one():
    told = f"\n{WAITS}\n\nInterrupted; nothing was written yet.\n"
    assert after(DROPS["a __del__"].replace("drop()", "late()")) == ("130 True -1\n", told)


def test_what_else_is_raised_in_a_callback_is_shown_as_before():
    out, err = after("one = type('One', (), {'__del__': lambda _: 1 / 0})(); del one; return sys.exit(3)")
    assert out == "" and err.startswith("Exception ignored in: ") and "ZeroDivisionError" in err


def test_one_that_came_while_something_was_saved_is_no_second_one():
    lasts = "from bilevel.running.interrupts import uninterrupted\n    with uninterrupted(), uninterrupted(): "
    told = f"\n{WAITS}\n\nInterrupted; nothing was written yet.\n"
    assert after(f"{lasts}drop(); time.sleep(1.5)") == ("130 True -1\n", told)


WRAPPED = {
    "by Python": ("raise RuntimeError from pressed", True),
    "by a library": ("raise RuntimeError", True),
    "and not as its cause": ("raise RuntimeError from None", True),
    "and a full disk is told": ("raise OSError(28, 'No space left on device', 'a.json')", False),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_is_made_of_one_is_one(how, monkeypatch, capsys):
    raised, is_one = WRAPPED[how]

    class Command(dict):
        def __contains__(self, name):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as pressed:
                exec(raised, {"pressed": pressed})

    monkeypatch.setattr(cli, "COMMANDS", Command())
    code, said = cli.run(["lora"]), capsys.readouterr().err
    one = (130, "\nInterrupted; nothing was written yet.\n")
    assert (code, said) == (one if is_one else (2, "bilevel: No space left on device: a.json\n"))


def test_reading_a_file_does_not_make_a_mistake_of_one():
    class Field:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    with pytest.raises((RuntimeError, KeyboardInterrupt)) as raised, reading("The file", "look at it"):
        type("Owner", (), {"field": Field()})  # Python 3.11 makes a RuntimeError of it
    assert interrupted(raised.value)


def test_other_errors_are_none_however_they_are_chained():
    for chained in (ValueError(), RuntimeError()):
        chained.__cause__ = chained.__context__ = TypeError()
        chained.__cause__.__context__ = chained  # a circle
        assert not interrupted(chained, meanwhile=True)


@pytest.mark.parametrize("fault", [ValueError, None])
def test_nothing_is_left_behind(fault):
    from methods.interrupts import acknowledged

    handler = signal.getsignal(signal.SIGINT)
    for _ in range(3):
        try:
            with acknowledged(), acknowledged():
                if fault:
                    raise fault
        except ValueError:
            pass
    assert signal.set_wakeup_fd(-1) == -1 and signal.getsignal(signal.SIGINT) is handler
