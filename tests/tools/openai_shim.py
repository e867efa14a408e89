"""A proxy between the tests of OpenAI's Python library and a service: it swaps their fixed key and
their fixed names for those that the service knows. Standard library only."""

import asyncio
import json
import re
import threading
from urllib.parse import urlsplit

from openai_upstream import HOST, read_body
from started import Started

# What the tests send.
FIXED_KEY = "My API Key"
FIXED_COMPLETION = "completion_id"
FIXED_CURSOR = "after=after"
FIXED_EMBEDDING_MODEL = "text-embedding-3-small"
# OpenAI's library types each stored message as an assistant's, so this is the only one.
SEED = {"model": "gpt-6-astra", "store": True, "messages": [{"role": "assistant", "content": "A stored message."}]}


class Shim(Started):
    """Passes requests on to `base_url` with `key`.

        with Shim("http://127.0.0.1:8000/v1", key, "all-MiniLM-L6-v2") as shim:
            … TEST_API_BASE_URL=shim.url

    A request that names the tests' stored completion, or their cursor, gets the ids of a completion
    that is made for it. With `as_numbers`, embeddings are asked for as numbers even if the tests ask
    for base64. `passed` has the method and path of each request.
    """

    def __init__(self, base_url, key, embedding_model, as_numbers=False):
        self.target = urlsplit(base_url)
        self.key, self.embedding_model, self.as_numbers = key, embedding_model, as_numbers
        self.passed, self.port, self.tasks = [], 0, set()
        self.server = None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self):
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.listen(), self.loop).result(10)
        return self

    def close(self):
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result(10)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
        self.loop.close()

    @property
    def url(self):
        return f"http://{HOST}:{self.port}{self.target.path}"

    async def listen(self):
        self.server = await asyncio.start_server(self.serve, HOST, 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self):
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            await self.pass_on(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.tasks.discard(task)

    async def pass_on(self, reader, writer):
        """Passes on one request of a connection, which then closes."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await read_body(reader, headers)
        method, path, _ = first.split(" ", 2)
        self.passed.append((method, path))
        if FIXED_COMPLETION in path or FIXED_CURSOR in path:
            seeded = await self.seed()
            path = path.replace(FIXED_COMPLETION, seeded)
            if FIXED_CURSOR in path:
                cursor = await self.message_of(seeded) if "/messages" in path else seeded
                path = path.replace(FIXED_CURSOR, f"after={cursor}")
        body = body.replace(f'"{FIXED_EMBEDDING_MODEL}"'.encode(), f'"{self.embedding_model}"'.encode())
        if self.as_numbers:
            body = body.replace(b'"encoding_format":"base64"', b'"encoding_format":"float"')
        if headers.get("authorization") == f"Bearer {FIXED_KEY}":
            headers["authorization"] = f"Bearer {self.key}"
        service, answer = await self.ask(method, path, headers, body)
        try:
            while data := await service.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            answer.close()

    async def ask(self, method, path, headers, body):
        """Sends a request; the connection with the answer, whose end is the answer's."""
        dropped = ("host", "connection", "content-length", "transfer-encoding")
        lines = [f"{name}: {value}" for name, value in headers.items() if name not in dropped]
        lines += [f"host: {self.target.netloc}", "connection: close", f"content-length: {len(body)}"]
        reader, writer = await asyncio.open_connection(self.target.hostname, self.target.port)
        writer.write("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body)
        await writer.drain()
        return reader, writer

    async def seed(self):
        """Makes a stored completion and returns its id."""
        return await self.id_in("POST", "/chat/completions", json.dumps(SEED).encode())

    async def message_of(self, completion):
        """The id of a message of a stored completion."""
        return await self.id_in("GET", f"/chat/completions/{completion}/messages")

    async def id_in(self, method, path, body=b""):
        """The first id in the answer to a request."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        reader, writer = await self.ask(method, self.target.path + path, headers, body)
        answer = await reader.read()
        writer.close()
        found = re.search(rb'"id": ?"([^"]+)"', answer)
        if not found:
            raise ConnectionError(f"{method} {path}: no id in {answer[:500]}")
        return found[1].decode()
