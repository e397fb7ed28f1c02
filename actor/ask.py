"""`python -m actor ask`: one question to a running actor, about images if there are any, and its answers.

python -m actor ask --image digit.png "Which digit?"
python -m actor ask --address 10.0.0.7:50051 --n 4 --temperature 1 "Name a colour."
"""

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

_TIMEOUT_S = 300.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m actor ask", description="Ask a running actor a question.")
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="image file; may be given several times"
    )
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the actor (%(default)s)")
    parser.add_argument("--tls", type=Path, metavar="DIR", help="directory with tls.crt, tls.key and ca.crt")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (%(default)s)")
    parser.add_argument("--n", type=int, default=1, help="number of answers (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Print the answers, one below the other; the exit code is 1 if there are none."""
    options = parse(arguments)

    from common.config import ConfigError
    from common.errors import OutriderError

    try:
        images = [path.read_bytes() for path in options.image]
    except OSError as error:
        print(f"ask: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        for answer in asyncio.run(_ask(options, images)):
            print(answer)
    except ConfigError as error:
        print(f"ask: {error}", file=sys.stderr)
        return 2
    except OutriderError as error:
        print(f"ask: {options.address}: {error.message}", file=sys.stderr)
        return 1
    return 0


async def _ask(options: argparse.Namespace, images: list[bytes]) -> list[str]:
    from common.client import GrpcClient
    from common.media import content_hash
    from common.types import ChatMessage, ChatPrompt, MediaItem, MediaPart, RolloutRequest, SamplingParams, TextPart

    parts: tuple[TextPart | MediaPart, ...] = (
        *(MediaPart(index) for index in range(len(images))),
        TextPart(options.question),
    )
    request = RolloutRequest(
        group_id=f"ask-{secrets.token_hex(4)}",
        prompt=ChatPrompt((ChatMessage("user", parts),)),
        media=tuple(MediaItem(content_hash(image), image) for image in images),
        sampling=SamplingParams(n=options.n, temperature=options.temperature, max_tokens=options.max_tokens),
        return_text=True,
    )
    client = GrpcClient(options.address, tls=options.tls)
    try:
        group = await client.generate(request, timeout_s=_TIMEOUT_S)
    finally:
        await client.close()
    return [completion.text for completion in group.completions]
