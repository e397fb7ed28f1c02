"""Clients that share no code with this project: `@grpc/grpc-js` (examples/clients/node) and `buf curl`.

Both are given JSON and answer with JSON; messages of this project's classes go in and come out.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import status_pb2

from tests.helpers.launched import ROOT

MODULES = Path(sys.prefix) / "npm" / "node_modules"
NODE_CLIENT = ROOT / "examples" / "clients" / "node"
TIMEOUT_S = 40.0

M = TypeVar("M", bound=Message)


def require_node() -> None:
    """Skip the test where `make setup` has found no npm; in CI there is one."""
    if shutil.which("node") and (MODULES / "@grpc" / "grpc-js").is_dir():
        return
    reason = "Node.js, or what `make setup` installs with npm, is missing"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Refused(Exception):  # noqa: N818 - what happened to the call
    """The status of a call that failed: the name of its code, and its rich status."""

    def __init__(self, code: str, message: str, status: status_pb2.Status) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.status = status


class OtherClient(Protocol):
    """One of the two."""

    async def call(self, method: str, answer: type[M], *messages: Message, take: int = 0) -> list[M]:
        """Call "package.Service/Method"; `take` ends a stream after so many messages. Raises Refused."""
        ...

    async def close(self) -> None:
        """No process is left."""
        ...


def _json(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


class NodeClient:
    """One process of `call.js`, for all calls."""

    def __init__(self, address: str, tls: Path | None) -> None:
        self._arguments = ["--address", address, *(["--tls", str(tls)] if tls else [])]
        self._process: asyncio.subprocess.Process | None = None

    async def call(self, method: str, answer: type[M], *messages: Message, take: int = 0) -> list[M]:
        """See `OtherClient.call`."""
        if self._process is None:
            self._process = await node("call.js", *self._arguments)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = {"method": method, "messages": [_json(message) for message in messages]} | (
            {"take": take} if take else {}
        )
        self._process.stdin.write(json.dumps(call).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), TIMEOUT_S)
        answered = json.loads(line)
        if answered["code"] == "OK" or (take and answered["code"] == "CANCELLED"):
            return [json_format.ParseDict(message, answer()) for message in answered["messages"]]
        status = status_pb2.Status.FromString(base64.b64decode(answered.get("status") or ""))
        raise Refused(answered["code"], answered["details"], status)

    async def close(self) -> None:
        """See `OtherClient.close`."""
        if self._process is not None:
            await self._process.communicate(b"")  # the end of its input ends it


async def node(program: str, *arguments: str) -> asyncio.subprocess.Process:
    """A program of examples/clients/node."""
    return await asyncio.create_subprocess_exec(
        *("node", str(NODE_CLIENT / program), *arguments),
        env={**os.environ, "NODE_PATH": str(MODULES)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**24,
    )


class BufClient:
    """`buf curl`, one process for each call. What messages look like it asks the server's reflection."""

    def __init__(self, address: str, tls: Path | None) -> None:
        self.url = f"{'https' if tls else 'http'}://{address}"
        self._tls = tls

    async def call(self, method: str, answer: type[M], *messages: Message, take: int = 0) -> list[M]:
        """See `OtherClient.call`."""
        data = "\n".join(json.dumps(_json(message)) for message in messages) or "{}"
        process = await self.run("--data", "@-", f"{self.url}/{method}")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(data.encode())
        process.stdin.close()
        if take:
            found = await asyncio.wait_for(_read(process.stdout, take), TIMEOUT_S)
            os.killpg(process.pid, signal.SIGTERM)  # npm's `buf` is a script that starts the real one
            await process.communicate()
        else:
            found = await asyncio.wait_for(_read(process.stdout, 2**31), TIMEOUT_S)
            assert process.stderr is not None
            errors = (await process.stderr.read()).decode()
            if await process.wait():
                raise _refused(errors)
        return [json_format.ParseDict(message, answer()) for message in found]

    async def run(self, *arguments: str) -> asyncio.subprocess.Process:
        """Any command line of it."""
        options = ["--protocol", "grpc"]
        if self._tls is None:
            options += ["--http2-prior-knowledge"]
        else:
            names = {"--cacert": "ca.crt", "--cert": "tls.crt", "--key": "tls.key"}
            options += ["--servername", "actor.outrider"]
            options += [part for flag, name in names.items() for part in (flag, str(self._tls / name))]
        return await asyncio.create_subprocess_exec(
            *(str(MODULES / ".bin" / "buf"), "curl", *options, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**24,
            start_new_session=True,
        )

    async def close(self) -> None:
        """See `OtherClient.close`."""


async def _read(stream: asyncio.StreamReader, count: int) -> list[Any]:
    """JSON documents, one after the other, until there are so many or no more."""
    text, decoder = "", json.JSONDecoder()
    documents: list[Any] = []
    while len(documents) < count:
        data = await stream.read(2**16)
        text = (text + data.decode()).lstrip()
        with contextlib.suppress(ValueError):
            while text and len(documents) < count:
                document, end = decoder.raw_decode(text)
                documents.append(document)
                text = text[end:].lstrip()
        if not data:
            assert not text, text
            break
    return documents


def _refused(errors: str) -> Refused:
    """From what `buf curl` writes of a failed call."""
    error = json.loads(errors)
    status = status_pb2.Status(message=error.get("message", ""))
    for detail in error.get("details", ()):
        value = detail["value"] + "=" * (-len(detail["value"]) % 4)
        status.details.add(type_url=f"type.googleapis.com/{detail['type']}", value=base64.b64decode(value))
    return Refused(error["code"].upper(), error.get("message", ""), status)
