"""What vLLM loads into each of its processes, through its entry-point group `vllm.general_plugins`."""

import os
import signal

from actor.config import parse_cores
from actor.engine_vllm.grammars import bound_matching
from actor.engine_vllm.held_outputs import hold_outputs
from common.process.lifecycle import end_with_parent
from common.process.memory import keep_freed

WEIGHT_TRANSFER_BACKEND = "outrider"

# Set by the actor for the processes that vLLM starts below it.
ACTOR_VARIABLE = "OUTRIDER_ACTOR_PID"
CORES_VARIABLE = "OUTRIDER_CPU_CORES"


def register() -> None:
    """Add Outrider's way of receiving weights to vLLM's registry; importing this package has repaired torchvision."""
    actor_pid = os.environ.get(ACTOR_VARIABLE)
    if actor_pid is not None:  # else it is somebody else's vLLM
        from actor.engine_vllm.cache_load import tell_cache_load
        from actor.engine_vllm.groups import take_groups

        _keep_media_of_cached_prompts()
        bound_matching()
        hold_outputs()
        take_groups()
        tell_cache_load()
    if actor_pid not in (None, str(os.getpid())):
        from vllm.platforms import current_platform

        from actor.engine_vllm.seeds import keep_seeds

        if current_platform.is_cpu():
            keep_seeds()
        # vLLM's own processes would outlive an actor that is killed, and compute for nobody.
        end_with_parent(signal.SIGKILL)
        keep_freed()
        if CORES_VARIABLE in os.environ:
            os.sched_setaffinity(0, parse_cores(os.environ[CORES_VARIABLE]))

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # noqa: SLF001 - it has no public look-up
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER_BACKEND, "actor.engine_vllm.worker", "StagedWeightTransfer"
        )


def _keep_media_of_cached_prompts() -> None:
    """Let the scheduler send every request's images to the workers, also of prompts that the prefix cache covers.

    vLLM leaves those out, for no encoder will run for them. After a weight update it must: the caches are void and the
    requests in flight, all but the first of a group, start over. Without the images the engine dies of it.
    That is so in the model runner of CPUs. The one that GPUs have by default gets resumed requests anew, with all that
    is then missing; which of the two it will be is not known here yet, and sending more does it no harm.
    """
    from vllm.v1.core.sched import output

    if not hasattr(output, "strip_covered_mm_data"):
        raise RuntimeError("this vLLM sends images to its workers in a way that Outrider does not know")
    output.strip_covered_mm_data = lambda mm_features, *_, **__: mm_features
