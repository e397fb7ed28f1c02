"""Seeds on CPUs, where vLLM's engine dies of a request with a seed whose prompt takes more than one step.

In the steps before the last one it samples for such a request as for all others, throws the token away, and sets the
request's random generator back by as much as a sample takes. A generator on a CPU cannot be set back. Here it does not
take part in those steps.
"""

import functools
from typing import Any

import numpy as np


@functools.cache
def keep_seeds() -> None:
    """Let a request's generator make nothing but tokens of its completion."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens = CPUModelRunner.sample_tokens

    @functools.wraps(sample_tokens)
    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        in_prompt = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        kept = {row: generators.pop(row) for row in in_prompt if row in generators}
        try:
            return sample_tokens(self, *arguments, **named)
        finally:
            generators.update(kept)

    CPUModelRunner.sample_tokens = sample
