"""Whether actors get a LoRA adapter as it is, or merged into the model.

Everybody in an epoch receives the same. Going over from one form to the other takes a full update: the model below an
adapter is not the one with it.
"""

from collections.abc import Callable, Sequence

from common.errors import InvalidRequest, OutriderError
from common.log import get_logger
from learner.rollouts.members import Member
from learner.weights.snapshot import AdapterFacts, Snapshot

log = get_logger(__name__)

_FIELD = "manifest.adapter"


class AdapterForms:
    """What was sent, and what to send.

    `always_merged`: by a setting. `notify`: called with one line where an actor is why it is merged.
    """

    def __init__(self, *, always_merged: bool, notify: Callable[[str], None] = lambda _line: None) -> None:
        self._always_merged = always_merged
        self._notify = notify
        self._refusal = ""
        self._merged: dict[str, bool] = {}  # actor id -> what it has; not in it: may have either, or nothing
        self._said = ""

    def choose(self, snapshot: Snapshot, members: Sequence[Member]) -> bool:
        """Whether to merge the adapter for these members; False without adapter."""
        if snapshot.adapter is None:
            return False
        reason = self._reason(snapshot.adapter, members)
        what = f"merged: {reason}" if reason else f"as an adapter of rank {snapshot.adapter.rank}"
        if what != self._said:
            log.info("LoRA", sent=what)
            self._said = what
            if reason and not self._always_merged and not snapshot.adapter.merged_because:
                self._notify(f"each update sends all weights, with the LoRA adapter merged into them: {reason}")
        return bool(reason)

    def changes(self, snapshot: Snapshot, members: Sequence[Member], *, merged: bool) -> bool:
        """Whether a member may have the other form. Who is current commits nothing, and so keeps what it has."""
        return snapshot.adapter is not None and any(self._merged.get(m.actor_id) is not merged for m in members)

    def committed(self, member: Member, *, merged: bool) -> None:
        """It has this form."""
        self._merged[member.actor_id] = merged

    def unknown(self, member: Member) -> None:
        """Nobody knows what it has: a commit whose answer was lost may be through."""
        self._merged.pop(member.actor_id, None)

    def is_refusal(self, error: OutriderError) -> bool:
        """Whether a member cannot take the adapter, and is well otherwise. It is merged from then on."""
        if not (isinstance(error, InvalidRequest) and error.field == _FIELD):
            return False
        self._refusal = error.message
        return True

    def _reason(self, adapter: AdapterFacts, members: Sequence[Member]) -> str:
        if self._always_merged:
            return "weights.merge_adapter is set"
        if self._refusal or adapter.merged_because:
            return self._refusal or adapter.merged_because
        for member in members:
            limit = member.status.max_lora_rank if member.status is not None else 0
            if limit < adapter.rank:
                return (
                    f"actor {member.address} takes adapters up to rank {limit} (vllm.max_lora_rank), not {adapter.rank}"
                )
        return ""
