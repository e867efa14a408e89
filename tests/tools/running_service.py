"""Starts the release binary for a test or a benchmark, and stops it. Standard library only."""

import json
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from started import Started

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
BINARY = Path(os.environ.get("PROMPT_SERVICE_BINARY", TARGET / "release" / "prompt-service"))

# The service gets these variables from the caller's environment; others would make runs differ.
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "TZ", "LD_LIBRARY_PATH")

# Seconds. A start takes a fraction of one; the rest is for a busy machine.
START_DEADLINE = 60
STOP_DEADLINE = 60

THROTTLES_OFF = {"PROMPT_THROTTLE": "off", "REGISTER_THROTTLE": "off"}


def wait_until(condition, deadline, what, interval=0.01):
    """Returns the first true result of `condition`; fails if there is none within `deadline`
    seconds.

    `what` describes the condition: a text, or a function that makes one from the last state.
    """
    end = time.monotonic() + deadline
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:.1f} s: {what() if callable(what) else what}")
        time.sleep(interval)


def run(*arguments, folder, stdin="", timeout=START_DEADLINE, **variables):
    """Runs one command of the binary to its end, in that working directory and with only these
    variables."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    return subprocess.run(
        [str(BINARY), *arguments], cwd=folder, env=environment | variables, input=stdin, text=True, capture_output=True, timeout=timeout,
    )


def refusal(process):
    """The one error line of a failed command."""
    assert process.returncode > 0, process
    [line] = process.stderr.splitlines()
    return line


class Service(Started):
    """One server process on a port that it chooses.

        with Service(PROMPT_THROTTLE="off") as service:
            urlopen(service.url + "/healthz")

    Settings are environment variables. Without `data_dir` the service gets a new one, deleted by
    `close`; a second Service on the same `data_dir` is a restart. `command` goes before the
    binary's path. `process_options` are subprocess.Popen's.
    """

    def __init__(self, data_dir=None, secret_key=None, command=(), binary=None, process_options=None, **settings):
        self.folder = Path(tempfile.mkdtemp(prefix="prompt-service-"))
        self.data_dir = Path(data_dir) if data_dir else self.folder / "data"
        self.secret_key = secret_key or secrets.token_hex(32)
        self.command = [*command, str(binary or BINARY)]
        self.process_options = process_options or {}
        self.environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        self.environment |= {"BIND_ADDR": "127.0.0.1:0", "DATA_DIR": str(self.data_dir), "SECRET_KEY": self.secret_key}
        self.environment |= settings
        self.process = None
        self.address = None

    def launch(self):
        """Starts the process without waiting for anything."""
        if not Path(self.command[-1]).is_file():
            raise FileNotFoundError(f"{self.command[-1]} is missing: run `cargo build --release` first")
        # A file, not a pipe: nobody has to read it, and a full pipe cannot stop the service. A
        # second launch appends to it.
        with open(self.folder / "stdout", "ab") as out, open(self.folder / "stderr", "ab") as err:
            options = {"cwd": self.folder, **self.process_options}
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, start_new_session=True, **options,
            )
        return self

    def start(self):
        """Starts the process and returns when it reports that it is ready."""
        return self.launch().wait_until_ready()

    def wait_until_ready(self):
        """Returns when the launched process reports that it is ready."""
        try:
            self.address = wait_until(self.listening, START_DEADLINE, "the service logs its address")
            wait_until(lambda: self.get("/readyz") == 200, START_DEADLINE, "/readyz answers 200")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return self

    def listening(self):
        """The address in the last log line that announces it, if there is one."""
        if self.process.poll() is not None:
            raise AssertionError(f"the service ended at once with status {self.process.returncode}")
        for line in reversed(self.log()):
            if line.get("message") == "listening" and "addr" in line:
                return line["addr"]
        pretty = re.search(r" listening addr=(\S+)", self.written("stdout"))
        return pretty and pretty[1]

    def log(self):
        """The log so far, as one dictionary for each line that is JSON."""
        lines = []
        for line in self.written("stdout").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                lines.append({**value, **value.get("fields", {})})
        return lines

    def written(self, stream):
        """All output of the process on `stdout` or `stderr` so far."""
        return (self.folder / stream).read_text(errors="replace")

    def stderr(self):
        return self.written("stderr")

    def output(self):
        """The end of the process's output, for a failure message."""
        parts = []
        for name in ("stdout", "stderr"):
            parts.append(f"--- {name} of {self.command[-1]} ---\n{self.written(name)[-6000:]}")
        return "\n".join(parts)

    @property
    def url(self):
        return f"http://{self.address}"

    @property
    def ws_url(self):
        return f"ws://{self.address}"

    @property
    def host_and_port(self):
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def pid(self):
        return self.process.pid

    def ask(self, path):
        """The status and the text of the response to a GET; both None without a response."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, OSError):
            return None, None

    def get(self, path):
        """The status of a GET, or None without a response."""
        return self.ask(path)[0]

    def metric(self, series):
        """The value of one series of /metrics, in its notation (`backend_up{backend="store"}`);
        None if it does not exist."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.ask("/metrics")[1] or "", re.MULTILINE)
        return found and float(found[1])

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, deadline=STOP_DEADLINE):
        """Waits for the end of the process and returns its exit status (negative: the signal that
        ended it)."""
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the service did not end within {deadline} s\n{self.output()}") from None

    def stop(self):
        """Asks the service to end and returns its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self):
        """Kills the process at once."""
        self.process.kill()
        self.process.wait()

    def close(self):
        """Ends the process in whatever state it is, and deletes the temporary folder."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def limit_file_size(self, size_bytes):
        """Lets the process write no file beyond this size, or any (None). The signal must have been
        ignored at its start."""
        limit = resource.RLIM_INFINITY if size_bytes is None else size_bytes
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def database_files(self):
        """The SQLite databases in the data folder."""
        found = []
        for path in self.data_dir.iterdir():
            if path.is_file():
                with open(path, "rb") as file:
                    if file.read(16) == b"SQLite format 3\0":
                        found.append(path)
        return found
