"""The checkpoint that the demo starts from: the tiny model, warm-started.

`python -m examples.digits.prepare DIR` makes one by itself.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path


def prepare(out_dir: Path, seed: int, report: Callable[[str], object] = print) -> Path:
    """Build the tiny Qwen2.5-VL in `out_dir` and warm-start it; `seed` decides both. Returns `out_dir`."""
    started_at = time.monotonic()
    report("building a tiny Qwen2.5-VL and starting it off with a few supervised steps")
    import torch
    from transformers.utils import logging

    from examples.digits.model import build_model
    from examples.digits.warm_start import warm_start
    from learner.model.saved import share_weights

    logging.disable_progress_bar()  # one for each file that is read or written
    build_model(out_dir, seed)
    num_threads = torch.get_num_threads()
    # Operations this small gain nothing from a second thread, and on a busy machine they wait for it.
    torch.set_num_threads(1)
    try:
        accuracy = warm_start(out_dir, seed, report=report)
    finally:
        torch.set_num_threads(num_threads)
    share_weights(out_dir)
    report(f"{out_dir}: reads {accuracy:.0%} of its training scans, made in {time.monotonic() - started_at:.0f} s")
    return out_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.digits.prepare", description=prepare.__doc__)
    parser.add_argument("out_dir", type=Path, metavar="DIR", help="where the checkpoint is written")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the warm start (default 0)")
    options = parser.parse_args()
    prepare(options.out_dir, options.seed)
