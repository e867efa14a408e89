"""Starts several replicas of the release binary on one Postgres and one Redis, behind a round-robin
proxy. Standard library only."""

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import ExitStack

from running_service import Service, wait_until
from servers import TIED, TOOLS, free_port

# Seconds for a proxy to start or to carry out a command.
PROXY_DEADLINE = 30


class Proxy:
    """One of the proxies of this folder, as a child process that gets commands."""

    def __init__(self, script, *arguments):
        self.process = subprocess.Popen(
            [*TIED, sys.executable, str(TOOLS / script), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
        )
        self.port = int(self.answer())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(PROXY_DEADLINE)
        self.process.stdout.close()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with status {self.process.wait(PROXY_DEADLINE)}")
        return line

    def tell(self, line):
        """Sends a command and returns when it is in force."""
        self.process.stdin.write(line + "\n")
        assert self.answer() == "ok\n"


class FaultProxy(Proxy):
    """A proxy before a server's port that causes faults on demand: `tell("pass")`, `"delay 0.5"`,
    `"stall"`, `"cut"`."""

    def __init__(self, port):
        super().__init__("fault_proxy.py", port)


def database_of(url):
    return url.rpartition("/")[2]


class Cluster:
    """Replicas that are one service.

        with Cluster(2, postgres, redis, PROMPT_THROTTLE="off") as cluster:
            urlopen(cluster.url + "/healthz")

    `url` is the proxy's. `replicas` are the Services behind it, each with its own `url`. The
    replicas get DATABASE_URL, REDIS_URL and SECRET_KEY, their address and the given settings. With
    `faulty` there is a fault proxy before each of the servers, which `postgres_link` and
    `redis_link` are. `environments` are further variables for each replica alone.
    """

    def __init__(self, count, postgres, redis, faulty=False, environments=(), secret_key=None, **settings):
        self.count, self.postgres, self.redis, self.faulty = count, postgres, redis, faulty
        self.environments = environments or [{}] * count
        self.secret_key = secret_key or secrets.token_hex(32)
        self.settings = settings
        self.replicas = []
        self.stack = ExitStack()

    def __enter__(self):
        with ExitStack() as stack:
            self.database_url = self.postgres.make_database()
            self.redis_url = self.redis.url
            if self.faulty:
                self.postgres_link = stack.enter_context(FaultProxy(self.postgres.port))
                self.redis_link = stack.enter_context(FaultProxy(self.redis.port))
                self.database_url = self.postgres.url(self.database, self.database, port=self.postgres_link.port)
                self.redis_url = self.redis.url_at(self.redis_link.port)
            for number in range(self.count):
                replica = self.make_replica(number)
                stack.callback(replica.close)
                self.replicas.append(replica.launch())
            # Together, as an orchestrator does: the replicas must order the migrations themselves.
            for replica in self.replicas:
                replica.wait_until_ready()
            self.proxy = stack.enter_context(Proxy("round_robin.py"))
            self.proxy.tell(json.dumps({"backends": [replica.host_and_port[1] for replica in self.replicas]}))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        # All at once, so that their delays do not add up.
        for replica in self.replicas:
            if replica.process.poll() is None:
                replica.signal(signal.SIGTERM)
        self.stack.close()

    def make_replica(self, number):
        """A replica that has not been started, on a port that it keeps over restarts."""
        replica = Service(
            secret_key=self.secret_key, command=TIED, DATABASE_URL=self.database_url, REDIS_URL=self.redis_url,
            **{"BIND_ADDR": f"127.0.0.1:{free_port()}", "TRUSTED_PROXIES": "127.0.0.1/32", **self.settings, **self.environments[number]},
        )
        # A replica keeps nothing of its own.
        del replica.environment["DATA_DIR"]
        return replica

    @property
    def database(self):
        """The database's name, which is also its role's."""
        return database_of(self.database_url)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.proxy.port}"

    @property
    def ws_url(self):
        return f"ws://127.0.0.1:{self.proxy.port}"

    def output(self):
        """The end of all output, for a failure message."""
        return "\n".join([replica.output() for replica in self.replicas] + [self.postgres.output(), self.redis.output()])

    def connections(self):
        """How many connections all replicas hold to Postgres."""
        return self.postgres.connections(self.database)

    def wait_until_ready(self, deadline):
        """Waits for every replica's readiness."""
        for replica in self.replicas:
            wait_until(lambda: replica.get("/readyz") == 200, deadline, lambda: f"/readyz answers 200\n{self.output()}")


def count_open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))
