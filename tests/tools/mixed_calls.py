"""Many calls of /v1 of all kinds, made at once, and what must be true of them afterwards: each is
kept as one row, found by search if it was answered, and has the usage that its upstream gave.
"""

import asyncio
import json
import uuid
from collections import Counter
from dataclasses import dataclass, field

import httpx

CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}]
# The model that is asked, whether the answer is streamed, and further members.
KINDS = {
    "whole": ("scripted", False, {}),
    "streamed": ("scripted", True, {}),
    "several": ("scripted", False, {"n": 2}),
    "tool": ("scripted", False, {"tools": TOOLS}),
    "streamed tool": ("scripted", True, {"tools": TOOLS}),
    "reasoning": ("gpt-6-luna", True, {"stream_options": {"include_usage": True}}),
    "refused": ("error-400", False, {}),
    "failed": ("error-500", True, {}),
    "broken": ("error-in-stream", True, {}),
    "cut": ("cut-in-stream", True, {}),
    "left": ("paced-2x30", True, {}),
}
ANSWERED = {"whole", "streamed", "several", "tool", "streamed tool", "reasoning", "left"}
# Statuses other than 200 alone. The breaker of an upstream that fails so often opens at times.
STATUSES = {"refused": {400}, "failed": {502, 503}, "broken": {200, 503}, "cut": {200, 503}}
# Seconds for one call on a busy machine.
DEADLINE = 120


@dataclass
class Call:
    """One call: its kind, its text, which no other call has, and what its client got."""

    kind: str
    text: str = field(default_factory=lambda: f"mixed call {uuid.uuid4().hex}")
    id: str = None
    status: int = None


async def make(http, headers, call):
    model, streams, members = KINDS[call.kind]
    body = {"model": model, "messages": [{"role": "user", "content": call.text}], "stream": streams, **members}
    async with http.stream("POST", CHAT, json=body, headers=headers) as answer:
        call.status = answer.status_code
        if not streams or call.status != 200:
            await answer.aread()
            call.id = answer.json().get("id")
            return
        chunks = 0
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                call.id = json.loads(line.removeprefix("data: ")).get("id", call.id)
                chunks += 1
            if call.kind == "left" and chunks == 3:
                return


async def make_all(urls, headers, calls, at_once):
    """Makes the calls at the given addresses in turn, so many at a time."""
    waiting = iter(list(enumerate(calls)))
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)

    async def worker():
        async with httpx.AsyncClient(timeout=DEADLINE, limits=limits) as http:
            for number, call in waiting:
                http.base_url = urls[number % len(urls)]
                await make(http, headers, call)

    await asyncio.gather(*(worker() for _ in range(at_once)))


def upstreams(url):
    """The setting UPSTREAMS for the scripted upstream at that address: once for the calls that it
    answers, and once, with a breaker of its own, for those that fail."""
    failing = {"name": "failing", "base_url": url, "models": ["error-500", "error-in-stream", "cut-in-stream"]}
    return json.dumps([failing, {"name": "answering", "base_url": url, "models": ["*"]}])


def mixed(count):
    """That many calls, of all kinds in turn."""
    kinds = list(KINDS)
    return [Call(kinds[number % len(kinds)]) for number in range(count)]


def check_answers(calls):
    """What each client got."""
    for call in calls:
        assert call.status in STATUSES.get(call.kind, {200}), call
        assert (call.id is not None) == (call.status == 200), call


def check_rows(calls, rows):
    """Each call is one row, with the outcome of its kind. `rows`: the items of GET /api/prompts."""
    by_text = {row["prompt"]: row for row in rows}
    assert len(by_text) == len(rows) == len(calls), (len(by_text), len(rows), len(calls))
    for call in calls:
        row = by_text[call.text]
        assert row["source"] == "v1", row
        assert row["status"] == ("completed" if call.kind in ANSWERED else "failed"), (call, row)
        if call.id is not None:
            assert call.id == f"chatcmpl-{row['id']}", (call, row)
    return by_text


def check_usage(calls, by_text, upstream_calls):
    """The tokens of each answered call are those that the upstream gave, whoever left meanwhile.
    `upstream_calls`: the upstream's records of its calls."""
    given = {call["body"]["messages"][-1]["content"]: call for call in upstream_calls if call.get("usage") and call["outcome"] == "answered"}
    for call in calls:
        if call.kind not in ANSWERED:
            continue
        usage, row = given[call.text]["usage"], by_text[call.text]
        kept = row["usage"]
        assert (kept["prompt_tokens"], kept["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"]), (call, row)


def counts(calls):
    return dict(Counter(call.kind for call in calls))
