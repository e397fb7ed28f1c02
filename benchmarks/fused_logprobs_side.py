"""One side of `fused_logprobs`: `python -m benchmarks.fused_logprobs_side HIDDEN_SIZE TOKENS fused|full`.

For each line it runs the policy forward and backward over one pack and answers `{"seconds": s, "peak_bytes": b,
"loss": l, "logprobs": sum, "entropy": sum, "gradients": {name: norm}}`. `peak_bytes` is the process's largest resident
memory in that turn less what it had when the model was loaded and nothing had run. Reads /proc, so it needs Linux.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

VOCAB_SIZE = 150_000
SEQUENCE_LENGTH = 256
HEAD_DIM = 32
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print must not mix with the answers


def main() -> None:
    """Build the model, say that it is ready, then obey."""
    hidden_size, num_tokens, fused = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fused"

    import torch

    from benchmarks.packed_step import advantages, make_groups
    from learner.batch.packing import pack_batch
    from learner.model.logprobs import completion_logprobs

    model = _build_model(hidden_size)
    groups = make_groups([SEQUENCE_LENGTH] * (num_tokens // SEQUENCE_LENGTH))
    [[pack]] = pack_batch(groups, advantages(groups))
    weights = pack.advantages[pack.sequence_ids] / len(pack.targets)
    loaded_bytes = _memory("VmRSS")
    print(json.dumps({"ready": {}}), file=ANSWERS)
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started_at = time.perf_counter()
        logprobs, entropy = completion_logprobs(model, pack, fused=fused)
        loss = -(weights * logprobs).sum() - 0.01 * entropy.mean()
        loss.backward()
        answer = {
            "seconds": time.perf_counter() - started_at,
            "peak_bytes": _memory("VmHWM") - loaded_bytes,
            "loss": loss.item(),
            "logprobs": logprobs.sum().item(),
            "entropy": entropy.sum().item(),
            "gradients": {
                name: float(torch.linalg.vector_norm(parameter.grad))
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            },
        }
        model.zero_grad(set_to_none=True)
        del logprobs, entropy, loss
        print(json.dumps(answer), file=ANSWERS)


def _build_model(hidden_size: int) -> Any:
    """The tiny model with another width and vocabulary, ready to train."""
    from common import torchvision_ops

    torchvision_ops.install()
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from examples.digits.model import model_config
    from learner.model.load import prepare_policy

    config = model_config()
    text = config.text_config
    text.vocab_size, text.hidden_size, text.intermediate_size = VOCAB_SIZE, hidden_size, 2 * hidden_size
    text.num_attention_heads, text.num_key_value_heads = hidden_size // HEAD_DIM, hidden_size // HEAD_DIM // 2
    config.vision_config.out_hidden_size = hidden_size
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    prepare_policy(model)
    return model


def _memory(name: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is what is resident now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
