"""What vLLM loads into each of its processes, through its entry-point group `vllm.general_plugins`."""


def register() -> None:
    """Add Outrider's way of receiving weights to vLLM's registry; importing this package has repaired torchvision."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # noqa: SLF001 - it has no public look-up
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER_BACKEND, "actor.vllm_worker", "StagedWeightTransfer"
        )


WEIGHT_TRANSFER_BACKEND = "outrider"
