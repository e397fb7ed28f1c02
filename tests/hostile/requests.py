"""Calls that a server must refuse, made from a seed."""

import dataclasses
import itertools
import random
from collections.abc import Iterator

from common.types import ServerLimits
from tests.hostile.calls import BadCall
from tests.hostile.media_calls import MediaCalls
from tests.hostile.prompt_calls import PromptCalls, SamplingCalls
from tests.hostile.service_calls import ServiceCalls

_MAKERS = (MediaCalls, SamplingCalls, PromptCalls, ServiceCalls)
KINDS = tuple(name for maker in _MAKERS for name in vars(maker) if not name.startswith("_"))


def bad_calls(seed: int, limits: ServerLimits, vocab_size: int) -> Iterator[BadCall]:
    """Without end, each kind as often as the others."""
    rng = random.Random(seed)
    makers = [maker(rng, limits, vocab_size) for maker in _MAKERS]
    for name in itertools.cycle(KINDS):
        maker = next(maker for maker in makers if hasattr(maker, name))
        yield dataclasses.replace(getattr(maker, name)(), kind=name)
