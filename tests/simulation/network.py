"""The network between one learner and one actor: latency, cuts, and calls that behave as gRPC's do.

A call is bound to the process that was there when it was made. It ends with an answer, at its deadline, when that
process dies, or when keepalive finds the way blocked for too long; whatever the server still does then is its own.
"""

import asyncio
import inspect
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.errors import DeadlineExceeded, Internal, OutriderError, Unreachable

if TYPE_CHECKING:
    from tests.simulation.actors import SimActor

KEEPALIVE_S = 3.0


class Link:
    """The way to one actor. It is blocked while it is cut, or while the actor's process is stopped."""

    def __init__(self, rng: random.Random, actor: "SimActor") -> None:
        self.actor = actor
        self.calls: dict[Call, None] = {}
        self.blocked = False
        self._rng = rng
        self._held: list[Callable[[], None]] = []
        self._num_blocks = 0

    def latency_s(self) -> float:
        return self._rng.random() * 0.02

    def carry(self, message: Callable[[], None]) -> None:
        """Deliver `message` at the other end: after the latency, and not before the way is free."""
        asyncio.get_running_loop().call_later(self.latency_s(), self._arrive, message)

    def _arrive(self, message: Callable[[], None]) -> None:
        if self.blocked:
            self._held.append(message)
        else:
            message()

    def block(self) -> None:
        if not self.blocked:
            self.blocked = True
            self._num_blocks += 1
            asyncio.get_running_loop().call_later(KEEPALIVE_S, self._give_up, self._num_blocks)

    def free(self) -> None:
        self.blocked = False
        held, self._held = self._held, []
        for message in held:
            self.carry(message)

    def _give_up(self, block: int) -> None:
        if self.blocked and block == self._num_blocks:
            for call in [*self.calls]:
                call.fail(Unreachable("keepalive: no answer"))

    def connect(self, call: "Call") -> None:
        """A call begins: on a blocked way it can only wait for keepalive."""
        self.calls[call] = None
        if self.blocked:
            wait_s = KEEPALIVE_S * self._rng.random()
            asyncio.get_running_loop().call_later(wait_s, self._refuse, call, self._num_blocks)

    def _refuse(self, call: "Call", block: int) -> None:
        if self.blocked and block == self._num_blocks:
            call.fail(Unreachable("keepalive: cannot connect"))


class Call:
    """One call from its beginning to its end, seen from both sides."""

    def __init__(self, link: Link, serve: Callable[["SimActor"], Any], timeout_s: float) -> None:
        self._link = link
        self._serve = serve
        self._incarnation = link.actor.incarnation
        self._answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._timeout_s = timeout_s
        self._abandoned = False
        self._task: asyncio.Task[Any] | None = None

    async def result(self) -> Any:
        """Make the call."""
        link, loop = self._link, asyncio.get_running_loop()
        if not link.actor.up and not link.blocked:
            await asyncio.sleep(link.latency_s())
            raise Unreachable("connection refused")
        link.connect(self)
        deadline = loop.call_later(self._timeout_s, self.fail, DeadlineExceeded("deadline exceeded"))
        link.carry(self._begin)
        try:
            return await self._answer
        finally:
            deadline.cancel()
            link.calls.pop(self, None)
            if not self._abandoned:
                self._abandoned = True
                link.carry(self._cancel)

    # ------------------------------------------------------------------------------------------ the learner's side

    def fail(self, error: OutriderError) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)

    def reset(self) -> None:
        """The actor's process died: the kernel says so, if it can be heard."""
        self._link.carry(lambda: self.fail(Unreachable("connection reset")))

    def _succeed(self, result: Any) -> None:
        if not self._answer.done():
            self._answer.set_result(result)

    # ------------------------------------------------------------------------------------------ the actor's side

    def _begin(self) -> None:
        actor = self._link.actor
        if not actor.up or actor.incarnation != self._incarnation:
            self.reset()
        elif not self._abandoned:
            try:
                result = self._serve(actor)
            except OutriderError as error:
                self._reply(self.fail, error)
                return
            if inspect.iscoroutine(result):
                self._task = asyncio.get_running_loop().create_task(result)
                actor.tasks.add(self._task)
                self._task.add_done_callback(self._served)
            else:
                self._reply(self._succeed, result)

    def _served(self, task: "asyncio.Task[Any]") -> None:
        self._link.actor.tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._reply(self._succeed, task.result())
        else:
            self._reply(self.fail, error if isinstance(error, OutriderError) else Internal(repr(error)))

    def _reply(self, how: Callable[[Any], None], what: Any) -> None:
        if self._link.actor.up and self._link.actor.incarnation == self._incarnation:
            self._link.carry(lambda: how(what))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
