#!/usr/bin/env python3
"""Compares the prices of the release binary with those of PyPI's genai-prices, a list that other
people keep in another form.

    python3 tests/tools/compare_prices.py write    writes tests/reference/price_differences.json

A difference is known by its figures: for each model, from which length of the input on, and for
which kind of tokens, each side has which price. `tests/python/test_prices.py` computes the costs of
random usages on both sides. The difference of each must follow from the figures in that file, and
the figures must still be true. So an entry explains its difference and hides no other.
"""

import datetime
import json
import random
import re
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from genai_prices import Usage, data_snapshot

sys.path.insert(0, str(Path(__file__).parent))
from running_service import BINARY, ROOT  # noqa: E402

DIFFERENCES = ROOT / "tests" / "reference" / "price_differences.json"
# The other list has prices that hold for some hours of a day, and later prices: both sides are
# compared at noon of the day of our list.
VERSION = (ROOT / "assets" / "prices" / "version").read_text().split()
MOMENT = datetime.datetime.combine(datetime.date.fromisoformat(VERSION[1]), datetime.time(12), datetime.UTC)
# Who sells a model, in the words of both lists.
PROVIDERS = {
    "anthropic": "anthropic", "azure": "azure", "bedrock": "aws", "bedrock_converse": "aws", "cohere": "cohere", "cohere_chat": "cohere", "deepseek": "deepseek",
    "fireworks_ai": "fireworks", "gemini": "google", "groq": "groq", "mistral": "mistral", "novita": "novita", "openai": "openai", "perplexity": "perplexity",
    "together_ai": "together", "xai": "x-ai",
}
KINDS = ("input", "cache_read", "cache_write", "output", "reasoning")
INPUTS = KINDS[:3]
# Names with a region in them.
REGION = re.compile(r"^(bedrock/|azure/)?(ap|apac|au|ca|eu|global|jp|sa|us)(-gov)?[-./]")
# In a dollar.
PICO, FEMTO = 10**12, 10**15


def command(*arguments, stdin=""):
    done = subprocess.run([str(BINARY), "prices", *arguments], input=stdin, text=True, capture_output=True, cwd="/", check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def our_costs(usages):
    """The cost of each in picodollars. A usage is a dict of a model and the tokens of each kind."""
    answers = command("--compute", stdin="".join(json.dumps(usage) + "\n" for usage in usages))
    assert [answer["model"] for answer in answers] == [usage["model"] for usage in usages]
    return [answer["cost"] for answer in answers]


class Pair:
    """A model that both lists have."""

    def __init__(self, row, provider, model):
        self.row, self.provider, self.model = row, provider, model
        self.moment = MOMENT
        self.name = row["model"]

    def their_cost(self, tokens):
        """Exactly, in dollars."""
        usage = Usage(
            input_tokens=sum(tokens.get(kind, 0) for kind in INPUTS),
            cache_read_tokens=tokens.get("cache_read", 0),
            cache_write_tokens=tokens.get("cache_write", 0),
            output_tokens=tokens.get("output", 0) + tokens.get("reasoning", 0),
            output_reasoning_tokens=tokens.get("reasoning", 0),
        )
        price = self.model.calc_price(usage, self.provider, genai_request_timestamp=self.moment)
        # A fee for each request is no price of tokens.
        free = self.model.calc_price(Usage(), self.provider, genai_request_timestamp=self.moment)
        return price.total_price - free.total_price

    def their_starts(self):
        """The lengths of input from which on another price holds."""
        prices = vars(self.model.get_prices(self.moment)).values()
        return {tier.start for price in prices for tier in getattr(price, "tiers", [])}

    def their_price(self, above, kind):
        """Of a token of that kind in a call with a longer input than that, in dollars."""
        length = above + 1
        if kind in INPUTS:
            return self.their_cost({kind: length}) / length
        return self.their_cost({"input": length, kind: 1}) - self.their_cost({"input": length})

    def our_price(self, above, kind):
        [*_, band] = [band for band in self.row["standard"] if band["above"] <= above]
        return Decimal(band[kind]) / FEMTO

    def starts(self):
        return sorted({band["above"] for band in self.row["standard"]} | self.their_starts() | {0})

    def differences(self):
        """Of each length and kind where the prices differ: ours and theirs, in dollars for a
        million tokens."""
        found = {}
        for above in self.starts():
            for kind in KINDS:
                ours, theirs = self.our_price(above, kind), self.their_price(above, kind)
                if ours != theirs:
                    found.setdefault(str(above), {})[kind] = [plain(ours), plain(theirs)]
        return found

    def hour_of_agreement(self):
        """An hour of the day at which both sides have the same prices; None if there is none."""
        for hour in range(24):
            self.moment = MOMENT.replace(hour=hour)
            is_same = not self.differences()
            self.moment = MOMENT
            if is_same:
                return hour
        return None

    def reasons(self, differences):
        """What the figures show about the cause."""
        if all(self.their_price(0, kind) == 0 for kind in ("input", "output")):
            return ["theirs has no price of tokens"]
        if (hour := self.hour_of_agreement()) is not None:
            return [f"hours: theirs depends on the time of day, and is the same at {hour}:00 UTC"]
        reasons, at_all = [], differences.get("0", {})
        if "input" in at_all or "output" in at_all:
            ratios = {round(Decimal(ours) / Decimal(theirs), 2) for ours, theirs in at_all.values() if Decimal(theirs)}
            times = f"ours is {min(ratios)} times theirs" if len(ratios) == 1 else "by kind"
            if REGION.search(self.name) or "regional." in self.model.id:
                reasons.append(f"region: one side has no price of its own for this region: {times}")
            else:
                reasons.append(f"base price: the lists state different prices: {times}")
        for kind in ("cache_read", "cache_write", "reasoning"):
            if kind in at_all and not reasons:
                base = "output" if kind == "reasoning" else "input"
                if self.our_price(0, kind) == self.our_price(0, base):
                    reasons.append(f"{kind}: ours has no price of its own")
                elif self.their_price(0, kind) == self.their_price(0, base):
                    reasons.append(f"{kind}: theirs has no price of its own")
                else:
                    reasons.append(f"{kind}: the lists state different prices")
        ours, theirs = {band["above"] for band in self.row["standard"]} - {0}, self.their_starts()
        if ours != theirs:
            reasons.append(f"lengths: other prices hold above {sorted(ours) or 'no length'} in ours, {sorted(theirs) or 'no length'} in theirs")
        elif not reasons:
            reasons.append("lengths: the lists state different prices for long inputs")
        return reasons

    def entry(self):
        """What the file has about this model; None if both sides agree."""
        differences = self.differences()
        if not differences:
            return None
        theirs = f"{self.provider.id}:{self.model.id}"
        return {"theirs": theirs, "reasons": self.reasons(differences), "prices": differences}


def plain(price):
    """Dollars for a million tokens, as short as it is exact."""
    text = f"{price * 10**6:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def pairs():
    """All models that both lists have, by our name. A row of another name for a model that a
    provider sells, such as one in a region of its own, is left out if the other list has not that
    name."""
    snapshot = data_snapshot.get_snapshot()
    providers = {provider.id: provider for provider in snapshot.providers}
    found = {}
    for row in command("--json"):
        provider = providers.get(PROVIDERS.get(row["provider"]))
        if provider:
            name = row["model"].removeprefix(row["provider"] + "/")
            if model := provider.find_model(name, all_providers=snapshot.providers):
                found[row["model"]] = Pair(row, provider, model)
    return found


def explained(pair, tokens, entry):
    """The difference of the costs that the entry's figures explain, in dollars."""
    length = sum(tokens[kind] for kind in INPUTS)
    above = max(start for start in pair.starts() if start == 0 or start < length)
    prices = entry["prices"].get(str(above), {}) if entry else {}
    return sum(((Decimal(ours) - Decimal(theirs)) * tokens[kind] / 10**6 for kind, (ours, theirs) in prices.items()), Decimal(0))


def random_usages(pairs, number, seed):
    """Usages of all models in turn. Lengths of all orders of magnitude, and around the limits from
    which on other prices hold."""
    chance = random.Random(seed)
    names = sorted(pairs)
    for index in range(number):
        pair = pairs[names[index % len(names)]]
        tokens = {kind: chance.choice((0, int(10 ** chance.uniform(0, 6)))) for kind in KINDS}
        if chance.random() < 0.3 and (starts := pair.starts()[1:]):
            rest = chance.choice(starts) + chance.choice((0, 1))
            for kind in INPUTS[1:]:
                tokens[kind] = chance.randrange(rest // 2 + 1)
                rest -= tokens[kind]
            tokens["input"] = rest
        yield pair, tokens


def picodollars(dollars):
    return int((dollars * PICO).quantize(Decimal(1), ROUND_HALF_UP))


def main():
    entries = {name: entry for name, pair in sorted(pairs().items()) if (entry := pair.entry())}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    DIFFERENCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(entries)} of {len(pairs())} models differ")


if __name__ == "__main__":
    if sys.argv[1:] != ["write"]:
        sys.exit(__doc__)
    main()
