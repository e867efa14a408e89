"""Prometheus' configuration, its alerts, the dashboard and the runbook: valid, and about metrics
that the service has."""

import json
import re
import subprocess

import machine
import pytest
import yaml
from conftest import LOGIN, PASSWORD, PROMPTS, REGISTER, SIMILAR, SOCKET, client, make_user, post_prompt
from running_service import ROOT, Service, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/prompt-service.json").read_text())
RUNBOOK = (ROOT / "docs/OPERATIONS.md").read_text()
ALERTS = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]

# Words in a query that are no metrics. Functions, labels (they stand before a comparison) and
# variables are recognised below.
WORDS = {
    "and", "by", "changes", "count", "delta", "histogram_quantile", "instance", "le", "min", "or", "rate", "sum", "vector", "label_values",
    "route", "status", "throttle", "reason", "code", "backend", "kind", "purpose", "scope", "how", "version", "model", "error_type",
    "gen_ai_request_model", "gen_ai_token_type", "unless", "on", "max", "increase",
}
# Metrics of Prometheus itself.
SYNTHETIC = {"up"}


@pytest.fixture(scope="module")
def promtool():
    return machine.tool("promtool")


@pytest.fixture(scope="module")
def families():
    """Name and kind of every metric of a service, after every counted event has happened once."""
    with Service(PROMPT_THROTTLE="1/day", REGISTER_THROTTLE="1/day") as service, client(service) as http:
        user = make_user(http)
        assert post_prompt(http, user, "watch me").status_code == 201
        assert post_prompt(http, user, "too much").status_code == 429
        assert http.get(SIMILAR, params={"q": "watch"}, headers=user.auth).status_code == 200
        assert http.get(SIMILAR, params={"q": "watch"}, headers=user.auth).status_code == 200
        assert http.get(PROMPTS, headers=user.auth).status_code == 200
        assert http.post(REGISTER, json={"username": "x", "email": "a@b.c", "password": PASSWORD}).status_code == 429
        assert http.post(LOGIN, json={"username": user.username, "password": "wrong-wrong"}).status_code == 401
        assert http.get("/readyz").status_code == 200
        with connect(f"{service.ws_url}{SOCKET}?token={user.access}") as socket:
            socket.recv(timeout=30)
            # The frame is too long, so the service closes the socket.
            socket.send("x" * 70_000)
            with pytest.raises(ConnectionClosed):
                while True:
                    socket.recv(timeout=30)
        wait_until(lambda: "websockets_closed_total{" in http.get("/metrics").text, 30, "the closed socket is counted")
        return dict(re.findall(r"^# TYPE (\S+) (\S+)$", http.get("/metrics").text, re.MULTILINE))


def metrics_of(expression):
    """The metrics in a PromQL expression: the names without texts, label matchers, numbers and
    known words."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\$\w+", " ", bare)
    return {name for name in re.findall(r"[a-z_][a-z0-9_]*", bare) if name not in WORDS}


def series(families):
    names = set(SYNTHETIC)
    for name, kind in families.items():
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries():
    expressions = [rule["expr"] for rule in ALERTS]
    expressions += [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    expressions += [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    return expressions


def test_promtool_accepts_the_configuration_and_the_rules(promtool):
    for what, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        checked = subprocess.run([promtool, "check", what, PROMETHEUS / file], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert "FAILED" not in checked.stdout + checked.stderr


def test_promtool_can_read_every_query_of_the_dashboard(promtool, tmp_path):
    rules = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            plain = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".+")
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": plain})
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0 and len(rules) > 20, checked.stdout + checked.stderr


def test_every_query_names_metrics_that_the_service_has(families):
    known = series(families)
    missing = {name: expression for expression in queries() for name in metrics_of(expression) if name not in known}
    assert missing == {}
    assert all(metrics_of(expression) for expression in queries())


def test_queries_use_the_rate_of_counters_and_not_of_gauges(families):
    for expression in queries():
        for name in metrics_of(expression):
            if families.get(name) == "counter":
                assert re.search(rf"(?:rate|increase)\({name}\b", expression), expression
            if families.get(name) == "gauge" and name != "store_writes":
                assert not re.search(rf"(?:rate|increase)\({name}\b", expression), expression


def test_the_routes_in_queries_are_routes_of_the_service():
    described = json.loads((ROOT / "openapi.json").read_text())["paths"]
    for expression in queries():
        for route in re.findall(r'route="([^"]+)"', expression):
            assert route in {path.rstrip("/") for path in described}, route


def test_the_dashboard_reads_the_provisioned_data_source():
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    [source] = provisioned["datasources"]
    for panel in [*DASHBOARD["panels"], *DASHBOARD["templating"]["list"]]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}, panel.get("title")
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_every_alert_has_its_section_in_the_runbook_and_no_section_is_of_none():
    sections = re.findall(r"^### ([A-Z][a-z]+[A-Za-z]*[a-z])$", RUNBOOK[RUNBOOK.index("## Alerts") :], re.MULTILINE)
    assert sections == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/OPERATIONS.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_runbook_says_what_every_metric_means(families):
    explained = set(re.findall(r"^\| `([a-z_]+)`", RUNBOOK, re.MULTILINE))
    assert set(families) - explained == set()


# Each case: the samples of each minute, and whether the alert must be raised.
CASES = [
    ("ReplicaDown", 'up{job="prompt-service", instance="a"}', "0x10", True),
    ("ReplicaDown", 'up{job="prompt-service", instance="a"}', "1x10", False),
    ("BackendDown", 'backend_up{backend="store", instance="a"}', "0x10", True),
    ("BackendDown", 'backend_up{backend="store", instance="a"}', "1x10", False),
    ("ServerErrors", 'http_requests_total{status="503"}', "0+60x20", True),
    ("ServerErrors", 'http_requests_total{status="200"}', "0+60x20", False),
    ("Overloaded", 'overloaded_requests_total{instance="a"}', "0+60x20", True),
    ("PromptsFailing", 'prompts_total{status="failed"}', "0+60x20", True),
    ("PromptsFailing", 'prompts_total{status="completed"}', "0+60x20", False),
    ("StoreQueueLong", 'store_queue_depth{instance="a"}', "2000x20", True),
    ("PasswordGuessing", 'login_failures_total{reason="wrong"}', "0+600x40", True),
    ("SocketsFallBehind", 'websockets_closed_total{code="1013"}', "0+60x40", True),
    ("SocketsFallBehind", 'websockets_closed_total{code="4401"}', "0+60x40", False),
    ("VectorsEvicted", 'search_evicted_users{instance="a"}', "0+60x60", True),
    ("ReembeddingStuck", 'reembedding_remaining_prompts{instance="a"}', "500x90", True),
    ("ReembeddingStuck", 'reembedding_remaining_prompts{instance="a"}', "5000-50x90", False),
    ("Restarting", 'process_start_time_seconds{instance="a"}', "0+100x30", True),
    ("Restarting", 'process_start_time_seconds{instance="a"}', "100x30", False),
]


@pytest.mark.parametrize(("alert", "name", "values", "raised"), CASES)
def test_each_alert_is_raised_by_its_condition(promtool, tmp_path, alert, name, values, raised):
    minutes = int(values.rsplit("x", 1)[1])
    (tmp_path / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    # promtool needs every label and annotation of a raised alert, so a rule without them is
    # compared instead.
    rules = yaml.safe_load((tmp_path / "alerts.yml").read_text())
    [rule] = [rule for rule in ALERTS if rule["alert"] == alert]
    rules["groups"][0]["rules"] = [{"alert": alert, "expr": f"count({rule['expr']}) > 0", "for": rule.get("for", "0s")}]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    test = {
        "rule_files": ["alerts.yml"], "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m", "input_series": [{"series": name, "values": values}],
            "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": [{}] if raised else []}],
        }],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    checked = subprocess.run([promtool, "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
