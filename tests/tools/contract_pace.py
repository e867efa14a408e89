"""A plugin of pytest for the contract suite, which is kept as it came: paces its spaced posts from answer to answer.

The suite sends them by a timetable. One that a busy machine delays by more than the timetable's slack, a seventh of a second, comes too
close before the next, and the throttle refuses that, rightly.
"""

import time


def spaced(post_prompt, user, count, pause=1.15):
    statuses = []
    for number in range(count):
        statuses.append(post_prompt(user, f"n{number}").status_code)
        # Counted before it was answered, so at least as long before the next is.
        time.sleep(pause)
    return statuses


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        if hasattr(module, "spaced"):
            module.spaced = spaced
