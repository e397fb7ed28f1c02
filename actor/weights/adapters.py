"""Which LoRA adapters an engine has, and which model a request means. Shared by the engines."""

from dataclasses import dataclass

from common.errors import InvalidRequest
from common.types import Manifest


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter as one version of it. `number` is its own as long as it stays."""

    name: str
    number: int
    policy_version: int


class Adapters:
    """The adapters of one engine, by name. What was committed last is the policy: the model, or it with an adapter.

    Args:
        base_model: the name under which requests get the model without adapter.
        max_rank: of an adapter; 0: none is taken.
        max_adapters: how many may be here.
    """

    def __init__(self, base_model: str, max_rank: int, max_adapters: int) -> None:
        self._base_model = base_model
        self._max_rank = max_rank
        self._max_adapters = max_adapters
        self._loaded: dict[str, LoadedAdapter] = {}
        self._policy: str | None = None
        self._last_number = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may name."""
        return tuple(self._loaded)

    def check(self, manifest: Manifest) -> None:
        """Raises InvalidRequest for an update whose adapter cannot be taken."""
        name, field = manifest.adapter, "manifest.adapter"
        if not name:
            return
        if manifest.adapter_rank > self._max_rank:
            limit = f"up to rank {self._max_rank}" if self._max_rank else "no adapters (max_lora_rank is 0)"
            raise InvalidRequest(field, f"{name!r} has rank {manifest.adapter_rank}; this actor takes {limit}")
        if name == self._base_model:
            raise InvalidRequest(field, f"{name!r} is the name of the base model; give the adapter another one")
        others = self._loaded.keys() - {name} if not manifest.updates_base else set()
        if len(others) >= self._max_adapters:
            raise InvalidRequest(field, f"{len(others)} other adapters are here; max_loras is {self._max_adapters}")

    def commit(self, manifest: Manifest) -> None:
        """An update that `check` let through is live."""
        if manifest.updates_base:
            self._loaded.clear()
        if manifest.adapter:
            known = self._loaded.get(manifest.adapter)
            if known is None:
                self._last_number += 1
            number = known.number if known is not None else self._last_number
            self._loaded[manifest.adapter] = LoadedAdapter(manifest.adapter, number, manifest.policy_version)
        self._policy = manifest.adapter or None

    def find(self, model: str) -> LoadedAdapter | None:
        """The adapter that a request for `model` samples from, None for the base model. Raises InvalidRequest."""
        if not model:
            return self._loaded[self._policy] if self._policy is not None else None
        if model == self._base_model:
            return None
        if model not in self._loaded:
            here = ", ".join(map(repr, (self._base_model, *self._loaded)))
            raise InvalidRequest("model", f"{model!r} is not here; there is {here}")
        return self._loaded[model]
