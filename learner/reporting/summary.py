"""The result of a run: summary.json, and the same in words."""

import dataclasses
import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.reporting.held_out import ACCURACY, HeldOut
from learner.reporting.json_lines import plain
from learner.storage.run_folder import write_whole

SERVE_ADDRESS = "127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run. Accuracies are mean rewards of the held-out rows; None where there are none."""

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


def format_summary(summary: Summary, question: Path | None = None, held_out: HeldOut = ACCURACY) -> str:
    """The end of a run in words, with the commands that serve its checkpoint and ask it about an image."""
    before, after = (
        "not measured" if value is None else held_out.show(value)
        for value in (summary.accuracy_before, summary.accuracy_after)
    )
    lines = [
        "",
        f"{summary.name}: {summary.steps} steps in {format_duration(summary.wall_s)}, without the wait for actors",
        f"  {held_out.name:<17}  {before} before, {after} after",
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
        ]
        if (buf := _buf()) is not None:
            curl = f"{shlex.quote(buf)} curl --protocol grpc --http2-prior-knowledge"
            lines.append(f"  {curl} -d @{file} http://{SERVE_ADDRESS}/{method}")
    return "\n".join(lines)


def _buf() -> str | None:
    """How to call it: `make setup` puts it beside the interpreter, where there is npm. None: it is not installed."""
    if shutil.which("buf") is not None:
        return "buf"
    return shutil.which("buf", path=Path(sys.executable).parent)


def format_duration(seconds: float) -> str:
    """As `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"
