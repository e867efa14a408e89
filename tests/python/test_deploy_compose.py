"""docker-compose.yml without containers: the same commands, variables and files, as processes on
loopback."""

import os
import re
import subprocess
from contextlib import ExitStack

import compose
import httpx
import machine
import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, SOCKET, assert_healthy, make_user, post_prompt
from running_service import BINARY, ROOT, Service, wait_until
from servers import Postgres, Server, found, free_port
from websockets.sync.client import connect

SERVICES = compose.services()
CONFIG = ROOT / "deploy/haproxy/haproxy.cfg"
# The content of a volume is there at the next start.
SECRETS = ["DATABASE_URL", "GRAFANA_PASSWORD", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "REDIS_URL", "SECRET_KEY"]


class Redis(Server):
    """The command of the service `redis`, with other folders and another port."""

    name = "redis"

    def __init__(self, secrets):
        super().__init__()
        self.secrets = secrets
        # The file names a program of the image, which is on PATH.
        (self.folder / "redis-server").symlink_to(found("redis")["server"])

    def command(self):
        shell, flags, script = compose.command(SERVICES["redis"])
        script = script.replace("/secrets", str(self.secrets)).replace("--dir /data", f"--dir {self.folder} --port {self.port} --bind 127.0.0.1")
        return ["env", f"PATH={self.folder}:{os.environ['PATH']}", shell, flags, script]

    def answers(self):
        return "Ready to accept connections" in self.log()


class Stack:
    """Everything that `docker-compose up` starts, with `dotenv` as .env. `volumes` is the folder of
    the volumes."""

    def __init__(self, volumes, haproxy, **dotenv):
        self.volumes, self.haproxy, self.dotenv = volumes, haproxy, dotenv
        self.secrets = volumes / "secrets"
        self.secrets.mkdir(exist_ok=True)
        self.stack = ExitStack()
        self.log = volumes / "proxy.log"

    def __enter__(self):
        with self.stack:
            self.make_secrets()
            self.postgres = self.stack.enter_context(self.make_postgres())
            self.redis = self.stack.enter_context(Redis(self.secrets))
            # The addresses of the files, and the addresses here.
            self.moved = {
                "@postgres:5432": f"@127.0.0.1:{self.postgres.port}", "@redis:6379": f"@127.0.0.1:{self.redis.port}",
            }
            self.make_secrets(self.moved)
            self.replicas = [self.stack.enter_context(self.make_replica(name)) for name in ("replica-1", "replica-2")]
            self.start_proxy()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def make_secrets(self, moved=()):
        """Does the work of the service `secrets`. The addresses in its command are replaced by
        those of the servers here."""
        words = compose.command(SERVICES["secrets"])
        for name, here in dict(moved).items():
            words = [word.replace(name, here) for word in words]
        words = [str(self.secrets) if word == "/secrets" else word for word in words]
        made = subprocess.run([BINARY, *words], env=compose.environment(SERVICES["secrets"], self.dotenv), capture_output=True, text=True)
        assert (made.returncode, made.stdout, made.stderr) == (0, "", ""), made

    def secret(self, name):
        return (self.secrets / name).read_text()

    def make_postgres(self):
        """Does what the image does with its variables: creates a superuser of that name and
        password, and a database."""
        given = compose.environment(SERVICES["postgres"], self.dotenv)
        postgres = Postgres()
        postgres.OWNER = given["POSTGRES_USER"]
        postgres.password = (self.secrets / given["POSTGRES_PASSWORD_FILE"].removeprefix("/secrets/")).read_text()
        database = given["POSTGRES_DB"]
        postgres.start()
        postgres.psql(f"CREATE DATABASE {database}")
        return postgres

    def make_replica(self, name):
        replica = Service()
        given = compose.environment(SERVICES[name], self.dotenv)
        assert re.fullmatch(r"0\.0\.0\.0:\d+", given["BIND_ADDR"]) and given["METRICS_ADDR"].startswith("0.0.0.0:")
        self.metrics_addr = f"127.0.0.1:{free_port()}"
        replica.environment = {
            **{name: value.replace("/secrets", str(self.secrets)) for name, value in given.items()},
            # Different ports, because here they share an address.
            "BIND_ADDR": "127.0.0.1:0", "METRICS_ADDR": self.metrics_addr, "DATA_DIR": str(replica.data_dir),
            # Here the proxy is not on a separate network.
            "TRUSTED_PROXIES": given["TRUSTED_PROXIES"] + ",127.0.0.1/32",
        }
        return replica

    def start_proxy(self):
        given = compose.environment(SERVICES["proxy"], self.dotenv)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        given |= {"PROXY_BIND": f"127.0.0.1:{port}", "PATH": os.environ["PATH"]}
        given |= {f"REPLICA_{number}": replica.address for number, replica in enumerate(self.replicas, 1)}
        with open(self.log, "wb") as out:
            process = subprocess.Popen([self.haproxy, "-W", "-db", "-f", CONFIG], env=given, stdout=out, stderr=out)
        self.stack.callback(lambda: (process.terminate(), process.wait(60)))

        def answers():
            try:
                return httpx.get(f"{self.url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, 60, lambda: f"the proxy reaches a replica: {self.log.read_text()}")

    def client(self):
        return httpx.Client(base_url=self.url, timeout=60)


@pytest.fixture(scope="module")
def haproxy():
    return machine.tool("haproxy")


def test_a_fresh_clone_starts_without_any_file_and_serves_a_session(haproxy, tmp_path):
    assert compose.filled_in(SERVICES["proxy"]["ports"][0], {}) == "127.0.0.1:8000:8080"
    with Stack(tmp_path, haproxy, PROMPT_THROTTLE="off") as stack, stack.client() as http:
        assert_healthy(http)
        user = make_user(http)
        with connect(f"{stack.url.replace('http', 'ws')}{SOCKET}?token={user.access}") as socket:
            assert "WebSocket connected" in socket.recv(timeout=30)
            assert post_prompt(http, user, "through all of it", websocket=True).status_code == 201
            assert "through all of it" in socket.recv(timeout=30)
        # Both replicas take the same tokens, and the proxy reaches no metrics.
        for replica in stack.replicas:
            assert httpx.get(f"{replica.url}{PROMPTS}", headers=user.auth).status_code == 200
            assert replica.get("/metrics") == 404
        assert httpx.get(f"http://{stack.metrics_addr}/metrics").status_code == 200
        assert sorted(path.name for path in stack.secrets.iterdir()) == SECRETS
        secrets = {name: stack.secret(name) for name in SECRETS}
        assert len(set(secrets.values())) == len(SECRETS)
        # A container's log contains none of them.
        written = "".join(replica.written(stream) for replica in stack.replicas for stream in ("stdout", "stderr"))
        written += stack.redis.log() + stack.postgres.log() + stack.log.read_text()
        assert not [name for name, secret in secrets.items() if secret in written]
        # Another `up` on the same volumes generates nothing again.
        stack.make_secrets(stack.moved)
        assert {name: stack.secret(name) for name in SECRETS} == secrets


def test_settings_of_env_reach_the_service_and_its_secrets_win(haproxy, tmp_path):
    given = {
        "SECRET_KEY": "a key of the operator's own, long enough", "POSTGRES_PASSWORD": "p@ss: word/100%", "REDIS_PASSWORD": 'a "quoted" \\ one',
        "PROMPT_THROTTLE": "7/day", "ACCESS_TOKEN_LIFETIME": "9m", "PUBLISH": "0.0.0.0:8123",
    }
    with Stack(tmp_path, haproxy, **given) as stack, stack.client() as http:
        for name in ("SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD"):
            assert stack.secret(name) == given[name]
        user = make_user(http)
        created = post_prompt(http, user, "as the operator wants it")
        assert created.status_code == 201 and created.headers["ratelimit-policy"].endswith('q=7;w=86400')
        # Signed with the operator's key.
        with Service(secret_key=given["SECRET_KEY"]) as another:
            refused = httpx.get(f"{another.url}/api/auth/me/", headers=user.auth).json()
            assert refused["code"] == "user_not_found"
        token = http.post("/api/auth/token/", data={"grant_type": "password", "username": user.username, "password": PASSWORD}).json()
        assert token["expires_in"] == 9 * 60
        session = http.post(LOGIN, json={"username": user.username, "password": PASSWORD, "session": True})
        assert session.status_code == 200
    assert compose.filled_in(SERVICES["proxy"]["ports"][0], given) == "0.0.0.0:8123:8080"


def test_every_setting_of_env_reaches_every_replica():
    # Another test compares this list with the service's settings.
    settings = set(re.findall(r"^# ?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {"SYSTEM_PROMPT", "PROMPT_THROTTLE", "OPENAI_FALLBACK"} < settings and len(settings) > 30
    # The file decides the containers' addresses and folders.
    fixed = {"BIND_ADDR", "DATA_DIR", "METRICS_ADDR", "TRUSTED_PROXIES"}
    in_files = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY"}
    dotenv = {name: f"the value of {name}" for name in settings | {"A_KEY_THAT_OPENAI_FALLBACK_NAMES"}}
    for name in ("replica-1", "replica-2"):
        given = compose.environment(SERVICES[name], dotenv)
        assert {setting: given[setting] for setting in dotenv.keys() - fixed - in_files} == {
            setting: dotenv[setting] for setting in dotenv.keys() - fixed - in_files
        }
        for setting in in_files:
            assert given[setting] == "" and given[f"{setting}_FILE"] == f"/secrets/{setting}"
    assert in_files <= compose.environment(SERVICES["secrets"], dotenv).keys()


def test_an_upstream_on_the_host_machine_can_be_named():
    # As docker-compose.yml and the documents say, over plain HTTP.
    with Service(OPENAI_BASE_URL="http://host.docker.internal:11434/v1", OPENAI_MODEL="llama3.2") as service:
        assert service.get("/readyz") == 200
