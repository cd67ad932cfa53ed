"""Pass connections on from one address to another: forward_port.py LISTEN_HOST:PORT TARGET_HOST:PORT."""

import asyncio
import contextlib
import sys


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy until the source ends."""
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()


async def main() -> None:
    """Listen for ever."""
    (here, port), (there, target_port) = (address.rsplit(":", 1) for address in sys.argv[1:3])

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(there, int(target_port))
        await asyncio.gather(pump(reader, target_writer), pump(target_reader, writer))

    async with await asyncio.start_server(connect, here, int(port)) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
