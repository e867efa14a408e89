"""The black-box contract suite, against two replicas that get the requests in turn."""

import re

import pytest
from conftest import run_contract_suite
from replicas import Cluster
from servers import Postgres, Redis


@pytest.fixture(scope="module")
def cluster():
    with Postgres() as postgres, Redis() as redis, Cluster(2, postgres, redis) as running:
        yield running


def answered(replica, route):
    """How many requests of a route a replica has served."""
    metrics = replica.ask("/metrics")[1]
    counts = re.findall(rf'^http_requests_total{{[^}}]*route="{re.escape(route)}"[^}}]*}} (\d+)', metrics, re.MULTILINE)
    return sum(map(int, counts))


def test_the_contract_suite_passes_against_two_replicas_in_turn(cluster):
    print(run_contract_suite(cluster))
    for route in ("/api/prompts", "/api/prompts/similar", "/api/auth/login", "/ws/prompts"):
        shares = [answered(replica, route) for replica in cluster.replicas]
        assert min(shares) >= 5, f"{route} was answered {shares} times"
