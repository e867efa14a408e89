"""An upstream with the chat-completions protocol. It counts its requests, and can be held, stopped
and started. Standard library only."""

import asyncio
import json
import threading
from collections import Counter

HOST = "127.0.0.1"
# Pieces of each streamed response.
PIECES = 8


def answer_to(prompt):
    """The response to a prompt, always the same."""
    return " ".join(f"{number}:{prompt}" for number in range(PIECES))


class Upstream:
    """Responds in a separate thread; each response takes `seconds`, and streamed ones come in
    pieces.

        with Upstream(seconds=0.2) as upstream:
            Service(OPENAI_BASE_URL=upstream.url)

    `asked` and `answered` count calls by prompt: those that came, and those whose response was
    written to its end. After `hold`, responses stop before their last piece until `release`. `stop`
    breaks every connection; `start` listens again at the same address.
    """

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.asked, self.answered = Counter(), Counter()
        self.port = 0
        self.flowing = threading.Event()
        self.flowing.set()
        self.server, self.tasks = None, set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @property
    def url(self):
        return f"http://{HOST}:{self.port}/v1"

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def start(self):
        self.run(self.listen())

    def stop(self):
        self.run(self.close())

    def hold(self):
        self.flowing.clear()

    def release(self):
        self.flowing.set()

    async def listen(self):
        self.server = await asyncio.start_server(self.serve, HOST, self.port, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]

    async def close(self):
        if self.server:
            self.server.close()
            self.server = None
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            while True:
                await self.answer_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # Each side may close the connection at any time; the tests are about that.
            writer.transport.abort()
        finally:
            self.tasks.discard(task)

    async def answer_one(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("get "):
            # It has no list of models.
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        prompt = body["messages"][-1]["content"]
        self.asked[prompt] += 1
        text = answer_to(prompt)
        if body.get("stream"):
            await self.stream(writer, text)
        else:
            await asyncio.sleep(self.seconds)
            await self.until_released()
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            answer = json.dumps({"model": "scripted", "choices": [choice]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            await writer.drain()
        self.answered[prompt] += 1

    async def stream(self, writer, text):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        size = -(-len(text) // PIECES)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        for number, piece in enumerate(pieces):
            if number == len(pieces) - 1:
                await self.until_released()
            self.event(writer, {"model": "scripted", "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            await writer.drain()
            await asyncio.sleep(self.seconds / len(pieces))
        self.event(writer, {"model": "scripted", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def event(self, writer, value):
        self.chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")

    @staticmethod
    def chunk(writer, data):
        writer.write(b"%x\r\n" % len(data) + data + b"\r\n")

    async def until_released(self):
        while not self.flowing.is_set():
            await asyncio.sleep(0.01)
