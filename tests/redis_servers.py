"""A Redis server of a test: on a free port of this machine, killed and started anew as the test says."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

import pytest

redis = pytest.importorskip("redis", reason="needs the package redis")
PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
needs_a_server = pytest.mark.skipif(PROGRAM is None, reason="needs redis-server: apt-get install redis-server")


class Server:
    """A server that keeps nothing on disk, with these settings; it listens on a socket in `folder`, too."""

    def __init__(self, folder: Any, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.settings = folder, settings
        self.url, self.socket = f"redis://127.0.0.1:{self.port}/0", f"{folder}/redis.sock"
        self.client = redis.Redis(port=self.port, retry=None)
        self.start()

    def start(self) -> None:
        """Starts it, empty, and returns once it answers."""
        asked = {"port": self.port, "bind": "127.0.0.1", "unixsocket": self.socket, "save": "", "appendonly": "no"}
        words = [word for name, value in (asked | self.settings).items() for word in (f"--{name}", str(value))]
        assert PROGRAM is not None
        self.process = subprocess.Popen([PROGRAM, *words], cwd=self.folder, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it as a crash does; a second call does nothing."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    @contextlib.contextmanager
    def hanging(self) -> Any:
        """Lets it answer nothing; connections stay open, and new ones are accepted by the system."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)
