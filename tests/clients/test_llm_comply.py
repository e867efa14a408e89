"""PyPI's `llm-comply`: its tests of OpenAI's chat completions, and every chunk of streams by the
schema that it brings."""

import json
import subprocess
import sys
import urllib.request
from importlib.resources import files

import pytest
from llm_comply.schema import SpecLoader

# A model that thinks; with others the tests of reasoning are skipped.
MODEL = "gpt-5-mini"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}}


def test_every_test_of_chat_completions_passes_without_a_warning(target):
    command = [sys.executable, "-m", "llm_comply.cli", "--format", "openai-chat", "--json", "-u", target.base_url, "-k", target.key, "-m", MODEL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    problems = [result for result in report["results"] if result["status"] != "passed" or result.get("warnings")]
    assert not problems, json.dumps(problems, indent=1, ensure_ascii=False)
    assert run.returncode == 0 and report["summary"]["passed"] == 9


def chunk_schema():
    """The schemas, of which that of a chunk says what OpenAI sends: a reason may be null, which
    the loader does not add to the enumeration, and so is the usage before the last chunk."""
    spec = SpecLoader(str(files("llm_comply") / "specs" / "openai_chat.json"))
    members = spec.get_schema("CreateChatCompletionStreamResponse")["properties"]
    members["choices"]["items"]["properties"]["finish_reason"]["enum"].append(None)
    members["usage"] = {"anyOf": [members["usage"], {"type": "null"}]}
    return spec


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver")
@pytest.mark.parametrize(
    "members",
    [
        {}, {"stream_options": {"include_usage": True}}, {"n": 2, "logprobs": True, "top_logprobs": 2}, {"tools": [TOOL]},
        {"model": "deepseek-r1"}, {"response_format": {"type": "json_object"}}, {"max_tokens": 2},
    ],
    ids=lambda members: ",".join(members) or "plain",
)
def test_every_chunk_of_a_stream_is_valid(target, members):
    spec = chunk_schema()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Weather in 'Oslo'?"}], "stream": True, **members}
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{target.base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        *events, done, end = answer.read().decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    problems = [(chunk, found) for chunk in chunks if (found := spec.validate(chunk, "CreateChatCompletionStreamResponse"))]
    assert not problems, problems
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert len(reasons) == members.get("n", 1)
    # Only a client that asks for usage gets a chunk without choices.
    assert sum(not chunk["choices"] for chunk in chunks) == ("stream_options" in members)
