#!/usr/bin/env python3
"""A TCP proxy that causes faults on demand, between a service and its Postgres or Redis.

    python3 tests/tools/fault_proxy.py PORT       prints its port, then reads commands from its standard input

The commands, each confirmed by `ok`: `pass` (no fault), `delay SECONDS` (all data, in each
direction, arrive that much later, in order), `stall` (connections are accepted and nothing
arrives), `cut` (every connection is reset, also new ones). Data that `stall` held back arrive after
`pass`. The proxy ends with its standard input. Standard library only.
"""

import asyncio
import os
import sys

HOST = "127.0.0.1"
CHUNK = 1 << 16


class Fault:
    """How the proxy behaves now."""

    def __init__(self):
        self.delay = 0.0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.refusing = False
        self.transports = set()

    def become(self, kind, *arguments):
        self.delay = float(arguments[0]) if kind == "delay" else 0.0
        self.refusing = kind == "cut"
        if kind == "stall":
            self.flowing.clear()
        else:
            self.flowing.set()
        if self.refusing:
            for transport in list(self.transports):
                transport.abort()


async def one_way(fault, reader, writer):
    """Passes data on in order, each piece after its delay, and reads at the same time."""
    loop = asyncio.get_running_loop()
    pieces = asyncio.Queue(64)

    async def read():
        while data := await reader.read(CHUNK):
            await pieces.put((loop.time() + fault.delay, data))
        await pieces.put((loop.time() + fault.delay, b""))

    async def write():
        while True:
            due, data = await pieces.get()
            # Without a fault, neither of them waits.
            await asyncio.sleep(max(0.0, due - loop.time()))
            await fault.flowing.wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    await asyncio.gather(read(), write())


async def serve(fault, port, reader, writer):
    if fault.refusing:
        writer.transport.abort()
        return
    writers = [writer]
    fault.transports.add(writer.transport)
    try:
        await fault.flowing.wait()
        backend_reader, backend = await asyncio.open_connection(HOST, port)
        writers.append(backend)
        fault.transports.add(backend.transport)
        async with asyncio.TaskGroup() as directions:
            directions.create_task(one_way(fault, reader, backend))
            directions.create_task(one_way(fault, backend_reader, writer))
    except* OSError:
        for each in writers:
            each.transport.abort()
    finally:
        for each in writers:
            fault.transports.discard(each.transport)
            each.close()


async def main(port):
    fault = Fault()
    server = await asyncio.start_server(lambda *client: serve(fault, port, *client), HOST, 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        fault.become(*line.split())
        print("ok", flush=True)
    # At once: nobody uses the open connections any more.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
