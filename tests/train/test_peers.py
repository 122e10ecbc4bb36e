"""Processes that watch each other: told apart are a lost one, one that ended with an error, and one that is done."""

import contextlib
import dataclasses
import socket
import threading
import time

import pytest
import toys
from toys import QUIET

from jkd import data, train
from jkd.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_LOST, EXIT_USER_ERROR, UserError
from jkd.train import peers, watchdog
from jkd.train.watchdog import Progress, Watchdog

LIMIT = 20  # seconds


class Ended(list):
    """Collects what would have ended the process, and lets a thread go on as if nothing had happened."""

    def __call__(self, line, code):
        self.append((line, code))

    def wait(self):
        until = time.monotonic() + LIMIT
        while not self and time.monotonic() < until:
            time.sleep(0.01)
        assert self, "nothing happened"
        return self[0]


@pytest.fixture
def ended(monkeypatch):
    found = Ended()
    monkeypatch.setattr(peers, "end_now", found)
    monkeypatch.setattr(watchdog, "end_now", found)
    monkeypatch.setattr(peers, "_delay_aborts", lambda: None)
    monkeypatch.setattr(peers, "DOUBT", 0.2)
    monkeypatch.setattr(peers, "_left_alone", threading.Event())
    return found


@pytest.fixture
def group(monkeypatch, ended):
    """Starts processes 0, 1, ... of a run inside this one."""
    offers = []
    monkeypatch.setattr(peers, "from_chief", lambda text: offers.append(text) or text if text else offers[-1])
    monkeypatch.setattr(peers.jax, "process_count", lambda: 3)
    stack = contextlib.ExitStack()

    def start(count=3, timeout=0.3):
        made = []
        for process in range(count):
            monkeypatch.setattr(peers.jax, "process_index", lambda process=process: process)
            made.append(peers.Peers(Progress("teacher", 20, "training", 10), timeout))
            made[-1].__enter__()
        until = time.monotonic() + LIMIT
        while len(made[0]._links) < count - 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(made[0]._links) == count - 1
        for one in made:
            stack.callback(close, one)
        return made

    yield start
    stack.close()


def close(one, error=None):
    if not one._stop.is_set():
        one.__exit__(None if error is None else type(error), error, None)


def kill(one):
    """What the kernel does to the connections of a process that is killed."""
    one._left = True
    for link in one._links:
        link.connection.shutdown(socket.SHUT_RDWR)


def test_a_lost_process_is_named_to_all_others(group, ended):
    _, one, _ = group()
    kill(one)
    line, code = ended.wait()
    assert code == EXIT_LOST
    host = socket.gethostname()
    assert f"process 1 ({host}) is gone" in line
    assert "run the same command again on all hosts to go on from step 10 of stage 'teacher' or later" in line
    until = time.monotonic() + LIMIT
    while len(ended) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(ended) == 2, "process 2 hears of it through process 0"
    assert ended[0] == ended[1]


def test_the_loss_of_the_first_process_is_seen_by_itself(group, ended):
    zero, _ = group(2)
    kill(zero)
    line, code = ended.wait()
    assert code == EXIT_LOST
    assert "process 0 (" in line


def test_processes_that_are_done_are_not_lost(group, ended):
    zero, one, two = group()
    for process in (one, zero, two):
        close(process)
    assert not ended
    assert not peers.left_alone()


def test_an_error_of_one_process_ends_the_others_when_they_do_not_end_themselves(group, ended):
    _, one, _ = group()
    close(one, UserError("the disk is full"))
    assert peers.left_alone(), "the others did not leave with it"
    line, code = ended.wait()
    assert code == EXIT_USER_ERROR
    assert line == f"process 1 ({socket.gethostname()}) ended: the disk is full"


def test_an_error_that_all_processes_meet_is_left_to_each(group, ended):
    made = group(timeout=5.0)
    threads = [threading.Thread(target=close, args=(one, UserError("same"))) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not ended
    assert not peers.left_alone()


def test_strangers_are_ignored(group, ended):
    zero, one = group(2)
    port = next(k.fileobj for k in zero._selector.get_map().values() if k.data is None).getsockname()[1]
    for text in (b"", b'{"token": "wrong", "process": 1, "host": "x"}\n', b"GET / HTTP/1.0\n\n", b"[]\n", b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
            time.sleep(0.05)
    kill(one)
    assert "process 1 (" in ended.wait()[0]


def test_the_kernel_watches_the_hosts(group):
    zero, one = group(2, timeout=60.0)
    for link in (zero._links[0], one._links[0]):
        assert link.connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        idle, interval, count = (link.connection.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert idle + interval * count <= 60


def test_a_crash_stays_until_the_others_have_said_so(group, ended, monkeypatch):
    monkeypatch.setattr(peers, "CRASHED", 0.5)
    _, one = group(2)
    close(one, KeyError("boom"))
    assert ended[0] == (f"process 1 ({socket.gethostname()}) ended: KeyError: 'boom'", 1)


def test_an_interrupted_process_ends_the_others_at_once(group, ended):
    _, one = group(2)
    close(one, KeyboardInterrupt())
    assert ended[0] == (f"process 1 ({socket.gethostname()}) ended: it was interrupted", EXIT_INTERRUPTED)


# --- the watchdog ---


def test_a_run_that_stands_still_ends_with_where_it_hangs(ended, monkeypatch, tmp_path):
    told = []
    progress = Progress()
    with (tmp_path / "err").open("w") as err:
        monkeypatch.setattr(watchdog.sys, "__stderr__", err)
        with Watchdog(progress, 0.2, lambda line, code: told.append((line, code))):
            progress.at("training", stage="teacher", step=7, saved=5)
            line, code = ended.wait()
    assert told[0] == (line, code)
    assert code == EXIT_HUNG
    assert "hangs in stage 'teacher', step 7, training" in line
    assert "go on from step 5 of stage 'teacher'" in line
    assert "test_a_run_that_stands_still" in (tmp_path / "err").read_text(), "the stack of this thread"


def test_a_source_that_never_answers_is_a_hang(ended, tmp_path, monkeypatch):
    armed: list[bool] = []

    class Stuck(data.MemorySource):
        def local(self, t, rows=None):
            if t == 3 and armed:
                ended.wait()
            return super().local(t, rows)

    stage = toys.classifier(num_steps=5, data=lambda consts: Stuck(toys.DIGITS, 16, seed=3), evaluators={})
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: None)
    toys.go([stage], tmp_path / "warm", options=QUIET)  # compiled: a slow machine is no hang
    armed.append(True)
    toys.go([stage], tmp_path / "run", options=dataclasses.replace(QUIET, hang_timeout=1.0))
    line, code = ended[0]
    assert code == EXIT_HUNG
    assert "hangs in stage 'teacher', step 3, training" in line


@pytest.mark.parametrize("field", ["peer_timeout", "hang_timeout"])
def test_negative_times_are_refused(field):
    with pytest.raises(UserError, match=f"must be >= 0 seconds .*{field}=-1.0"):
        train.LoopOptions(**{field: -1.0})


def test_slow_progress_is_no_hang(ended):
    progress = Progress()
    with Watchdog(progress, 2.0):
        for _ in range(5):
            time.sleep(0.5)  # together more than the timeout
            progress.at("training")
    assert not ended


@pytest.mark.parametrize(("phase", "hangs"), [("prepare", False), ("training", True)])
def test_host_work_that_reports_nothing_is_no_hang(phase, hangs, ended, monkeypatch):
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: None)
    progress = Progress()
    with Watchdog(progress, 1.0):
        progress.at(phase)
        until = time.process_time() + 2.0
        while time.process_time() < until and not ended:
            sum(range(1000))  # computes; a step that spins is a hang all the same
    assert bool(ended) == hangs


def test_time_in_which_the_process_was_stopped_does_not_count(ended, monkeypatch):
    clock = iter([0.0, *(1000.0 * i for i in range(1, 9))])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock, 9000.0))
    dog = Watchdog(
        Progress(phase=watchdog.STEPPING), 100.0
    )  # ticks each second: eight jumps count for two seconds each
    ticks = iter([False] * 8 + [True])
    monkeypatch.setattr(dog._done, "wait", lambda seconds: next(ticks))
    dog._watch()
    assert not ended
