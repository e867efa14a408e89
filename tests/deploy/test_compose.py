"""The compose files: valid by the published schema, and complete."""

import ipaddress
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
            if other == "secrets":
                # It ends when it has created them.
                assert how == {"condition": "service_completed_successfully"} and whole[other]["restart"] == "no", name
                continue
            assert how == {"condition": "service_healthy"}, name
            assert "healthcheck" in whole[other], other


def test_every_service_is_hardened():
    for name, service in everything()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_two_equal_replicas_are_behind_the_proxy():
    services = everything()["services"]
    assert services["replica-1"] == services["replica-2"]
    proxied = services["proxy"]["environment"]
    assert {proxied["REPLICA_1"], proxied["REPLICA_2"]} == {"replica-1:8000", "replica-2:8000"}
    # The proxy cannot reach the stores, and the metrics are on another port than the one it uses.
    assert "data" not in services["proxy"]["networks"] and everything()["networks"]["data"]["internal"] is True
    assert not services["replica-1"]["environment"]["METRICS_ADDR"].endswith(":8000")


def test_no_address_is_fixed_and_only_the_proxy_sends_requests_to_a_replica():
    whole = everything()
    for name, network in whole["networks"].items():
        assert "ipam" not in (network or {}), name
    for name, service in whole["services"].items():
        networks = service.get("networks", [])
        # A list, because with a mapping a service could request an address.
        assert isinstance(networks, list), name
        # Private addresses are trusted about the client's address, so nobody else may be on the
        # replicas' network.
        if "edge" in networks:
            assert name in ("proxy", "replica-1", "replica-2", "prometheus"), name
        assert ("ports" in service) == (name in ("proxy", "prometheus", "grafana")), name
    trusted = whole["services"]["replica-1"]["environment"]["TRUSTED_PROXIES"].split(",")
    assert all(ipaddress.ip_network(network).is_private for network in trusted)


def test_the_host_machine_can_be_reached_by_a_name():
    for name in ("replica-1", "replica-2"):
        assert everything()["services"][name]["extra_hosts"] == ["host.docker.internal:host-gateway"], name


def test_services_that_need_a_secret_wait_until_it_is_generated():
    for name, service in everything()["services"].items():
        reads = any(volume.startswith("secrets:") for volume in service.get("volumes", []))
        if name != "secrets":
            assert reads == ("secrets" in service.get("depends_on", {})), name
            assert "secrets:/secrets" not in service.get("volumes", []), f"{name} could write them"


def test_replicas_have_time_to_stop():
    # SHUTDOWN_DELAY of the image, SHUTDOWN_GRACE by default.
    assert int(everything()["services"]["replica-1"]["stop_grace_period"].rstrip("s")) > 5 + 30


def test_no_setting_is_required():
    for name in FILES:
        # $$ is a dollar sign for the container.
        for variable, default in re.findall(r"(?<!\$)\$\{([A-Z_0-9]+)(.*?)\}", (ROOT / name).read_text()):
            assert default.startswith(":-"), f"{name}: {variable} has no default"
    for name, service in everything()["services"].items():
        for file in service.get("env_file", []):
            assert file == {"path": ".env", "required": False}, name


def test_the_docker_example_file_names_only_other_variables_and_sets_nothing():
    example = (ROOT / ".env.docker.example").read_text()
    assert not re.findall(r"^[A-Z]", example, re.MULTILINE)
    named = set(re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE))
    settings = set(re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = {variable for name in FILES for variable in re.findall(r"(?<!\$)\$\{([A-Z_0-9]+)", (ROOT / name).read_text())}
    made = {word.split("=")[0] for word in load("docker-compose.yml")["services"]["secrets"]["command"][2:]}
    assert named == (used | made) - settings


def test_every_setting_of_a_replica_is_one_that_the_example_file_explains():
    explained = set(re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    given = load("docker-compose.yml")["services"]["replica-1"]["environment"]
    assert {name.removesuffix("_FILE") for name in given} <= explained


def test_each_replica_is_scraped_separately():
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [static] = job["static_configs"]
    assert static["targets"] == ["replica-1:9000", "replica-2:9000"]
    services = everything()["services"]
    assert set(services["prometheus"]["networks"]) & set(services["replica-1"]["networks"])
