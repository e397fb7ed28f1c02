"""A bound on the time that vLLM takes to match a completion against its grammar.

xgrammar matches on the thread of the scheduler, which all requests share. Its parser keeps every way to read what came
so far, and of those an ambiguous grammar has ever more: at `((a*)*)*` a token takes 30 ms after 250, and seconds after
1,000. Grammars that people write take 2 us, and with some ambiguity, as in `([a-z]+ ?)+`, a quarter of a millisecond.

Before each token, what may come next is sought in the whole vocabulary: of 60,000 tokens, `([a-z]+ ?)+` takes 20 ms for
that, and `(([a-z]*)*)*` more than a second after 30.
"""

import functools
import time
from typing import Any

_GRACE_S = 0.1
_TOKEN_S = 0.001
_FILL_S = 0.2


@functools.cache  # a process may load its plug-ins more than once: two layers would count all time twice
def bound_matching() -> None:
    """Let vLLM end a completion whose tokens take longer to match, on average, as one that the grammar rejects."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    accept, fill = XgrammarGrammar.accept_tokens, XgrammarGrammar.fill_bitmask

    def accept_in_time(self: Any, request_id: str, tokens: list[int]) -> bool:
        started_s = time.thread_time()
        accepted = accept(self, request_id, tokens)
        self.matching_s = getattr(self, "matching_s", 0.0) + time.thread_time() - started_s
        return accepted and bool(
            self.matching_s <= _GRACE_S + _TOKEN_S * self.num_processed_tokens
            and getattr(self, "filling_s", 0.0) <= _GRACE_S + _FILL_S * self.num_processed_tokens
        )

    def fill_on_the_clock(self: Any, bitmask: Any, idx: int) -> None:
        started_s = time.thread_time()
        fill(self, bitmask, idx)
        self.filling_s = getattr(self, "filling_s", 0.0) + time.thread_time() - started_s

    XgrammarGrammar.accept_tokens = accept_in_time
    XgrammarGrammar.fill_bitmask = fill_on_the_clock
