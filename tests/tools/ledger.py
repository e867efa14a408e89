"""Reads what calls have cost out of a service's database, and checks that rows, sums and counters
agree. Standard library only."""

import json
import sqlite3
from collections import Counter
from contextlib import closing

MODEL = "scripted"
# Dollars for a token of output. Input is free, so that a call costs exactly what its answer does.
PRICE = 1e-06
PICODOLLARS = 10**12


def write_prices(folder):
    """A file for PRICES_FILE with the price of the scripted upstream's models."""
    row = {
        "input_cost_per_token": 0, "output_cost_per_token": PRICE, "max_input_tokens": 1_000_000, "max_output_tokens": 1000,
        "litellm_provider": "openai", "mode": "chat",
    }
    path = folder / "prices.json"
    path.write_text(json.dumps({name: row for name in (MODEL, "paced-5x10")}))
    return path


def open_sqlite(service):
    """The database of an embedded service, for reading, also while it runs."""
    [database] = service.database_files()
    return closing(sqlite3.connect(f"file:{service.data_dir}/{database.name}?mode=ro", uri=True))


def running_calls(connection):
    """Calls that have not ended, those of processes that died included."""
    return connection.execute("SELECT count(*) FROM running_call").fetchone()[0]


def check_ledger(connection, tracks_service):
    """Every sum and every counter is the sum of the rows, and nothing is reserved. Returns the
    number of rows and what they cost, in picodollars. `tracks_service`: whether the service has a
    budget."""
    rows = connection.execute("SELECT user_id, day, coalesce(api_key_id, ''), model, coalesce(cost, 0), coalesce(output, 0) FROM usage").fetchall()
    costs, tokens, attempts, spent = Counter(), Counter(), Counter(), Counter()
    for user, day, key, model, cost, output in rows:
        group = (user, day, key, model)
        costs[group] += cost
        tokens[group] += output
        attempts[group] += 1
        subjects = [("user", str(user))] + [("key", key)] * bool(key) + [("service", "")] * tracks_service
        for kind, subject in subjects:
            spent[kind, subject, day] += cost
            spent[kind, subject, -1] += cost
    sums = connection.execute("SELECT user_id, day, api_key_id, model, attempts, output, cost FROM usage_day").fetchall()
    assert {row[:4]: row[4:] for row in sums} == {group: (attempts[group], tokens[group], costs[group]) for group in attempts}
    counters = connection.execute("SELECT kind, subject_id, day, settled, reserved FROM spend").fetchall()
    kept = {tuple(row[:3]): tuple(row[3:]) for row in counters if any(row[3:])}
    assert kept == {subject: (cost, 0) for subject, cost in spent.items() if cost}
    return len(rows), sum(costs.values())
