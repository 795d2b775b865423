"""What a Ctrl-C is answered while the main thread does not hear of it."""

import signal
import subprocess
import sys
import time

import pytest

from methods.interrupts import WAITS

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
