"""Members of an epoch whose clients answer without a wire."""

import asyncio
from typing import cast

from common.client import ActorClient
from common.types import ActorState, ActorStatus, EpochSpec
from learner.rollouts.members import Member


class Client:
    """Joins when it `answers`, or fails with `error`; is `actor_id` by now."""

    def __init__(self, actor_id: str, error: Exception | None = None) -> None:
        self.actor_id = actor_id
        self.error = error
        self.aborted = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def open_epoch(self, spec: EpochSpec) -> None:
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.error is not None:
            raise self.error

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        return ActorStatus(self.actor_id, ActorState.SERVING, 0, "run", 1, -1, 0, 0, 1)

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        self.aborted += 1


def member(client: Client) -> Member:
    return Member("one:1", cast("ActorClient", client), 1, "one#1", ActorState.SERVING)
