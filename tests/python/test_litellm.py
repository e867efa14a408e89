"""The release binary with LiteLLM's proxy as its upstream, whose responses come from
`mock_response`. The proxy has many packages, so it has a separate environment: `make test-litellm`.
LITELLM names the interpreter of that environment.
"""

import json
import os

import pytest
from conftest import PROMPTS, client, make_user, post_prompt
from litellm_proxy import MASTER_KEY, LiteLlm
from running_service import THROTTLES_OFF, Service

LITELLM = os.environ.get("LITELLM")
pytestmark = pytest.mark.skipif(not LITELLM, reason="make test-litellm runs these")

ANSWER = "Forty-two, said the proxy, and not a token less."
MODELS = [
    {"model_name": "mocked", "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "unused", "mock_response": ANSWER}},
    {"model_name": "failing", "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "unused", "mock_response": "litellm.InternalServerError"}},
    {"model_name": "limited", "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "unused", "mock_response": "litellm.RateLimitError"}},
]


@pytest.fixture(scope="module")
def proxy():
    """The base URL of a running proxy."""
    with LiteLlm(LITELLM, MODELS) as running:
        yield running.url


def service_before(proxy, model, key=MASTER_KEY):
    return Service(**THROTTLES_OFF, OPENAI_BASE_URL=proxy, OPENAI_API_KEY=key, OPENAI_MODEL=model, OPENAI_MAX_RETRIES="0")


def test_a_whole_answer(proxy):
    with service_before(proxy, "mocked") as service, client(service) as http:
        answer = post_prompt(http, make_user(http), "What is the answer?")
        assert answer.status_code == 201, service.output()
        assert answer.json()["response"] == ANSWER
        [line] = [line for line in service.log() if line.get("message") == "upstream answered"]
        assert (line["upstream"], line["attempt"], line["status"]) == ("primary", 1, 200)
        usage = [line for line in http.get("/metrics").text.splitlines() if line.startswith("gen_ai_client_token_usage_count{")]
        assert len(usage) == 2 and all(line.endswith(" 1") for line in usage), usage


def test_a_streamed_answer(proxy):
    with service_before(proxy, "mocked") as service, client(service) as http:
        user = make_user(http)
        headers = {**user.auth, "Accept": "text/event-stream"}
        events = []
        with http.stream("POST", PROMPTS, json={"prompt": "What is the answer?"}, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            name = None
            for line in answer.iter_lines():
                if line.startswith("event:"):
                    name = line.removeprefix("event:").strip()
                elif line.startswith("data:"):
                    events.append((name, json.loads(line.removeprefix("data:"))))
        assert events[0][0] == "started"
        deltas = [data["text"] for name, data in events if name == "delta"]
        assert len(deltas) > 1 and "".join(deltas) == ANSWER
        assert events[-1][0] == "completed" and events[-1][1]["response"] == ANSWER


@pytest.mark.parametrize(
    ("model", "key", "error_type", "status"),
    [("mocked", "sk-wrong", "400", 502), ("unknown", MASTER_KEY, "400", 502), ("limited", MASTER_KEY, "429", 503), ("failing", MASTER_KEY, "500", 502)],
)
def test_a_failure_is_reported_without_the_proxys_error_text(proxy, model, key, error_type, status):
    with service_before(proxy, model, key) as service, client(service) as http:
        answer = post_prompt(http, make_user(http), "What is the answer?")
        [line] = [line for line in service.log() if line.get("upstream") == "primary"]
        assert line["error_type"] == error_type
        assert "litellm" not in (answer.text + service.written("stdout")).lower()
        assert MASTER_KEY not in service.written("stdout")
        assert answer.status_code == status, (answer.text, service.output())
