"""The prices of the release binary, beside those of another list: `make test-prices` runs these
alone."""

import json
from decimal import Decimal

import pytest
from compare_prices import DIFFERENCES, explained, our_costs, pairs, picodollars, random_usages
from conftest import ME, client, make_user, post_prompt
from running_service import THROTTLES_OFF, Service, refusal, run

USAGES, SEED = 10_000, 11
ROW = '{"own": {"input_cost_per_token": 2.5e-6, "output_cost_per_token": 1e-5}}'


@pytest.fixture(scope="module")
def models():
    return pairs()


def test_every_listed_difference_from_the_other_list_is_there_and_no_other(models):
    listed = json.loads(DIFFERENCES.read_text())
    found = {name: entry for name, pair in models.items() if (entry := pair.entry())}
    assert {name: entry for name, entry in found.items() if listed.get(name) != entry} == {}
    assert set(listed) == set(found)
    # Most models agree in every figure.
    assert len(models) > 700 and len(found) < len(models) / 3


def test_random_usages_cost_what_the_other_list_computes_or_differ_as_listed(models):
    listed = json.loads(DIFFERENCES.read_text())
    usages = list(random_usages(models, USAGES, SEED))
    ours = our_costs([{"model": pair.name, **tokens} for pair, tokens in usages])
    agreed, unexplained = 0, []
    for (pair, tokens), cost in zip(usages, ours, strict=True):
        theirs = pair.their_cost(tokens)
        difference = explained(pair, tokens, listed.get(pair.name))
        agreed += difference == 0
        if cost != picodollars(theirs + difference):
            unexplained.append((pair.name, tokens, cost, theirs, difference))
    assert unexplained == []
    assert agreed > USAGES * 2 / 3


def test_the_command_prints_a_model_as_providers_print_prices(tmp_path):
    printed = run("prices", "gpt-6-luna", folder=tmp_path)
    assert printed.returncode == 0, printed
    head, usual, long, unit = printed.stdout.splitlines()
    assert usual.split()[:6] == ["gpt-6-luna", "0", "0.10", "0.01", "0.125", "0.50"]
    assert long.split()[:6] == ["gpt-6-luna", "272000", "0.20", "0.02", "0.25", "0.75"]
    assert "million" in unit
    [row] = map(json.loads, run("prices", "--json", "gpt-6-luna", folder=tmp_path).stdout.splitlines())
    assert row["standard"][0]["input"] == Decimal("1e-7") * 10**15


def test_a_model_without_a_price_is_a_failure_that_names_the_setting(tmp_path):
    failed = run("prices", "gpt-6-luna", "nobodys-model", folder=tmp_path)
    line = refusal(failed)
    assert "nobodys-model" in line and "PRICES_FILE" in line
    assert "gpt-6-luna" in failed.stdout


def test_the_operators_prices_go_before_the_bundled_ones(tmp_path):
    (tmp_path / "prices.json").write_text(ROW)
    usage = json.dumps({"model": "own", "input": 2, "output": 1}) + "\n"
    [answer] = map(json.loads, run("prices", "--compute", folder=tmp_path, stdin=usage, PRICES_FILE="prices.json").stdout.splitlines())
    assert (answer["model"], answer["cost"]) == ("own", 15_000_000)
    assert answer["version"].startswith("PRICES_FILE ")


@pytest.mark.parametrize("content", [None, "{", '{"own": {"input_cost_per_token": 2.5}}', '{"own": {"input_cost_per_token": 1e-6}}'])
@pytest.mark.parametrize("command", [("serve",), ("prices",)], ids=" ".join)
def test_a_wrong_file_of_prices_refuses_the_start_with_one_line(tmp_path, content, command):
    if content is not None:
        (tmp_path / "prices.json").write_text(content)
    line = refusal(run(*command, folder=tmp_path, PRICES_FILE="prices.json", BIND_ADDR="127.0.0.1:0"))
    assert line.startswith("error: PRICES_FILE: prices.json "), line


def test_a_budget_is_set_and_usage_is_printed_beside_a_running_server():
    with Service(**THROTTLES_OFF) as service, client(service) as http:
        user = make_user(http)
        assert post_prompt(http, user, "hello world").status_code == 201
        settings = {"folder": service.folder, "DATA_DIR": str(service.data_dir)}
        name = http.get(ME, headers=user.auth).json()["username"]
        printed = run("usage", "--by", "user,model", **settings)
        assert printed.returncode == 0, printed
        head, row = printed.stdout.splitlines()
        assert head.split("\t")[:5] == ["day", "user", "key", "model", "attempts"]
        assert row.split("\t")[:5] == ["-", name, "-", "mock", "1"]
        assert row.split("\t")[10:] == ["0.00", "0"]
        assert run("user", "budget", name, **settings).stdout == "no budget\n"
        assert run("user", "budget", name, "20.5/month", **settings).stdout == "budget 20.50/month\n"
        assert run("user", "budget", name, **settings).stdout == "budget 20.50/month\nspent 0.00\nreserved 0.00\n"
        # What costs nothing fits into any budget.
        assert post_prompt(http, user, "hello again").status_code == 201
        assert run("user", "budget", name, "off", **settings).stdout == "no budget\n"
        assert "no such user" in refusal(run("user", "budget", "nobody", **settings))
        for wrong in ("20/year", "0", "much"):
            assert "budget" in refusal(run("user", "budget", name, wrong, **settings)).lower()
        assert "--by" in refusal(run("usage", "--by", "week", **settings))
        assert "--from" in refusal(run("usage", "--from", "yesterday", **settings))
