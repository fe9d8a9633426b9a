"""A WebSocket echo server. Prints its port."""

import asyncio
import logging

from websockets.asyncio.server import serve


async def echo(connection):
    async for message in connection:
        await connection.send(message)


async def main():
    async with serve(echo, "127.0.0.1", 0, max_size=None, compression=None, ping_interval=None) as server:
        print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


# The fuzzer breaks every rule; a traceback for each would hide the test's own output.
logging.getLogger("websockets").setLevel(logging.CRITICAL)
asyncio.run(main())
