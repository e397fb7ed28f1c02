"""What a grammar may cost, on vLLM's own matcher."""

from typing import Any

import pytest

from actor.engine_vllm.grammars import bound_matching


@pytest.fixture
def grammar(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's matcher of a regex, over the bytes as a vocabulary."""
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    monkeypatch.setattr(XgrammarGrammar, "accept_tokens", XgrammarGrammar.accept_tokens)  # put back afterwards
    bound_matching()
    vocabulary = xgrammar.TokenizerInfo(list(map(chr, range(128))), stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_regex(request.param)
    return XgrammarGrammar(128, xgrammar.GrammarMatcher(compiled), compiled)


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


@pytest.mark.parametrize("grammar", ["a*"], indirect=True)
def test_what_does_not_match_is_refused_as_before(grammar: Any) -> None:
    assert _num_accepted(grammar, "aab") == 2
