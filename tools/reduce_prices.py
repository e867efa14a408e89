#!/usr/bin/env python3
"""Makes the bundled table of prices from LiteLLM's public list; `assets/prices/README.md` says what
is kept of it, and why.

Standard library only. Source: the PyPI package litellm, of which one file is read:
    pip download --no-deps litellm==1.110.2
    python tools/reduce_prices.py litellm-1.110.2-*.whl 2026-11-30

The second argument is the day on which the list was fetched. The same wheel and day give the same
bytes.
"""

import datetime
import decimal
import json
import pathlib
import re
import sys
import zipfile

LIST = "litellm/model_prices_and_context_window_backup.json"
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "assets" / "prices"
# What is answered by text, or by a vector, for tokens. The others have units that no budget knows.
MODES = {"chat", "completion", "embedding", "responses"}
# Prices of tokens, for which length of the input and at which service tier.
PRICE = re.compile(
    r"(?:input_cost_per_token|output_cost_per_token|output_cost_per_reasoning_token"
    r"|cache_read_input_token_cost|cache_creation_input_token_cost)"
    r"(?:_above_\d+k_tokens)?(?:_priority|_flex)?"
)
# Servers that their owner runs: their models cost nothing. A price of zero of anybody else is one
# that the list does not know, such as that of a preview.
OWN_SERVERS = {"lemonade", "ollama"}
# The finest price that is kept, in dollars: a femtodollar. Finer digits come from binary fractions
# and converted currencies.
FINEST = decimal.Decimal("1e-15")


def price(value):
    """The number as it is written: without an exponent's padding and the noise of binary fractions.
    """
    rounded = decimal.Decimal(str(value)).quantize(FINEST, decimal.ROUND_HALF_UP).normalize()
    mantissa, _, exponent = f"{rounded:e}".partition("e")
    return mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"


def tier(row):
    start, end = (int(decimal.Decimal(str(bound))) for bound in row["range"])
    prices = [f'"range":[{start},{end}]']
    prices += [f'"{name}":{price(row[name])}' for name in sorted(row) if PRICE.fullmatch(name) and row[name] is not None]
    return "{" + ",".join(prices) + "}"


def reduced(name, row):
    """The model's line, or None if it has no price of tokens."""
    names = sorted(name for name in row if PRICE.fullmatch(name) and row[name] is not None)
    # Where tokens cost something, writing them to the cache is not free: a zero says that there is
    # no surcharge over the price of input.
    names = [name for name in names if row[name] or not name.startswith("cache_creation")]
    tiers = row.get("tiered_pricing")
    if row.get("mode") not in MODES or not (tiers or "input_cost_per_token" in names):
        return None
    provider = row["litellm_provider"]
    all_prices = [row[name] for name in names] + [value for one in tiers or [] for key, value in one.items() if key != "range"]
    if not any(all_prices) and provider not in OWN_SERVERS:
        return None
    members = [f'"litellm_provider":{json.dumps(provider)}']
    if row["mode"] == "embedding":
        members.append('"mode":"embedding"')
    members += [f'"{name}":{price(row[name])}' for name in names]
    if tiers:
        members.append('"tiered_pricing":[' + ",".join(map(tier, tiers)) + "]")
    max_output = row.get("max_output_tokens", row.get("max_tokens"))
    for member, limit in (("max_input_tokens", row.get("max_input_tokens")), ("max_output_tokens", max_output)):
        if limit:
            members.append(f'"{member}":{int(limit)}')
    if date := row.get("deprecation_date"):
        members.append(f'"deprecation_date":"{datetime.date.fromisoformat(date)}"')
    return f"{json.dumps(name)}:{{{','.join(members)}}}"


def main(wheel, day):
    day = datetime.date.fromisoformat(day)
    with zipfile.ZipFile(wheel) as archive:
        [folder] = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        version = re.fullmatch(r"litellm-(.+)\.dist-info", folder)[1]
        licence = archive.read(f"{folder}/licenses/LICENSE")
        models = json.loads(archive.read(LIST), parse_float=decimal.Decimal)
    del models["sample_spec"]
    lines = [line for name in sorted(models) if (line := reduced(name, models[name]))]
    (FOLDER / "prices.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (FOLDER / "version").write_text(f"litellm-{version} {day}\n")
    (FOLDER / "LICENSE").write_bytes(licence)
    print(f"{len(lines)} of {len(models)} models, {(FOLDER / 'prices.json').stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
