"""The result of a run: summary.json, and the same in words."""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.reporting.json_lines import plain
from learner.run_folder import write_whole

SERVE_ADDRESS = "127.0.0.1:50051"


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


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"
