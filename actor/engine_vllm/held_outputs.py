"""vLLM's engine process tells of every token of every sample at once; here it waits until there are some to tell of.

A rollout wants whole samples. Telling of 512 tokens a step, each with three arrays, took the engine a tenth of its time
and its front end more: the messages are made by a thread that holds the interpreter from the one that computes.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

# Tokens of a sample.
HELD_TOKENS = 16
# A step's logprobs are kept until all of its tokens have been told of: rows that are wider are told of at once.
_MAX_ALTERNATIVES = 32


class HeldOutputs:
    """What one front end has not been told yet."""

    def __init__(self) -> None:
        self._held: dict[str, list[EngineCoreOutput]] = {}  # of every sample whose next token may wait
        self._width = 0

    def pass_on(self, outputs: "list[EngineCoreOutput]", requests: Mapping[str, "Request"]) -> "list[EngineCoreOutput]":
        """What is to be told after a step with these outputs, in order.

        The first token of a sample and its end are told at once, and everything before its end.
        """
        # All rows of a step have one width. A step without rows says nothing of it: what is held stays.
        rows = (output.new_logprobs for output in outputs if output.new_logprobs is not None)
        width = next((row.logprobs.shape[1] for row in rows), self._width)
        told: list[EngineCoreOutput] = []
        if width != self._width:
            told = self.release()
            self._width = width
        for output in outputs:
            name = output.request_id
            held = self._held.get(name)
            if held is not None and width <= _MAX_ALTERNATIVES and _is_a_token_only(output):
                held.append(output)
                if len(held) == HELD_TOKENS:
                    told.append(_joined(held))
                    self._held[name] = []
                continue
            if held:
                told.append(_joined(held))
            told.append(output)
            if output.finish_reason is None and _may_wait(requests.get(name)):
                self._held[name] = []
            else:
                self._held.pop(name, None)
        if len(self._held) > len(requests):  # some were aborted
            self._held = {name: held for name, held in self._held.items() if name in requests}
        return told

    def release(self) -> "list[EngineCoreOutput]":
        """Everything that is held."""
        told = [_joined(held) for held in self._held.values() if held]
        self._held = {name: [] for name in self._held}
        return told


@functools.cache  # a process may load its plug-ins more than once: two layers would hold each other's tokens
def hold_outputs() -> None:
    """Let the engine process hold tokens, but never past the version of the policy that they were sampled from."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, "_attach_weight_version"):
        raise RuntimeError("this vLLM tells of tokens in a way that Outrider does not know")
    attach_version, set_version = EngineCore._attach_weight_version, EngineCore.set_weight_version  # noqa: SLF001

    def attach_version_and_hold(self: Any, outputs: dict[int, EngineCoreOutputs]) -> None:
        attach_version(self, outputs)
        if not hasattr(self, "held_outputs"):
            self.held_outputs = defaultdict(HeldOutputs)
        for client, of_client in outputs.items():
            of_client.outputs = self.held_outputs[client].pass_on(of_client.outputs, self.scheduler.requests)

    def tell_and_set_version(self: Any, weight_version: str) -> None:
        for client, held in getattr(self, "held_outputs", {}).items():
            told = {client: EngineCoreOutputs(outputs=held.release())}
            attach_version(self, told)
            self.output_queue.put_nowait((client, told[client]))
        set_version(self, weight_version)

    EngineCore._attach_weight_version = attach_version_and_hold  # noqa: SLF001
    EngineCore.set_weight_version = tell_and_set_version


def _is_a_token_only(output: "EngineCoreOutput") -> bool:
    """Neither the first nor the last of a sample, and with nothing beside its logprob."""
    return (
        output.finish_reason is None
        and output.prefill_stats is None
        and output.new_prompt_logprobs_tensors is None
        and output.prompt_token_id_logprobs is None
        and output.new_sampling_mask is None
        and output.routed_experts is None
        and output.kv_transfer_params is None
        and output.ec_transfer_params is None
        and not output.events
        and not output.num_nans_in_logits
    )


def _may_wait(request: "Request | None") -> bool:
    """Not where the front end looks for a string that ends the sample: it should not look too late."""
    return request is not None and request.sampling_params is not None and not request.sampling_params.stop


def _joined(parts: "list[EngineCoreOutput]") -> "EngineCoreOutput":
    """Tokens of one sample, whose rows have one width, as one output: the last of them, changed."""
    last = parts[-1]
    last.new_token_ids = [token_id for part in parts for token_id in part.new_token_ids]
    if last.new_logprobs is not None:
        rows = [part.new_logprobs for part in parts if part.new_logprobs is not None]
        last.new_logprobs = last.new_logprobs._replace(
            logprob_token_ids=np.concatenate([row.logprob_token_ids for row in rows]),
            logprobs=np.concatenate([row.logprobs for row in rows]),
            sampled_token_ranks=np.concatenate([row.sampled_token_ranks for row in rows]),
        )
    return last
