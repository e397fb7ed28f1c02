"""What vLLM loads into each of its processes, through its entry-point group `vllm.general_plugins`."""

import os
import signal

from common.lifecycle import end_with_parent

WEIGHT_TRANSFER_BACKEND = "outrider"

# Set by the actor for the processes that vLLM starts below it.
ACTOR_VARIABLE = "OUTRIDER_ACTOR_PID"


def register() -> None:
    """Add Outrider's way of receiving weights to vLLM's registry; importing this package has repaired torchvision."""
    actor_pid = os.environ.get(ACTOR_VARIABLE)
    if actor_pid is not None and actor_pid != str(os.getpid()):
        # vLLM's own processes would outlive an actor that is killed, and compute for nobody.
        end_with_parent(signal.SIGKILL)

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # noqa: SLF001 - it has no public look-up
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER_BACKEND, "actor.vllm_worker", "StagedWeightTransfer"
        )
