"""Threads that requests to a remote run in."""

from __future__ import annotations

import threading

from hfblend.store.requests import DaemonThreads


def test_a_request_that_no_thread_can_take_is_cancelled(monkeypatch):
    """Not waited for until it is late: a process that ends, or is at its limit, starts no thread."""
    threads, is_open = DaemonThreads(2, "test"), threading.Event()

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert threads.begin(lambda: 1).cancelled()
    at_work = threads.begin(lambda: is_open.wait(10))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        waits = threads.begin(lambda: 2)  # for the thread that is at work
    is_open.set()
    assert at_work.result(10)
    assert waits.result(10) == 2
