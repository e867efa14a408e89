"""The compose files: valid by the published schema, and whole in themselves."""

import re

import pytest
import yaml
from conftest import ROOT, run, tool

FILES = ["docker-compose.yml", "docker-compose.observability.yml"]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


def everything():
    """Both files together, as compose merges them: no service is in both."""
    both = [load(name) for name in FILES]
    return {kind: {**both[0].get(kind, {}), **both[1].get(kind, {})} for kind in ("services", "networks", "volumes")}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_valid_by_the_compose_schema(name):
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", name)


def test_every_name_that_a_service_uses_is_declared():
    whole = everything()
    for name, service in whole["services"].items():
        assert set(service.get("networks", [])) <= set(whole["networks"]), name
        assert set(service.get("depends_on", {})) <= set(whole["services"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in whole["volumes"], volume


def test_whoever_is_waited_for_has_a_health_check():
    whole = everything()["services"]
    for name, service in whole.items():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, name
            assert "healthcheck" in whole[other] or "build" in whole[other], other


def test_every_service_is_hardened():
    for name, service in everything()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_two_replicas_alike_stand_behind_the_proxy():
    services = everything()["services"]
    assert services["replica-1"] == services["replica-2"]
    proxied = services["proxy"]["environment"]
    assert {proxied["REPLICA_1"], proxied["REPLICA_2"]} == {"replica-1:8000", "replica-2:8000"}
    # The stores are out of the proxy's reach, and the metrics are on a port that it does not know.
    assert "data" not in services["proxy"]["networks"] and everything()["networks"]["data"]["internal"] is True
    assert not services["replica-1"]["environment"]["METRICS_ADDR"].endswith(":8000")


def test_the_proxys_address_alone_is_trusted():
    services = everything()["services"]
    address = services["proxy"]["networks"]["edge"]["ipv4_address"]
    assert services["replica-1"]["environment"]["TRUSTED_PROXIES"] == f"{address}/32"


def test_replicas_have_time_to_stop():
    # SHUTDOWN_DELAY of the image, SHUTDOWN_GRACE by default.
    assert int(everything()["services"]["replica-1"]["stop_grace_period"].rstrip("s")) > 5 + 30


def test_the_example_file_names_every_variable_and_holds_no_secret():
    example = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", (ROOT / ".env.docker.example").read_text(), re.MULTILINE))
    used = set()
    for name in FILES:
        # $$ is a dollar sign for the container.
        used |= set(re.findall(r"(?<!\$)\$\{([A-Z_0-9]+)", (ROOT / name).read_text()))
    replica = load("docker-compose.yml")["services"]["replica-1"]["environment"]
    used |= {name for name, value in replica.items() if value is None}
    assert used == set(example)
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "SECRET_KEY", "GRAFANA_PASSWORD"):
        assert example[name] == ""


def test_every_setting_of_a_replica_is_one_that_an_example_file_explains():
    explained = set()
    for name in (".env.example", ".env.docker.example"):
        explained |= set(re.findall(r"^(?:# ?)?([A-Z_]+)=", (ROOT / name).read_text(), re.MULTILINE))
    assert set(load("docker-compose.yml")["services"]["replica-1"]["environment"]) <= explained


def test_each_replica_is_scraped_by_itself():
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [static] = job["static_configs"]
    assert static["targets"] == ["replica-1:9000", "replica-2:9000"]
    services = everything()["services"]
    assert set(services["prometheus"]["networks"]) & set(services["replica-1"]["networks"])
