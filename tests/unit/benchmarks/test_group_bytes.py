"""The image is of the size that is claimed, and the proxy counts each byte once."""

import asyncio
import io

from PIL import Image

from benchmarks.counting_proxy import Counts, counting_proxy
from benchmarks.group_bytes import noise_png


def test_the_image_has_one_mebibyte() -> None:
    first, second = noise_png(1), noise_png(2)
    assert 2**20 <= len(first) < 1.01 * 2**20
    assert first != second
    assert Image.open(io.BytesIO(first)).format == "PNG"


async def test_each_byte_is_counted_in_its_direction() -> None:
    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(2 * data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_twice, "127.0.0.1", 0)
    async with counting_proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as (address, counts):
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for size in (3, 100_000):
            writer.write(bytes(size))
            assert len(await reader.readexactly(2 * size)) == 2 * size
            assert counts.total == 3 * size
            assert counts.take() == Counts(size, 2 * size)
        writer.close()
    server.close()
    await server.wait_closed()
