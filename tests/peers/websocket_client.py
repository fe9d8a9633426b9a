"""A WebSocket client: sends texts and bytes of many sizes and checks the echoes. Prints the result.

usage: websocket_client.py URL
"""

import asyncio
import sys

from websockets.asyncio.client import connect


async def main():
    async with connect(sys.argv[1], max_size=None, compression=None, proxy=None) as connection:
        for size in (0, 1, 125, 126, 65535, 65536, 1 << 20):
            for message in ("é" * (size // 2), bytes(range(256)) * (size // 256)):
                await connection.send(message)
                assert await connection.recv() == message, size
        await asyncio.wait_for(await connection.ping(), 20)
        # Many at once, in order.
        for number in range(200):
            await connection.send(str(number))
        assert [await connection.recv() for _ in range(200)] == [str(number) for number in range(200)]
    print(f"closed with {connection.close_code}")


asyncio.run(main())
