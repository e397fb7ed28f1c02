"""What a run leaves behind: lines of JSON as it goes, summary.json and a question to its checkpoint at the end."""

import base64
import dataclasses
import json
import math
import mmap
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from common.types import MediaPart, SamplingParams, TextPart
from learner.run_folder import write_whole
from learner.types import PixelBounds, PromptSample

SERVE_ADDRESS = "127.0.0.1:50051"


class JsonLines:
    """Appends one JSON object per line, each on disk when `write` returns. A resumed run appends to what is there.

    A last line that a kill has torn is taken away: every line can be read.
    """

    def __init__(self, path: Path) -> None:
        # A model can sample half of a pair of surrogates, which JSON writes as an escape.
        self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.truncate(_end_of_lines(path))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. Numbers that JSON does not know (NaN, infinity) become null, objects their text."""
        self._file.write(json.dumps(plain(values), allow_nan=False, ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run. Accuracies are shares (0 to 1) of the held-out rows; None where there are none."""

    name: str
    steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    completions_per_s: float
    """Of the whole training loop, evaluations and checkpoints included."""
    parity_max_abs_diff: float | None
    """Largest difference of an on-policy token's logprob between actor and learner, over all steps."""
    wall_s: float
    checkpoint: str
    """Directory of the final export in Hugging Face format."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of summary.json."""


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Write summary.json; there is never half of one."""
    values = dataclasses.asdict(summary)
    extra = values.pop("extra")
    if clash := values.keys() & extra.keys():
        raise ValueError(f"extra fields of the summary hide its own: {', '.join(sorted(clash))}")
    path = run_dir / "summary.json"
    write_whole(path, json.dumps(plain(values | extra), indent=2, allow_nan=False) + "\n")
    return path


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


def format_summary(summary: Summary, question: Path | None = None) -> str:
    """The end of a run in words, with the commands that serve its checkpoint and ask it about an image."""
    lines = [
        "",
        f"{summary.name}: {summary.steps} steps in {format_duration(summary.wall_s)}",
        f"  held-out accuracy  {_percent(summary.accuracy_before)} before, {_percent(summary.accuracy_after)} after",
        f"  throughput         {summary.completions_per_s:,.0f} completions/s",
        f"  logprob parity     {_number(summary.parity_max_abs_diff)} (largest difference between actor and learner)",
        f"  checkpoint         {summary.checkpoint}",
        "",
        "Serve it:",
        f"  python -m actor --model {shlex.quote(summary.checkpoint)} --listen {SERVE_ADDRESS} --standalone",
    ]
    if question is not None:
        file = shlex.quote(str(question))
        method = "rollout.v1.RolloutService/Generate"
        lines += [
            "and ask it about the image beside question.json:",
            f"  grpcurl -plaintext -d @ {SERVE_ADDRESS} {method} < {file}",
            f"  buf curl --protocol grpc --http2-prior-knowledge -d @{file} http://{SERVE_ADDRESS}/{method}",
        ]
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """As `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _end_of_lines(path: Path) -> int:
    """Size of the file up to its last whole line."""
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def _part(part: TextPart | MediaPart) -> dict[str, Any]:
    return {"text": part.text} if isinstance(part, TextPart) else {"mediaIndex": part.index}


def _media(image: bytes, bounds: PixelBounds) -> dict[str, Any]:
    options = {"minPixels": bounds.min_pixels, "maxPixels": bounds.max_pixels}
    given = {name: value for name, value in options.items() if value is not None}
    item = {"modality": "MODALITY_IMAGE", "encoded": base64.b64encode(image).decode()}
    return item | ({"processor": given} if given else {})


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"


def plain(value: Any) -> Any:
    """Plain JSON values: arrays of numpy and their scalars unwrapped, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
