"""The same cases with each client: streams, tools, errors, limits, and a client that leaves.

CLIENTS names the clients, separated by commas; without it all but LlamaIndex, whose packages have
an environment of their own.
"""

import json
import os
import uuid

import adapters
import pytest

DEFAULT = ",".join(name for name in adapters.CLIENTS if name != "llama-index")


@pytest.fixture(scope="module", params=os.environ.get("CLIENTS", DEFAULT).split(","))
def client(request, target):
    return adapters.adapter(request.param, target)


@pytest.fixture
def text():
    """A question that no other test asks."""
    return f"What is the weather in 'Oslo'? {uuid.uuid4().hex}"


def assert_refused(seen, status, code, message):
    """An error with this status and this code, or with this message where the client shows only
    that."""
    assert seen["status"] == status
    assert seen.get("code", code) == code
    assert "code" in seen or message in seen["message"]


def test_a_stream_comes_in_pieces_and_with_its_usage(target, client, text):
    seen = client.stream(text)
    assert text in seen["text"] and seen["chunks"] > 5
    usage = target.only_call_with(text)["usage"]
    kinds = ("prompt_tokens", "completion_tokens")
    assert [seen["usage"][kind] for kind in kinds] == [usage[kind] for kind in kinds]


def test_a_tool_is_called_and_its_result_answered(client, text):
    seen = client.tools(text)
    [call] = seen["calls"]
    assert (call["name"], json.loads(call["arguments"]), seen["finish_reason"]) == ("get_weather", {"place": "Oslo"}, "tool_calls")
    assert "It rains." in seen["text"]


def test_an_error_of_the_upstream_has_its_status_and_code(client, text):
    seen = client.error(text)
    assert_refused(seen, 400, "invalid_value", "The value is not valid.")
    assert seen.get("request_id", "some"), "the client shows the id of the request"


def test_a_wrong_key_is_refused(target, client, text):
    seen = client.key(text)
    assert_refused(seen, 401, "invalid_api_key", "")
    assert target.is_bare or not target.calls_with(text)


def test_a_rate_limit_is_told(client, text):
    assert_refused(client.limit(text), 429, "rate_limit_exceeded", "Rate limit reached for requests.")


def test_a_call_over_the_limit_is_tried_again(target, client, text):
    assert text in client.retry(text)["text"]
    assert [call["status"] for call in target.calls_with(text)] == [429, 200]


def test_a_cancelled_stream_ends(target, client, text):
    assert client.cancel(text)["chunks"] >= adapters.CHUNKS_BEFORE_LEAVING
    target.assert_cancelled(text)
