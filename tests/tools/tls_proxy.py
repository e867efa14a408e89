#!/usr/bin/env python3
"""Ends TLS before a server without TLS, because the servers of the tests are built without it.

    python3 tests/tools/tls_proxy.py PORT CERTIFICATE KEY [postgres]

Prints its port on 127.0.0.1, and ends with its standard input. With `postgres` a client first asks
for TLS with PostgreSQL's message, and is refused without it; otherwise a client starts TLS at once.
Standard library only.
"""

import asyncio
import os
import ssl
import sys

HOST = "127.0.0.1"
CHUNK = 1 << 16
# A message of eight bytes; four of them are the number that requests TLS.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")


async def one_way(reader, writer):
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.close()


async def serve(port, context, is_postgres, reader, writer):
    try:
        if is_postgres:
            if await reader.readexactly(len(SSL_REQUEST)) != SSL_REQUEST:
                return
            writer.write(b"S")
            await writer.drain()
            await writer.start_tls(context)
        far_reader, far_writer = await asyncio.open_connection(HOST, port)
        await asyncio.gather(one_way(reader, far_writer), one_way(far_reader, writer))
    except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
        # A client that refuses the certificate disconnects.
        pass
    finally:
        writer.close()


async def main(port, certificate, key, kind=None):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    is_postgres = kind == "postgres"

    async def accept(reader, writer):
        await serve(int(port), context, is_postgres, reader, writer)

    server = await asyncio.start_server(accept, HOST, 0, ssl=None if is_postgres else context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    # Open connections end with the process.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
