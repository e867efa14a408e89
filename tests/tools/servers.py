"""Starts real Postgres and Redis servers for a test or a benchmark, and stops, stalls and restarts
them. Standard library only.

A server is a child process in a temporary folder on a free port of 127.0.0.1, with its own
password. It ends when the process that started it ends, in whatever way.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from running_service import wait_until
from started import Started

TOOLS = Path(__file__).resolve().parent

# Seconds. Both start within one; the rest is for a busy machine.
START_DEADLINE = 60
STOP_DEADLINE = 30

# A process that is started through this ends with its parent, also if the parent is killed.
TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


# Below the ports that Linux chooses for listeners and connections, so a server that was stopped for
# a while gets its port again.
PORTS = range(20_000, 32_000)
given_ports = set()


def free_port():
    """A port of 127.0.0.1 where nobody listens, and none that this process was given before."""
    while True:
        port = secrets.choice(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in given_ports:
                given_ports.add(port)
                return port


def found(server):
    """The output of tests/tools/test_servers.py for a server's programs, which it fetches if they
    are missing."""
    run = subprocess.run([sys.executable, str(TOOLS / "test_servers.py"), server], text=True, stdout=subprocess.PIPE)
    if run.returncode != 0:
        raise RuntimeError(f"tests/tools/test_servers.py found no {server}")
    return json.loads(run.stdout)


def descendants(pid):
    """A process and all that it has started, parents first."""
    family = [pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                family += map(int, task.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return family


class Server(Started):
    """One server process; subclasses know its command and its sign of readiness."""

    name = "server"
    # Further arguments of Popen.
    options = {}
    stop_signal = signal.SIGTERM

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix=f"prompt-service-{self.name}-"))
        self.port = free_port()
        self.password = f"{self.name}-{secrets.token_hex(12)}"
        self.process = None

    def start(self):
        """Starts the process on the same port and folder as before, and returns when it responds.
        """
        self.launch()
        try:
            wait_until(self.is_ready, START_DEADLINE, f"{self.name} answers")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return self

    def launch(self):
        """Starts the process without waiting for anything."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*TIED, *map(str, self.command())], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"}, **self.options,
            )

    def is_ready(self):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended at once with status {self.process.returncode}")
        return self.answers()

    def log(self):
        """All output of the process."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def output(self):
        """The end of the process's output, for a failure message."""
        return f"--- log of {self.name} ---\n{self.log()[-4000:]}"

    def signal_all(self, number):
        """Signals the process and all that it has started."""
        for pid in descendants(self.process.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def pause(self):
        """Stalls the server: connections stay open, the kernel accepts new ones, and the server
        does not respond."""
        self.signal_all(signal.SIGSTOP)

    def resume(self):
        self.signal_all(signal.SIGCONT)

    def stop(self, number=None):
        """Ends the process; the folder stays, for `start`."""
        self.process.send_signal(number or self.stop_signal)
        try:
            self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {STOP_DEADLINE} s\n{self.output()}") from None

    def close(self):
        """Ends the process in whatever state it is, and deletes its folder."""
        if self.process and self.process.poll() is None:
            self.resume()
            self.signal_all(signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    """A Postgres server with pgvector, and a role and a database for each service that requests
    one.

    `durable` keeps fsync on. Tests run without it, because no test here cuts the power.
    POSTGRES_KIND names another server of test_servers.py for all of them: `postgres18`.
    """

    name = "postgres"
    # "Fast": connections are ended. "Smart", which is SIGTERM, would wait for clients that never
    # leave.
    stop_signal = signal.SIGINT
    OWNER = "postgres"

    def __init__(self, durable=False, **settings):
        super().__init__()
        installation = found(os.environ.get("POSTGRES_KIND", "postgres"))
        self.programs = Path(installation["bin"])
        self.settings = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": 120,
            # In the data folder, so that a killed server leaves nothing elsewhere.
            "dynamic_shared_memory_type": "mmap", "shared_buffers": "64MB",
            **({} if durable else {"fsync": "off", "full_page_writes": "off"}), **settings,
        }
        # Postgres refuses to run as root, so root runs it as another user.
        self.uid = installation["uid"]
        if self.uid is not None:
            self.options = {"user": self.uid, "group": self.uid, "extra_groups": []}
            os.chown(self.folder, self.uid, self.uid)
        self.data = self.folder / "data"

    def command(self):
        flags = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        return [self.programs / "postgres", "-D", self.data, *flags]

    def launch(self):
        if not self.data.exists():
            self.initialise()
        super().launch()

    def initialise(self):
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if self.uid is not None:
            os.chown(password_file, self.uid, self.uid)
        run = subprocess.run(
            [
                self.programs / "initdb", "--pgdata", self.data, "--username", self.OWNER, "--pwfile", password_file,
                "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync",
            ],
            text=True, capture_output=True, cwd=self.folder, **self.options,
        )
        if run.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{run.stdout}{run.stderr}")

    def answers(self):
        return self.psql("SELECT 1", check=False).returncode == 0

    def psql(self, sql, database="postgres", check=True):
        run = subprocess.run(
            [
                self.programs / "psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1",
                "--host", "127.0.0.1", "--port", str(self.port), "--username", self.OWNER, "--dbname", database, "--file", "-",
            ],
            input=sql, text=True, capture_output=True, env={"PGPASSWORD": self.password, "PGCONNECT_TIMEOUT": "10"},
        )
        if check and run.returncode != 0:
            raise RuntimeError(f"psql failed:\n{run.stderr}")
        return run

    def query(self, sql, database="postgres"):
        """The rows of a query's result, as lists of texts."""
        return [line.split("|") for line in self.psql(sql, database).stdout.splitlines()]

    def make_database(self, extension=True):
        """A new database with a new role, which owns it and has no special rights; returns its
        DATABASE_URL."""
        name = f"d{secrets.token_hex(6)}"
        # CREATE DATABASE allows no other statement beside it in a transaction.
        self.psql(f"CREATE ROLE {name} LOGIN PASSWORD '{self.password}'")
        self.psql(f"CREATE DATABASE {name} OWNER {name}")
        if extension:
            self.psql("CREATE EXTENSION vector", name)
        return self.url(name, name)

    def url(self, database, user=None, password=None, port=None):
        return f"postgres://{user or self.OWNER}:{password or self.password}@127.0.0.1:{port or self.port}/{database}"

    def connections(self, database):
        """How many connections clients hold to a database."""
        [[count]] = self.query(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'")
        return int(count)


class Redis(Server):
    """A Redis server without files: a restart loses everything. `kind` is one that test_servers.py
    knows."""

    name = "redis"

    def __init__(self, kind="redis"):
        super().__init__()
        self.program = found(kind)["server"]

    def command(self):
        return [
            self.program, "--port", self.port, "--bind", "127.0.0.1", "--requirepass", self.password,
            "--save", "", "--appendonly", "no", "--dir", self.folder,
        ]

    @property
    def url(self):
        return self.url_at(self.port)

    def url_at(self, port):
        return f"redis://:{self.password}@127.0.0.1:{port}/0"

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(resp("AUTH", self.password))
        assert connection.recv(100) == b"+OK\r\n"
        return connection

    def answers(self):
        try:
            with self.connect() as connection:
                connection.sendall(resp("PING"))
                return connection.recv(100) == b"+PONG\r\n"
        except OSError:
            return False

    @contextmanager
    def monitored(self):
        """Within the block, collects the output of MONITOR: the lines of all commands that the
        server runs, each with its time."""
        lines = []
        with self.connect() as connection:
            connection.sendall(resp("MONITOR"))
            connection.settimeout(None)
            stream = connection.makefile("rb")
            assert stream.readline() == b"+OK\r\n"
            reader = threading.Thread(target=lambda: lines.extend(iter(stream.readline, b"")))
            reader.start()
            yield lines
            # The server replies to the last command after it has run everything before.
            with self.connect() as last:
                last.sendall(resp("ECHO", "the end"))
                last.recv(100)
            wait_until(lambda: any(b"the end" in line for line in lines[-100:]), 30, "the record is complete")
            connection.shutdown(socket.SHUT_RDWR)
            reader.join()


def resp(*words):
    """A command in Redis's protocol."""
    encoded = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
