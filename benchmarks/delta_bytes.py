"""Updates as deltas: what changed since the version before, against all bytes.

Case `bytes`: bytes of a full update / bytes of a delta, in bfloat16, between steps of AdamW at a learning rate of 3e-6
on random text. Each delta is applied to the version before and compared bit by bit. Case `link_1gbit`: updates/s of a
live actor over a link of 1 Gb/s, as a delta against in full, where the delta must have been chosen; left out where
network namespaces are not permitted. On the loopback itself none may be chosen.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness, link
from benchmarks.update_world import World, build_model

GOALS = {"bytes": 30.0, "link_1gbit": 1.0}
_LEARNING_RATE = 3e-6
_WARM_UP_STEPS = 6
_TOKENS = 128


def main() -> None:
    """Run the cases and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delta_bytes", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--live", action="store_true", help="only measure updates of a live actor")
    options = parser.parse_args()
    if options.live:
        print(json.dumps(_live(2)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        trained = _Trained(build_model(Path(temporary) / "model"))
        sizes = [trained.next_sizes() for _ in range(options.pairs)]
    fulls, deltas = ([1e9 / num_bytes for num_bytes in side] for side in zip(*sizes, strict=True))
    comparisons = {"bytes": harness.compare_measured("bytes", deltas, fulls, goal=GOALS["bytes"], unit="updates/GB")}
    if answer := link.run_behind("1gbit", "benchmarks.delta_bytes", ["--live"]):
        if not all(answer["chosen"]):
            raise harness.UnequalWorkError("a full update was chosen on a link of 1 Gb/s")
        deltas, fulls = ([1 / seconds for seconds in answer[name]] for name in ("delta_s", "full_s"))
        comparisons["link_1gbit"] = harness.compare_measured(
            "link_1gbit", deltas, fulls, goal=GOALS["link_1gbit"], unit="updates/s"
        )
    if any(_live(1)["chosen"]):
        raise harness.UnequalWorkError("a delta was chosen on the loopback, where a full update is faster")
    harness.report("delta_bytes", comparisons)


class _Trained:
    """A model in float32 under AdamW, and its versions in bfloat16."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from learner.weights.snapshot import Snapshotter

        self.model: Any = AutoModelForImageTextToText.from_pretrained(model_dir)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
        self._snapshotter = Snapshotter(
            self.model, ["model.visual"], is_sender=True, bucket_bytes=64 * 2**20, dtype=torch.bfloat16
        )
        self._version = 0
        for _ in range(_WARM_UP_STEPS):
            self.step()
        self.snapshot = self._take()

    def step(self) -> None:
        """One optimizer step."""
        import torch

        generator = torch.Generator().manual_seed(self._version)
        ids = torch.randint(0, 256, (2, _TOKENS), generator=generator)
        self._optimizer.zero_grad()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self._optimizer.step()
        self._version += 1

    def next_sizes(self) -> tuple[int, int]:
        """Train one step: bytes in full, and as a delta, which is checked."""
        from common import delta

        before = self.snapshot
        self.step()
        self.snapshot = self._take()
        total = 0
        for old, new in zip(before.trained.buffers, self.snapshot.trained.buffers, strict=True):
            encoded = delta.encode(old, new, 2)
            result = old.clone()
            delta.apply(encoded, result, 2)
            harness.require_equal("bytes", bool((result == new).all()), peer=True)
            total += encoded.numel()
        return self.snapshot.trained.num_bytes, total

    def _take(self) -> Any:
        taken = self._snapshotter.take(self._version)
        assert taken is not None
        return taken


def _live(pairs: int) -> dict[str, Any]:
    """Seconds of updates of a live actor in full and as a delta, and which of the latter were chosen."""
    import torch

    with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), 1, dtype=torch.bfloat16) as world:
        answer: dict[str, Any] = {"full_s": [], "delta_s": [], "chosen": []}
        for _ in range(pairs):
            answer["full_s"].append(world.run(world.next_kept_update())[0])
            _nudge(world.model)
            started_at = time.perf_counter()
            was_chosen = world.run(world.next_delta())
            answer["delta_s"].append(time.perf_counter() - started_at)
            answer["chosen"].append(was_chosen)
    return answer


def _nudge(model: Any) -> None:
    """As a step of such a size would, without its time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_LEARNING_RATE / 3)


if __name__ == "__main__":
    main()
