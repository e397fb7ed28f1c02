"""question.json: a request for `grpcurl` that asks the run's checkpoint about a held-out row."""

import base64
import json
from pathlib import Path
from typing import Any

from common.types import MediaPart, SamplingParams, TextPart
from learner.types import PixelBounds, PromptSample


def write_question(run_dir: Path, sample: PromptSample, sampling: SamplingParams) -> Path:
    """Write question.json, a `GenerateRequest` for grpcurl that asks `sample`, and its first image beside it."""
    if sample.images:
        suffix = (
            "png"
            if sample.images[0].startswith(b"\x89PNG")
            else "jpg"
            if sample.images[0][:2] == b"\xff\xd8"
            else "webp"
        )
        (run_dir / f"question.{suffix}").write_bytes(sample.images[0])
    messages = [
        {
            "role": message.role,
            "parts": [_part(part) for part in message.parts],
        }
        for message in sample.messages
    ]
    media = [_media(image, bounds) for image, bounds in sample.bounded_images]
    request = {
        "groupId": "question",
        "chat": {"messages": messages}
        | ({"templateArguments": json.dumps(sample.template_arguments)} if sample.template_arguments else {}),
        "media": media,
        "sampling": {"temperature": 0, "maxTokens": sampling.max_tokens, "stop": [*sampling.stop]},
        "returns": {"text": True},
    }
    path = run_dir / "question.json"
    path.write_text(json.dumps(request) + "\n", encoding="utf-8")
    return path


def _part(part: TextPart | MediaPart) -> dict[str, Any]:
    return {"text": part.text} if isinstance(part, TextPart) else {"mediaIndex": part.index}


def _media(image: bytes, bounds: PixelBounds) -> dict[str, Any]:
    options = {"minPixels": bounds.min_pixels, "maxPixels": bounds.max_pixels}
    given = {name: value for name, value in options.items() if value is not None}
    item = {"modality": "MODALITY_IMAGE", "encoded": base64.b64encode(image).decode()}
    return item | ({"processor": given} if given else {})
