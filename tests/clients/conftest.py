"""What the clients of these tests speak to.

Without any variable: a service with the scripted upstream behind it, both started here. With
V1_TARGET=upstream: the scripted upstream itself, which shows whether a failure is the service's.
With V1_BASE_URL and V1_KEY: a service that runs already; tests that look into the upstream are
skipped.
"""

import json
import os
from dataclasses import dataclass

import pytest
from api_keys import make_key
from openai_upstream import Upstream
from running_service import THROTTLES_OFF, Service, wait_until

# Prints at the end which tests were skipped.
pytest_plugins = ["machine"]

UPSTREAM_KEY = "sk-of-the-scripted-upstream"
EMBEDDING_MODEL = "all-MiniLM-L6-v2"
# Seconds in which the upstream learns that a client has left, or a service that outlives the client
# has read the answer to its end.
SETTLE_DEADLINE = 15


@dataclass
class Target:
    """An address with OpenAI's protocol, and the key for it."""

    base_url: str
    key: str
    # The scripted upstream, if it is known.
    upstream: Upstream | None = None
    # Whether the clients speak to the upstream itself.
    is_bare: bool = False

    def calls_with(self, text):
        """The upstream's records of chat completions whose messages have this text."""
        if self.upstream is None:
            pytest.skip("V1_BASE_URL names a service whose upstream is not known")
        return [call for call in self.upstream.chats() if text in json.dumps(call.get("body"), ensure_ascii=False)]

    def only_call_with(self, text):
        [call] = self.calls_with(text)
        return call

    def assert_cancelled(self, text):
        """The one call with this text ends: the upstream itself is hung up on; a service reads the
        answer to its end."""
        expected = "hung up" if self.is_bare else "answered"
        call = self.only_call_with(text)
        wait_until(lambda: call["outcome"] == expected, SETTLE_DEADLINE, lambda: f"the upstream's outcome is {expected}: {call['outcome']}")


@pytest.fixture(scope="session")
def target():
    if "V1_BASE_URL" in os.environ:
        yield Target(os.environ["V1_BASE_URL"].rstrip("/"), os.environ["V1_KEY"])
        return
    with Upstream(key=UPSTREAM_KEY) as upstream:
        if os.environ.get("V1_TARGET") == "upstream":
            yield Target(upstream.url, UPSTREAM_KEY, upstream, is_bare=True)
            return
        one = {"name": "scripted", "base_url": upstream.url, "key_env": "SCRIPTED_KEY", "models": ["*"]}
        settings = THROTTLES_OFF | {"V1_THROTTLE": "off", "OPENAI_MAX_RETRIES": "0", "UPSTREAMS": json.dumps([one]), "SCRIPTED_KEY": UPSTREAM_KEY}
        with Service(**settings) as service:
            yield Target(f"{service.url}/v1", make_key(service), upstream)
