"""completions.jsonl of a run folder: what the policy writes, to be read by people.

A line is one completion, of the first groups of a step or of the first rows of an evaluation. Texts have their special
tokens, as they were sampled; an image is its placeholder in the prompt, and the sha256 of its file.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learner.evaluate import Evaluation
from learner.reporting.json_lines import JsonLines, plain
from learner.types import Group

# What is longer keeps its beginning and its end.
_MAX_CHARS = 20_000


class CompletionsLog:
    """Appends to the file, in the thread that calls.

    Args:
        path: of the file; a resumed run appends to what is there.
        num_groups: of each step. 0: nothing is written, of evaluations neither.
        decode: token ids to text, special tokens kept.
    """

    def __init__(self, path: Path, num_groups: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._num_groups = num_groups
        self._decode = decode
        self._lines = JsonLines(path) if num_groups else None

    def step(self, step: int, groups: Sequence[Group]) -> None:
        """The groups that gave the policy of `step`."""
        self._write(step, "train", groups[: self._num_groups])

    def evaluation(self, step: int, result: Evaluation) -> None:
        """The greedy answers of the policy of `step`."""
        self._write(step, "held_out", result.groups)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _write(self, step: int, rows: str, groups: Sequence[Group]) -> None:
        if self._lines is None:
            return
        for group in groups:
            prompt = shorten(self._decode(group.prompt.unexpanded_ids.tolist()))
            for i, completion in enumerate(group.completions):
                line = {
                    "step": step,
                    "rows": rows,
                    "row": group.sample.row,
                    "images": [digest.hex() for digest in group.processed.media_sha256],
                    "prompt": prompt,
                    "completion": shorten(self._decode(completion.token_ids.tolist())),
                    "ground_truth": _bounded(group.sample.ground_truth),
                    "reward": group.rewards[i],
                    "reward_parts": {name: values[i] for name, values in group.reward_parts.items()},
                    "finish_reason": completion.finish_reason.value,
                    "num_tokens": len(completion.token_ids),
                    "policy_versions": sorted({span.policy_version for span in completion.version_spans}),
                }
                self._lines.write(line)


def shorten(text: str) -> str:
    """A long text without its middle, which is said."""
    gone = len(text) - _MAX_CHARS
    half = _MAX_CHARS // 2
    return text if gone <= 0 else f"{text[:half]} [... {gone} characters ...] {text[-half:]}"


def _bounded(value: Any) -> Any:
    """The value if its JSON is short, else that, shortened."""
    text = json.dumps(plain(value), default=str, ensure_ascii=False)
    return value if len(text) <= _MAX_CHARS else shorten(text)
