"""`vllm.LLM.generate` as a peer of the actor, with the actor's engine settings: a process, and its caller's end.

`python -m benchmarks.llm_side MODEL SETTINGS_JSON`. For each line `{"images": [base64 PNG, ...], "messages": [...],
"sampling": {...}}` it generates once and answers `{"seconds": s, "token_ids": [[...], ...]}`: completions in the order
of the images.
"""

import base64
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.side import Process


class LlmSide(Process):
    """The caller's end."""

    def __init__(
        self, model: Path, settings: Mapping[str, object], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.llm_side", model, json.dumps(settings)]
        super().__init__(command, log, environment)

    def generate(self, _name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """See `benchmarks.generation.Generate`."""
        from examples.digits import data

        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.QUESTION}]}]
        encoded = [base64.b64encode(image).decode() for image in images]
        answer = self.ask({"images": encoded, "messages": messages, "sampling": sampling})
        return answer["seconds"], answer["token_ids"]


def main() -> None:
    """Start the engine, say that it is ready, then obey until the standard input ends."""
    model, settings = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.pop("kv_cache_gib"))
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(model)
    llm = LLM(
        model=model,
        limit_mm_per_prompt={"image": settings.pop("max_images"), "video": 0},
        skip_mm_profiling=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        # The same distribution as the actor's, so that the tokens can be compared.
        logits_processors=["actor.engine_vllm.suppression:SuppressPlaceholders"],
        **settings,
    )
    print(json.dumps({"ready": {}}), file=answers)
    for line in sys.stdin:
        turn: dict[str, Any] = json.loads(line)
        images = [base64.b64decode(image) for image in turn["images"]]
        parameters = SamplingParams(**turn["sampling"], logprobs=0, flat_logprobs=True, detokenize=False)
        started_at = time.perf_counter()
        prompts = [
            {
                "prompt": processor.apply_chat_template(turn["messages"], tokenize=False, add_generation_prompt=True),
                "multi_modal_data": {"image": Image.open(io.BytesIO(image)).convert("RGB")},
            }
            for image in images
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        token_ids = [list(sample.token_ids) for output in outputs for sample in output.outputs]
        seconds = time.perf_counter() - started_at
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=answers)


if __name__ == "__main__":
    main()
