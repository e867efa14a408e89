"""The black-box contract suite, against a started service with the default throttle."""

from conftest import run_contract_suite
from running_service import Service


def test_the_contract_suite_passes_with_the_default_throttle():
    with Service() as service:
        print(run_contract_suite(service))
