#!/usr/bin/env python3
"""A reverse proxy that gives each request to the next of several servers, as a load balancer in
front of replicas does.

    python3 tests/tools/round_robin.py        prints its port, then reads commands from its standard input

A line `{"backends": [8001, 8002]}` sets the ports on 127.0.0.1 that get the requests; the reply is
`ok`. The proxy ends with its standard input. It guarantees to the tests:

- Requests go to those backends whose /readyz says 200, in turn; to all of them where none does.
- A backend that refuses the connection is skipped. A request that was sent is never sent again.
- If a backend ends during a response, the client's connection ends too. The proxy's only own
  response is 502, when every backend refuses the connection.
- WebSockets are passed on as bytes. `X-Forwarded-For` is added; answers carry the backend's port as
  `X-Served-By`.

Standard library only.
"""

import asyncio
import contextlib
import json
import os
import re
import sys

HOST = "127.0.0.1"
# Seconds between two checks of a backend's /readyz, and the timeout of a check.
LOOK_EVERY, LOOK_DEADLINE = 0.1, 3
# Seconds that the rest of a request may take after its response.
PATIENCE = 1
CHUNK = 1 << 16
LONGEST_HEAD = 1 << 17


class Backends:
    """The servers behind the proxy, and whose turn it is."""

    def __init__(self):
        self.ports = []
        self.ready = {}
        self.turn = 0
        self.watching = {}

    def set(self, ports):
        self.ports = list(ports)
        for port in list(self.watching):
            if port not in ports:
                self.watching.pop(port).cancel()
                self.ready.pop(port, None)
        for port in ports:
            if port not in self.watching:
                self.watching[port] = asyncio.create_task(self.watch(port))

    async def watch(self, port):
        while True:
            try:
                self.ready[port] = await asyncio.wait_for(self.look(port), LOOK_DEADLINE)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                self.ready[port] = False
            await asyncio.sleep(LOOK_EVERY)

    async def look(self, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n")
            return (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        finally:
            writer.close()

    async def connect(self):
        """A connection to the next backend that accepts one, with its port; None if no backend
        does."""
        usable = [port for port in self.ports if self.ready.get(port)] or self.ports
        self.turn += 1
        # Other requests continue while this one waits.
        turn = self.turn
        for number in range(len(usable)):
            port = usable[(turn + number) % len(usable)]
            with contextlib.suppress(OSError):
                return port, *await asyncio.open_connection(HOST, port, limit=LONGEST_HEAD)
        return None


def header(head, name):
    found = re.search(rb"^" + name + rb":[ \t]*([^\r]*)", head, re.IGNORECASE | re.MULTILINE)
    return found[1].strip().lower() if found else None


def without(head, name):
    return re.sub(rb"(?im)^" + name + rb":[^\n]*\n", b"", head)


async def pass_on(reader, writer, count=None):
    """Copies bytes until the end, or `count` of them; returns how many it copied."""
    copied = 0
    while count is None or copied < count:
        data = await reader.read(CHUNK if count is None else min(CHUNK, count - copied))
        if not data:
            break
        copied += len(data)
        writer.write(data)
        await writer.drain()
    return copied


async def pass_on_chunks(reader, writer):
    """Copies a body in chunked coding up to and with its last chunk and trailers."""
    while True:
        line = await reader.readuntil(b"\r\n")
        writer.write(line)
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        writer.write(await reader.readexactly(size + 2))
        await writer.drain()
    while True:
        line = await reader.readuntil(b"\r\n")
        writer.write(line)
        if line == b"\r\n":
            await writer.drain()
            return


async def pass_on_body(head, reader, writer):
    """Copies a request's body, whichever way its end is marked."""
    if header(head, b"Transfer-Encoding") == b"chunked":
        await pass_on_chunks(reader, writer)
    else:
        length = int(header(head, b"Content-Length") or 0)
        if await pass_on(reader, writer, length) < length:
            raise ConnectionError("the client left amid its request")


async def both_ways(client, backend):
    """Passes bytes in both directions until both are at their end."""

    async def one_way(reader, writer):
        with contextlib.suppress(ConnectionError):
            await pass_on(reader, writer)
        with contextlib.suppress(OSError):
            writer.write_eof()

    await asyncio.gather(one_way(client[0], backend[1]), one_way(backend[0], client[1]))


async def pass_on_answer(method, port, reader, writer):
    """Passes the response on; true if the client's connection can carry another request."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status == 101 or status >= 200:
            break
        writer.write(head)
    first, rest = head.split(b"\r\n", 1)
    if status != 101:
        rest = without(rest, b"Connection")
    writer.write(b"%s\r\nX-Served-By: %d\r\n%s" % (first, port, rest))
    await writer.drain()
    if status == 101:
        return False
    if method == b"HEAD" or status in (204, 304):
        return True
    if header(head, b"Transfer-Encoding") == b"chunked":
        await pass_on_chunks(reader, writer)
        return True
    length = header(head, b"Content-Length")
    copied = await pass_on(reader, writer, None if length is None else int(length))
    if length is not None and copied < int(length):
        raise ConnectionError("the backend left amid its answer")
    return length is not None


async def exchange(backends, head, client):
    """Serves one request; true if the client's connection can carry another."""
    connected = await backends.connect()
    if connected is None:
        client[1].write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await client[1].drain()
        return False
    port, *backend = connected
    first, rest = head.split(b"\r\n", 1)
    method = first.split(b" ", 1)[0]
    hops = header(rest, b"X-Forwarded-For")
    here = client[1].get_extra_info("peername")[0].encode()
    rest = b"X-Forwarded-For: %s\r\n%s" % (here if hops is None else hops + b", " + here, without(rest, b"X-Forwarded-For"))
    upgrade = header(rest, b"Upgrade") is not None
    if not upgrade:
        # One connection for each request, because the next request goes to another backend.
        rest = b"Connection: close\r\n" + without(rest, b"Connection")
    try:
        backend[1].write(first + b"\r\n" + rest)
        sending = asyncio.create_task(pass_on_body(head, client[0], backend[1]))
        try:
            reusable = await pass_on_answer(method, port, backend[0], client[1])
            if upgrade and not reusable:
                await sending
                await both_ways(client, backend)
            # If a response comes before the whole request was read, the rest of the request is
            # still on the connection.
            await asyncio.wait([sending], timeout=PATIENCE)
            return reusable and sending.done() and sending.exception() is None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    finally:
        backend[1].close()


async def serve(backends, reader, writer):
    try:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            if not await exchange(backends, head, (reader, writer)):
                break
        writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        # The client must see a broken connection, not an end that looks like the end of the
        # response.
        writer.transport.abort()


async def main():
    backends = Backends()
    server = await asyncio.start_server(lambda *client: serve(backends, *client), HOST, 0, limit=LONGEST_HEAD, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        backends.set(json.loads(line)["backends"])
        print("ok", flush=True)
    # At once: nobody uses the open connections any more.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
