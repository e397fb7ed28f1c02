"""How long a context may be for the rotary embeddings of a model, where vLLM would take more."""

import sys
from typing import Any

from common.config import ConfigError


def context_within_rope(model_config: Any, asked: int | None, *, takes_updates: bool) -> int | None:
    """What to set as vLLM's `max_model_len`, in tokens: `asked`, or less where nothing is asked (None).

    Raises ConfigError if `asked` is too long:

    - The table of `dynamic` ones ends at `max_position_embeddings`, and vLLM's own default is `factor` times as long
      (InternVL 3). It would read past the end: NaN on CPUs, a dead engine on GPUs.
    - LongRoPE has frequencies for contexts within the original one, and others for longer ones. vLLM takes one of the
      two for all sequences, by `max_model_len`; transformers, and so the learner, by the longest one that is there.
    """
    from vllm.transformers_utils.config import iter_rope_parameters

    limit, reason = sys.maxsize, ""
    for rope in iter_rope_parameters(model_config.hf_text_config):  # of each type of layers, all alike in length
        if rope["rope_type"] == "dynamic" and "alpha" not in rope:
            limit = model_config.hf_text_config.max_position_embeddings
            reason = "vLLM has no dynamic rotary embeddings above"
        elif rope["rope_type"] == "longrope" and takes_updates:
            limit = rope["original_max_position_embeddings"]
            reason = "vLLM has other frequencies than the learner (longrope), for short sequences too, with more than"
    if model_config.max_model_len <= limit:
        return asked
    if asked is None:
        return limit
    raise ConfigError(f"vllm.max_model_len: is {asked}, and {reason} {limit} tokens; set it to at most {limit}")
