"""What a grammar may cost, on vLLM's own matcher."""

import random
import string
from typing import Any

import pytest

from actor.engine_vllm.grammars import bound_matching

LETTERS = list(map(chr, range(128)))


def _bounded(regex: str, vocabulary: list[str]) -> Any:
    """vLLM's matcher of a regex."""
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    bound_matching()
    compiled = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[0])).compile_regex(regex)
    return XgrammarGrammar(len(vocabulary), xgrammar.GrammarMatcher(compiled), compiled)


@pytest.fixture
def grammar(request: pytest.FixtureRequest) -> Any:
    """Over the bytes as a vocabulary."""
    return _bounded(request.param, LETTERS)


@pytest.fixture
def large_grammar(request: pytest.FixtureRequest) -> Any:
    """Over a vocabulary as large as those of models."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_letters + " .,", k=rng.randint(2, 9))) for _ in range(60_000)]
    return _bounded(request.param, LETTERS + words)


def _num_accepted(grammar: Any, text: str) -> int:
    return next((i for i, letter in enumerate(text) if not grammar.accept_tokens("r", [ord(letter)])), len(text))


@pytest.mark.parametrize("grammar", ["((a*)*)*", "((a+)+b?)*"], indirect=True)
def test_one_that_costs_more_with_each_token_is_given_up(grammar: Any) -> None:
    assert 64 < _num_accepted(grammar, "a" * 1000) < 1000
    assert grammar.matching_s < 1


@pytest.mark.parametrize("grammar", ["([a-z]+ ?)+"], indirect=True)
def test_an_honest_one_is_not(grammar: Any) -> None:
    """Ambiguous, as people write them."""
    assert _num_accepted(grammar, "a" * 2000 + " and so on" * 200) == 4000


def _num_sampled(grammar: Any, text: str) -> int:
    """As the engine's step does: what may come next, then what came."""
    import xgrammar

    bitmask = xgrammar.allocate_token_bitmask(1, grammar.vocab_size)
    for i, letter in enumerate(text):
        grammar.fill_bitmask(bitmask, 0)
        if not grammar.accept_tokens("r", [ord(letter)]):
            return i
    return len(text)


@pytest.mark.parametrize("large_grammar", ["(([a-z]*)*)*"], indirect=True)
def test_one_whose_next_tokens_cost_more_each_time_is_given_up(large_grammar: Any) -> None:
    """What it accepts costs it nothing."""
    assert 2 < _num_sampled(large_grammar, "a" * 30) < 30
    assert large_grammar.matching_s < 0.1


@pytest.mark.parametrize("large_grammar", ["([a-z]+ ?)+"], indirect=True)
def test_an_honest_one_over_many_tokens_is_not(large_grammar: Any) -> None:
    assert _num_sampled(large_grammar, "and so on " * 4) == 40


@pytest.mark.parametrize("grammar", ["a*"], indirect=True)
def test_what_does_not_match_is_refused_as_before(grammar: Any) -> None:
    assert _num_accepted(grammar, "aab") == 2
