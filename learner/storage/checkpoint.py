"""Checkpoints: one directory per version that is either whole or not there.

    checkpoints/step-000040/  what trains and its optimizer, sharded (torch.distributed.checkpoint)  +  state.json

Everything is written into a temporary directory, which is renamed last: a kill or a full disk at any moment leaves the
previous checkpoint valid. Training goes on meanwhile:

    save: copy to CPU memory, the only part that training waits for -> threads: write the shards
          -> rank 0, when all have: state.json, everything to the disk, rename, drop old ones

`export_model` writes the same policy for everybody else, in Hugging Face format.
"""

import concurrent.futures
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from common.config import ConfigError
from common.log import get_logger
from learner.model.lora import merged_state, save_adapter
from learner.model.saved import share_weights
from learner.training.distributed import TIMEOUT

log = get_logger(__name__)

_STATE = "state.json"
_PARTIAL = ".partial"
_PREFIX = "step-"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is frozen is in `model.path`, as it was.
_WHAT_TRAINS = StateDictOptions(ignore_frozen_params=True, strict=False)
_AS_BEFORE = "train the same parts of the same model as before, or start a new run"
# The folder of an exported adapter.
_ADAPTER = "adapter"
# Of a checkpoint directory of transformers: what an export writes anew, the same weights in other formats, what other
# trainers have left of optimizers and of themselves, and what is nobody's.
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", _ADAPTER, ".*"),
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx"),
)


class CheckpointWriter:
    """Writes the checkpoints of one model; every rank has one and calls it together with the others.

    One checkpoint is written at a time: `save` first waits for the one before.

    Args:
        model: sharded over all ranks.
        optimizer: over its parameters.
        keep: checkpoints that stay.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> None:
        self._model = model
        self._optimizer = optimizer
        self._keep = keep
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # its collectives run beside those of training
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, run_dir: Path, version: int, state: dict[str, Any]) -> Path:
        """Begin to write the checkpoint of `version`; a collective. `state` (plain JSON values) is rank 0's.

        Returns the directory, which is there once `wait` returns.

        Raises:
            OSError: see `wait`.
        """
        self.wait()
        target = _directory(run_dir, version)
        partial = target.with_name(f".{target.name}{_PARTIAL}")
        if _is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        model_state, optimizer_state = _states(self._model, self._optimizer)
        shards: Any = dcp.async_save(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial, process_group=self._group
        )
        text = json.dumps({"version": version, **state})
        self._writing = self._thread.submit(self._finish, shards, partial, target, text)
        return target

    def check(self) -> None:
        """Raise what `wait` would raise, if that is known already."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            OSError: disk full and the like; older checkpoints are as they were.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointException as error:
            # Not always an OSError inside: torch's zip writer makes a RuntimeError of a full disk.
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank} could not write its part of the checkpoint: {cause}") from error

    def _finish(self, shards: "concurrent.futures.Future[Any]", partial: Path, target: Path, state: str) -> None:
        shards.result()  # on rank 0: all ranks have written theirs
        if not _is_main():
            return
        (partial / _STATE).write_text(state)
        _sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        _sync(target.parent)
        log.info("checkpoint", path=str(target))
        for old in _all(target.parent.parent)[: -self._keep]:
            try:
                shutil.rmtree(old)
            except OSError as error:  # the new one is whole; on NFS a file that somebody has open keeps its directory
                log.warning("an old checkpoint stays", path=str(old), error=str(error))


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trains, and what the optimizer has of it: nothing before its first step.

    torch has such a one take a step without gradients, to have something to save. Adam would count that step.
    """
    is_fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_WHAT_TRAINS)
    if is_fresh:
        optimizer.state.clear()
        optimizer_state["state"] = {}
    return model_state, optimizer_state


def drop_partial(run_dir: Path) -> None:
    """Remove what a kill has left of checkpoints that it cut off. Nobody else may be at work in the folder."""
    for partial in run_dir.glob(f"checkpoints/.*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next(reversed(_all(run_dir)), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was saved, and `version`. Raises ConfigError if the file is damaged."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError):
        raise ConfigError(
            f"{checkpoint}: {_STATE} cannot be read; remove this checkpoint to resume from the one before"
        ) from None
    return state


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore parameters and the optimizer's moments in place; a collective, on any number of ranks.

    The optimizer's settings stay those that it was made with. Raises as `_saved` and `_load`.
    """
    settings = [{key: group[key] for key in group.keys() - {"params"}} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_WHAT_TRAINS)
    reader = dcp.FileSystemReader(checkpoint)
    saved = _saved(reader, checkpoint, model_state)
    # To load into, a fresh optimizer has been given moments of all parameters; what no forward uses never had any.
    moments: Any = optimizer_state["state"]
    own = {name: moment for name, moment in moments.items() if f"optimizer.state.{name}.step" in saved}
    optimizer_state["state"] = own
    _load(reader, checkpoint, {"model": model_state, "optimizer": optimizer_state})
    set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=_WHAT_TRAINS
    )
    if not own:
        optimizer.state.clear()
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """As `load_checkpoint`, but only what trains, into a whole model of this process; it needs no process group."""
    state = get_model_state_dict(model, options=_WHAT_TRAINS)
    reader = dcp.FileSystemReader(checkpoint)
    _saved(reader, checkpoint, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant
        _load(reader, checkpoint, {"model": state}, no_dist=True)
    set_model_state_dict(model, state, options=_WHAT_TRAINS)


def _saved(reader: dcp.FileSystemReader, checkpoint: Path, model_state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint holds, by name. Raises ConfigError if its parameters are not those that train in this model."""
    saved = reader.read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix("model."): part.size
        for name, part in saved.items()
        if name.startswith("model.") and isinstance(part, TensorStorageMetadata)
    }
    if gone := shapes.keys() - model_state.keys():
        raise ConfigError(f"{checkpoint}: {min(gone)} was trained there and does not train in this run; {_AS_BEFORE}")
    if new := model_state.keys() - shapes.keys():
        raise ConfigError(f"{checkpoint}: {min(new)} was not trained there and trains in this run; {_AS_BEFORE}")
    for name, size in shapes.items():
        if size != (now := model_state[name].shape):
            raise ConfigError(
                f"{checkpoint}: {name} has shape {tuple(size)} there and {tuple(now)} in this run; {_AS_BEFORE}"
            )
    return saved


def _load(
    reader: dcp.FileSystemReader, checkpoint: Path, state: dict[str, dict[str, Any]], *, no_dist: bool = False
) -> None:
    """Read what has these names into these tensors. Raises OSError if that cannot be read."""
    try:
        dcp.load(state, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # it is no Exception, and says tracebacks
        cause, _ = next(iter(error.failures.values()))
        reason = " ".join(f"{type(cause).__name__} {cause}".split())
        raise OSError(
            f"{checkpoint} cannot be read: {reason}; without it the run resumes from the one before"
        ) from error


def export_model(model: Any, source: Path, target: Path) -> Path:
    """Write the policy as `write_export` does; a collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if _is_main():
        write_export(model, state, source, target)
    dist.barrier()
    return target


def write_export(
    model: Any, state: dict[str, Tensor], source: Path, target: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a policy as a checkpoint directory that `transformers` and vLLM load.

    A LoRA adapter is merged into it, and lies in its folder `adapter` too, as PEFT writes it.

    Args:
        model: what trains.
        state: its whole parameters and buffers; it is empty afterwards.
        source: the directory that training started from: tokenizer, processor and templates are copied from it.
        target: written anew.
        dtype: of the weights; None: the one that the configuration of `source` says, or else that of training.
    """
    from transformers import GenerationConfig

    dtype = dtype or _dtype_of(source) or model.dtype
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig()  # many that can be read are refused when they are to be written
    if hasattr(model, "peft_config"):
        save_adapter(model, state, source, partial / _ADAPTER)
    merged = merged_state(model, state)
    state.clear()
    _convert(merged, dtype)
    model.save_pretrained(partial, state_dict=merged)
    config = json.loads((partial / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(_with_dtype(config, dtype), indent=2) + "\n")
    (partial / "generation_config.json").unlink(missing_ok=True)  # that of the source is copied, if there is one
    share_weights(partial)
    _copy(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _dtype_of(source: Path) -> torch.dtype | None:
    """Of the weights of a checkpoint directory; None if its configuration does not say a floating one."""
    config = json.loads((source / "config.json").read_text())
    parts = (config, config.get("text_config") or {})
    names = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    return _DTYPES.get(str(names[0])) if names else None


def _convert(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give floating tensors this dtype, one after the other: there is no second whole model. What is tied stays so."""
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    for tied in names.values():
        state.update(dict.fromkeys(tied, state[tied[0]].to(dtype)))


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A model's configuration, and those of its parts, that say this dtype wherever they say one."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict)
        else str(dtype).removeprefix("torch.")
        if key == "dtype"
        else value
        for key, value in config.items()
    }


def _copy(source: Path, target: Path) -> None:
    """All files but `_NOT_COPIED`, without their modes: a source is often read-only, and its copy must not be."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
            continue
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _directory(run_dir: Path, version: int) -> Path:
    return run_dir / "checkpoints" / f"{_PREFIX}{version:06}"


def _all(run_dir: Path) -> list[Path]:
    """The whole ones, by version. What somebody has copied to a name of their own is not ours to load or to drop."""
    found = {
        path.parent.name.removeprefix(_PREFIX): path.parent for path in run_dir.glob(f"checkpoints/{_PREFIX}*/{_STATE}")
    }
    return [found[version] for version in sorted(filter(str.isdecimal, found), key=int)]


def _sync(directory: Path) -> None:
    """Have files and names on disk before they count."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_main() -> bool:
    return dist.get_rank() == 0
