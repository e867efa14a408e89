"""The commands of the compose files, run unchanged without containers: those of Redis and
Prometheus, and their health checks."""

import json
import os
import shutil
import socket
import subprocess
import urllib.parse
from pathlib import Path

import httpx
import yaml
from conftest import SIMILAR, client, make_user, post_prompt
from machine import tool
from running_service import ROOT, THROTTLES_OFF, Service, wait_until
from servers import found, free_port

COMPOSE = {name: yaml.safe_load((ROOT / name).read_text())["services"] for name in ("docker-compose.yml", "docker-compose.observability.yml")}
PASSWORD = "a-password-of-the-cache"


def ask_redis(port, *commands):
    """What Redis answers to a few commands, as text."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall("".join(f"{command}\r\n" for command in [*commands, "QUIT"]).encode())
            return connection.makefile().read()
    except OSError:
        return ""


def test_the_command_of_redis_starts_it_with_its_password_and_keeps_what_it_has(tmp_path):
    server = tool("redis-server")
    service = COMPOSE["docker-compose.yml"]["redis"]
    port = free_port()
    # As compose passes it on: the file writes a dollar sign twice. The folder and port are
    # replaced.
    shell, flags, script = (part.replace("$$", "$") for part in service["command"])
    script = script.replace("--dir /data", f"--dir {tmp_path} --port {port}").replace("/secrets", str(tmp_path))
    assert str(tmp_path) in script
    (tmp_path / "REDIS_PASSWORD").write_text(PASSWORD)
    environment = {"PATH": f"{server.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}

    def started():
        process = subprocess.Popen([shell, flags, script], env=environment, stdout=subprocess.DEVNULL)
        wait_until(lambda: process.poll() is None and "NOAUTH" in ask_redis(port, "PING"), 30, "Redis wants its password")
        return process

    process = started()
    try:
        assert "+PONG" in ask_redis(port, f"AUTH {PASSWORD}", "PING")
        # Nobody can read the password from the command line.
        assert PASSWORD not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "+OK" in ask_redis(port, f"AUTH {PASSWORD}", "SET kept yes")
        # When memory is full, writes are refused and no counter is removed.
        assert "noeviction" in ask_redis(port, f"AUTH {PASSWORD}", "CONFIG GET maxmemory-policy")
        process.terminate()
        assert process.wait(30) == 0
        process = started()
        # Redis replies before it has read its data.
        wait_until(lambda: "yes" in ask_redis(port, f"AUTH {PASSWORD}", "GET kept"), 30, "what was kept is there again")
    finally:
        process.kill()
        process.wait()


def test_the_health_check_of_postgres_fails_without_a_server():
    # Other tests show that it succeeds with a running Postgres. This test shows that the command is
    # right.
    programs = found("postgres")["bin"]
    words = COMPOSE["docker-compose.yml"]["postgres"]["healthcheck"]["test"]
    assert words[0] == "CMD"
    no_response = 2
    command = [f"{programs}/{words[1]}", *words[2:], f"--port={free_port()}"]
    assert subprocess.run(command, capture_output=True).returncode == no_response


def test_prometheus_started_as_in_compose_scrapes_the_replicas_and_answers_every_query(tmp_path):
    server = tool("prometheus")
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/prompt-service.json").read_text())
    port = free_port()
    with Service(METRICS_ADDR=(own := f"127.0.0.1:{free_port()}"), **THROTTLES_OFF) as service, client(service) as http:
        user = make_user(http)
        folder = tmp_path / "etc"
        shutil.copytree(ROOT / "deploy/prometheus", folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [job] = config["scrape_configs"]
        job["static_configs"] = [{"targets": [own]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        words = [word.replace("/etc/prometheus", str(folder)).replace("=/prometheus", f"={tmp_path / 'data'}") for word in
                 COMPOSE["docker-compose.observability.yml"]["prometheus"]["command"]]
        assert f"--config.file={folder}/prometheus.yml" in words
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen([server, *words, f"--web.listen-address=127.0.0.1:{port}"], cwd=tmp_path, stdout=log, stderr=log)
        try:
            prometheus = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

            def answer(query):
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    result = prometheus.get("/api/v1/query?" + urllib.parse.urlencode({"query": query}))
                except httpx.TransportError:
                    return []
                assert result.status_code in (200, 503), f"{query}: {result.text}"
                return result.json()["data"]["result"] if result.status_code == 200 else []

            wait_until(lambda: any(item["value"][1] == "1" for item in answer('up{job="prompt-service"}')), 60, "the service is scraped")
            # Not on the public port, because they have a separate listener.
            assert http.get("/metrics").status_code == 404

            def busy():
                assert post_prompt(http, user, "look at me").status_code == 201
                assert http.get(SIMILAR, params={"q": "look"}, headers=user.auth).status_code == 200
                return answer('rate(http_request_duration_seconds_count{route="/api/prompts/similar"}[10s]) > 0')

            wait_until(busy, 60, "requests are seen in the metrics", interval=0.2)
            empty = []
            for panel in dashboard["panels"]:
                for target in panel.get("targets", []):
                    query = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
                    if not answer(query):
                        empty.append(panel["title"])
            # These did not happen: no refusal, no failed request, no closed socket.
            assert set(empty) <= {"Refused", "Server errors", "Sockets closed by the service", "Not computed"}
            assert len(prometheus.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]) > 10
            prometheus.close()
        finally:
            process.terminate()
            process.wait(60)
