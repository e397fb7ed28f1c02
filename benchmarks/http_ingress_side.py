"""The peer of `image_ingress`: FastAPI on uvicorn, the stack of vLLM's and SGLang's servers, with base64 in JSON.

It does with the bytes what an actor does with an upload: hash, check of the header, bounded store; off the event loop.
"""

import asyncio
import base64
import socket

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from actor.config import LimitsConfig
from actor.media.store import MediaStore
from common.media import check_image, content_hash

LIMITS = LimitsConfig()
STORE = MediaStore(LIMITS.media_store_bytes)
app = FastAPI()


class ImageUrl(BaseModel):
    """As in OpenAI's API."""

    url: str


class ImagePart(BaseModel):
    """As a part of a message in OpenAI's API."""

    image_url: ImageUrl


@app.post("/v1/images")
async def put(part: ImagePart) -> dict[str, str]:
    """`{"image_url": {"url": "data:image/png;base64,..."}}` to the sha256 of what is stored."""
    data = base64.b64decode(part.image_url.url.partition(",")[2])
    digest = await asyncio.to_thread(_check, data)
    STORE.put(digest, data)
    return {"sha256": digest.hex()}


def _check(data: bytes) -> bytes:
    check_image(data, "image_url", LIMITS.max_media_pixels)
    return content_hash(data)


def main() -> None:
    """Serve until the process is ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"peer ready on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", timeout_keep_alive=600)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
