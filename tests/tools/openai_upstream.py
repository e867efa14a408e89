#!/usr/bin/env python3
"""An upstream that speaks OpenAI's protocol as its schema says it, for clients that check it: chat
completions whole and streamed, stored ones, embeddings, models. Standard library only.

    python3 tests/tools/openai_upstream.py [PORT]     serves until a signal, and prints its base URL

The name of the model selects what happens:

    error-STATUS          that status with OpenAI's error body; error-429-quota: insufficient_quota
    once-STATUS           the same for the first request with these messages, then an answer
    error-in-stream       three chunks, then an error in the stream
    cut-in-stream         three chunks, then the connection breaks
    paced-MS, paced-MSxN  MS milliseconds before each chunk; N pieces of text
    slow-MS               MS milliseconds before the answer begins
    unknown-…             404 model_not_found
    dated-…               the answer names another model than the request
    o1, o3, o4, gpt-5, gpt-6, deepseek-r, thinking in it: tokens of reasoning; with the last two also
                          their text, as `reasoning_content` and `reasoning`
    cache-write in it     tokens written to a cache

Every call is recorded. GET /control/calls has the records, POST /control/reset forgets them.
"""

import asyncio
import hashlib
import json
import re
import sys
import threading
import time
import uuid
from urllib.parse import parse_qsl, unquote, urlsplit

import openai_answers
from openai_answers import Answer
from started import Started

HOST = "127.0.0.1"
MODELS = ("scripted", "gpt-6-astra", "gpt-6-luna", "gpt-5-mini", "o3", "deepseek-r1", "thinking-1", "dated-1", "paced-20", "text-embedding-3-small", "all-MiniLM-L6-v2")
# After this many chunks a stream ends that is to end badly.
CHUNKS_BEFORE_FAILURE = 3
# What a refused client waits.
RETRY_AFTER_MS = 30
CALL_FAILED = {
    400: ("invalid_request_error", "invalid_value", "The value is not valid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Not from there."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    500: ("server_error", None, "The server had an error while processing your request."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}


class Failure(Exception):
    """A request that gets an error."""

    def __init__(self, status, message=None, param=None, code=None, kind=None, headers=None):
        super().__init__(message)
        default_kind, default_code, default_message = CALL_FAILED.get(status, CALL_FAILED[500])
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message or default_message, "type": kind or default_kind, "param": param, "code": code or default_code}}


class Upstream(Started):
    """Serves in a separate thread.

        with Upstream() as upstream:
            Service(OPENAI_BASE_URL=upstream.url)

    `calls` has a record of each call: its path, headers and body, the status, and for answered chat
    completions `id`, `usage` and `outcome`: "answered", "hung up" (the client left before the end),
    "failed". With `key`, another key is refused.
    """

    def __init__(self, key=None, port=0):
        self.key, self.port = key, port
        self.calls, self.seen, self.stored = [], set(), {}
        self.server, self.tasks = None, set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self):
        self.thread.start()
        self.run(self.listen())
        return self

    def close(self):
        if self.loop.is_closed():
            return
        if self.thread.is_alive():
            self.run(self.stop_serving())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
        self.loop.close()

    @property
    def url(self):
        return f"http://{HOST}:{self.port}/v1"

    def chats(self):
        """The records of the calls of chat completions."""
        return [call for call in self.calls if call["path"] == "/v1/chat/completions" and call["method"] == "POST"]

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    async def listen(self):
        self.server = await asyncio.start_server(self.serve, HOST, self.port, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop_serving(self):
        if self.server:
            self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            while await self.answer_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # Each side may close the connection at any time.
            pass
        finally:
            writer.transport.abort()
            self.tasks.discard(task)

    async def answer_one(self, reader, writer):
        """Reads and answers one request. Whether the connection can have another one."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await read_body(reader, headers)
        url = urlsplit(target)
        call = {"method": method, "path": unquote(url.path), "query": parse_qsl(url.query), "headers": headers, "status": None}
        exchange = Exchange(reader, writer, headers)
        if call["path"].startswith("/control/"):
            return await self.control(exchange, call)
        self.calls.append(call)
        try:
            if self.key and headers.get("authorization") != f"Bearer {self.key}":
                raise Failure(401)
            call["body"] = read_json(body) if body else None
            await self.route(exchange, call)
        except Failure as failure:
            call["status"] = failure.status
            call["outcome"] = "failed"
            await exchange.send(failure.status, failure.body, failure.headers)
        return exchange.is_kept

    async def control(self, exchange, call):
        if call["path"] == "/control/reset":
            self.calls.clear()
            self.seen.clear()
        await exchange.send(200, {"calls": self.calls})
        return exchange.is_kept

    async def route(self, exchange, call):
        method, path, body = call["method"], call["path"].removeprefix("/v1"), call.get("body")
        call["status"] = 200
        if (method, path) == ("POST", "/chat/completions"):
            await self.complete(exchange, call, body)
        elif (method, path) == ("POST", "/embeddings"):
            check_embedding(body)
            await exchange.send(200, openai_answers.embeddings(body))
        elif (method, path) == ("GET", "/models"):
            await exchange.send(200, {"object": "list", "data": [model(name) for name in MODELS]})
        elif method == "GET" and path.startswith("/models/"):
            name = path.removeprefix("/models/")
            if name not in MODELS:
                raise Failure(404, f"The model '{name}' does not exist", param="model")
            await exchange.send(200, model(name))
        elif path.startswith("/chat/completions"):
            await self.history(exchange, call, path.removeprefix("/chat/completions").strip("/"))
        else:
            raise Failure(404, f"Invalid URL ({method} {call['path']})", code="unknown_url")

    async def complete(self, exchange, call, body):
        check_chat(body)
        name = body["model"]
        self.fail_if_asked(name, body)
        answer = Answer(body, f"chatcmpl-{uuid.uuid4().hex[:29]}", int(time.time()))
        paced = re.fullmatch(r"paced-(\d+)(?:x(\d+))?", name)
        if paced and paced[2]:
            stretch(answer, int(paced[2]))
        pause = int(paced[1]) / 1000 if paced else 0
        slow = re.fullmatch(r"slow-(\d+)", name)
        call |= {"id": answer.head["id"], "usage": answer.usage, "outcome": "asked", "answer": answer.whole()}
        if body.get("store"):
            self.stored[answer.head["id"]] = (answer.whole() | {"metadata": body.get("metadata") or {}}, body["messages"])
        try:
            await asyncio.sleep(int(slow[1]) / 1000 if slow else 0)
            if body.get("stream"):
                await self.stream(exchange, name, answer, pause)
            else:
                await asyncio.sleep(pause * sum(len(choice.pieces) for choice in answer.choices))
                await exchange.send(200, answer.whole())
            call["outcome"] = "answered"
        except BaseException:
            call["outcome"] = "hung up"
            raise

    def fail_if_asked(self, name, body):
        if name.startswith("unknown-"):
            raise Failure(404, f"The model `{name}` does not exist or you do not have access to it.")
        refused = re.fullmatch(r"(error|once)-(\d{3})(-quota)?", name)
        if not refused:
            return
        if refused[1] == "once":
            digest = hashlib.sha256(json.dumps([name, body["messages"]]).encode()).digest()
            if digest in self.seen:
                return
            self.seen.add(digest)
        status = int(refused[2])
        if refused[3]:
            raise Failure(status, "You exceeded your current quota.", code="insufficient_quota", kind="insufficient_quota", headers={"x-should-retry": "false"})
        limits = {"retry-after": "1", "retry-after-ms": str(RETRY_AFTER_MS), "x-ratelimit-remaining-requests": "0"} if status == 429 else {}
        raise Failure(status, headers=limits)

    async def stream(self, exchange, name, answer, pause):
        fails = name in ("error-in-stream", "cut-in-stream")
        # A client that is not told would send its next request to a connection that closes.
        await exchange.begin_stream(closes=fails)
        for number, chunk in enumerate(answer.chunks()):
            if fails and number == CHUNKS_BEFORE_FAILURE:
                if name == "error-in-stream":
                    await exchange.event(json.dumps(Failure(500).body))
                    await exchange.end_stream()
                exchange.is_kept = False
                return
            if pause:
                await asyncio.sleep(pause)
            await exchange.event(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))
        await exchange.event("[DONE]")
        await exchange.end_stream()

    async def history(self, exchange, call, path):
        """OpenAI's routes of stored completions."""
        query = dict(call["query"])
        if not path:
            wanted = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[")}
            found = [one for one, _ in self.stored.values() if wanted.items() <= one["metadata"].items()]
            await exchange.send(200, page(found))
            return
        identifier, _, rest = path.partition("/")
        if identifier not in self.stored:
            raise Failure(404, f"Chat completion {identifier} not found", code="not_found")
        completion, messages = self.stored[identifier]
        if rest == "messages":
            kept = [{"id": f"{identifier}-{number}", "content_parts": None, **message} for number, message in enumerate(messages)]
            kept = [{**message, "content": openai_answers.text_of(message.get("content"))} for message in kept]
            await exchange.send(200, page(kept))
        elif call["method"] == "DELETE":
            del self.stored[identifier]
            await exchange.send(200, {"object": "chat.completion.deleted", "id": identifier, "deleted": True})
        else:
            if call["method"] == "POST":
                completion["metadata"] = call["body"]["metadata"]
            await exchange.send(200, completion)


class Exchange:
    """One request and its response on a connection."""

    def __init__(self, reader, writer, headers):
        self.reader, self.writer = reader, writer
        self.is_kept = headers.get("connection", "").lower() != "close"
        self.began = time.monotonic()

    def head(self, status, headers):
        common = {
            "x-request-id": f"req_{uuid.uuid4().hex}", "openai-processing-ms": str(round((time.monotonic() - self.began) * 1000)),
            "openai-version": "2020-10-01", "x-ratelimit-limit-requests": "10000", "x-ratelimit-remaining-requests": "9999",
            "x-ratelimit-reset-requests": "6ms",
        }
        lines = [f"{name}: {value}" for name, value in (common | headers).items()]
        return "\r\n".join([f"HTTP/1.1 {status} Status", *lines, "", ""]).encode()

    async def send(self, status, value, headers=None):
        self.fail_if_left()
        data = json.dumps(value, ensure_ascii=False).encode()
        head = self.head(status, {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})})
        self.writer.write(head + data)
        await self.writer.drain()

    async def begin_stream(self, closes=False):
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "transfer-encoding": "chunked"}
        self.writer.write(self.head(200, headers | ({"connection": "close"} if closes else {})))
        await self.writer.drain()

    def fail_if_left(self):
        if self.reader.at_eof():
            raise ConnectionResetError("the client has left")

    async def event(self, data):
        self.fail_if_left()
        event = f"data: {data}\n\n".encode()
        self.writer.write(b"%x\r\n" % len(event) + event + b"\r\n")
        await self.writer.drain()

    async def end_stream(self):
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()


async def read_body(reader, headers):
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return body
    return await reader.readexactly(int(headers.get("content-length", 0)))


def read_json(body):
    try:
        value = json.loads(body)
    except ValueError:
        raise Failure(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(value, dict):
        raise Failure(400, "The body is not an object.")
    return value


def check_chat(body):
    if not isinstance((body or {}).get("model"), str):
        raise Failure(400, "you must provide a model parameter", param="model", code="missing_required_parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) and message.get("role") for message in messages):
        raise Failure(400, "Missing required parameter: 'messages'.", param="messages", code="missing_required_parameter")


def check_embedding(body):
    texts = (body or {}).get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(body.get("model"), str):
        raise Failure(400, "you must provide a model parameter", param="model", code="missing_required_parameter")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Failure(400, "The input is neither a text nor a list of texts.", param="input")
    if not 1 <= (body.get("dimensions") or 1) <= openai_answers.DIMENSIONS:
        raise Failure(400, f"This model has at most {openai_answers.DIMENSIONS} dimensions.", param="dimensions")


def model(name):
    return {"id": name, "object": "model", "created": 1767225600, "owned_by": "scripted", "shutdown_date": None}


def page(data):
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False}


def stretch(answer, pieces):
    """Gives each text this many pieces."""
    for choice in answer.choices:
        answer.usage["completion_tokens"] += pieces - len(choice.pieces)
        answer.usage["total_tokens"] += pieces - len(choice.pieces)
        choice.pieces = [f"{number} " for number in range(pieces)]


if __name__ == "__main__":
    with Upstream(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as running:
        print(running.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
