"""Runs the binary on a terminal of a given width. Standard library only."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading

from running_service import BINARY, KEPT, START_DEADLINE, wait_until

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """One process whose standard input, output and error are a terminal; for `with`."""

    def __init__(self, *arguments, folder, columns=80, **variables):
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        self.process = subprocess.Popen(
            [str(BINARY), *arguments], cwd=folder, env={**environment, "TERM": "xterm", **variables},
            stdin=its, stdout=its, stderr=its, start_new_session=True,
        )
        os.close(its)
        self.ours = ours
        self.raw = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        # When the other side of the terminal ends, reading is an error.
        try:
            while piece := os.read(self.ours, 65536):
                self.raw += piece
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        os.close(self.ours)

    @property
    def text(self):
        """All output so far, with its colours."""
        return self.raw.decode(errors="replace").replace("\r\n", "\n")

    @property
    def lines(self):
        """The lines without colours. Text that was overwritten is a separate line."""
        return re.split("[\r\n]+", ESCAPE.sub("", self.text).strip("\r\n"))

    def wait_for(self, words):
        wait_until(lambda: words in self.text, START_DEADLINE, lambda: f"{words!r} in {self.text!r}")

    def end(self, deadline=START_DEADLINE):
        """Waits for the process to end by itself; returns its status."""
        status = self.process.wait(deadline)
        self.reader.join()
        return status
