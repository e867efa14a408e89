"""An upstream that answers each chat completion at once with the same words: what a post costs the
service, without what the model costs. One process, to be ended by a signal.

    python3 benches/instant_upstream.py       prints its port
"""

import asyncio
import json

BODY = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "model": "instant",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "At once."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }
).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Upstream(asyncio.Protocol):
    """Waits for whole requests of known length, the only kind that the service sends."""

    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            self.transport.write(RESPONSE)


async def main():
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
