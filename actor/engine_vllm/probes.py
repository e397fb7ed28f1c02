"""Whose fault it is that no token had a probability: that of a request's constraints, or of a model that has diverged.

Both end as logprobs that are no number. Under a grammar the token drawn then is often one that the grammar rejects. So
the model is asked for the same place once more, without constraints.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from actor.engine_vllm.beams import Generate
from actor.engine_vllm.outputs import diverged
from actor.engine_vllm.sampling import probing_params


async def probe_model(engine_input: Any, token_ids: Sequence[int], generate: Generate) -> None:
    """Raises EngineDead unless the model gives what may follow these tokens of a completion a probability.

    `generate` streams what vLLM reports of one request.
    """
    longer: Any = {**engine_input, "prompt_token_ids": [*engine_input["prompt_token_ids"], *token_ids]}
    logprobs: list[float] = []
    async with contextlib.aclosing(generate(longer, probing_params())) as outputs:
        async for output in outputs:
            for part in output.outputs:
                logprobs += part.logprobs.logprobs if part.logprobs is not None else []
    if not logprobs or not all(map(math.isfinite, logprobs)):
        raise diverged()
