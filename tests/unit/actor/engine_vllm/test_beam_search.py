"""The search against every sequence that there is, written out."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from actor.engine_vllm.beam_search import BeamSearch, FoundBeam, NextTokens

EOS = 0
VOCABULARY = 4


class Model:
    """A distribution over four tokens for each prefix, made up from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.num_steps = 0

    def logprobs(self, prefix: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([self.seed, len(prefix), *prefix]).normal(0, 2, VOCABULARY)
        return np.asarray(logits - np.logaddexp.reduce(logits))

    async def extend(self, beams: Sequence[FoundBeam]) -> list[NextTokens]:
        self.num_steps += 1
        rows = [self.logprobs(beam.token_ids) for beam in beams]
        orders = [np.argsort(-row) for row in rows]
        return [
            NextTokens(self.num_steps, tuple(order.tolist()), tuple(row[order].tolist()))
            for row, order in zip(rows, orders, strict=True)
        ]


def _score(model: Model, ids: tuple[int, ...], num_prompt: int, penalty: float) -> float:
    total = sum(float(model.logprobs(ids[:t])[token_id]) for t, token_id in enumerate(ids))
    return total / math.pow(num_prompt + len(ids) - (ids[-1] == EOS), penalty)


def _search(model: Model, num_beams: int, max_tokens: int, penalty: float, eos: tuple[int, ...] = (EOS,)) -> BeamSearch:
    return BeamSearch(
        num_beams=num_beams, max_tokens=max_tokens, num_prompt_tokens=3, eos_ids=eos, length_penalty=penalty
    )


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0, -2.0])
@pytest.mark.parametrize("seed", range(5))
async def test_wide_enough_it_finds_the_best_of_all(seed: int, penalty: float) -> None:
    model = Model(seed)
    everything = [
        ids
        for length in range(1, 4)
        for ids in itertools.product(range(VOCABULARY), repeat=length)
        if EOS not in ids[:-1] and (length == 3 or ids[-1] == EOS)
    ]
    expected = sorted(everything, key=lambda ids: _score(model, ids, 3, penalty), reverse=True)
    search = _search(model, len(everything), 3, penalty)
    found = await search.run(model.extend)
    assert [beam.token_ids for beam in found] == expected
    for beam in found:
        assert search.score(beam) == pytest.approx(_score(model, beam.token_ids, 3, penalty))
        assert beam.cumulative_logprob == pytest.approx(sum(beam.logprobs))
        assert beam.is_finished == (beam.token_ids[-1] == EOS)
        assert beam.versions == tuple(range(1, len(beam.token_ids) + 1))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0, -2.0])
async def test_stopping_early_changes_nothing(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = 0
    for seed in range(20):
        model, patient = Model(seed), Model(seed)
        found = await _search(model, 2, 12, penalty).run(model.extend)
        with monkeypatch.context() as patch:
            patch.setattr(BeamSearch, "_can_improve", lambda _search, live, _finished: bool(live))
            expected = await _search(patient, 2, 12, penalty).run(patient.extend)
        assert [beam.token_ids for beam in found] == [beam.token_ids for beam in expected]
        saved += patient.num_steps - model.num_steps
    # A penalty that favours length so much leaves hope to the last token.
    assert (saved > 20) == (penalty < 3)


async def test_without_ends_it_goes_to_the_last_token() -> None:
    model = Model(1)
    found = await _search(model, 3, 5, 1.0, eos=()).run(model.extend)
    assert [len(beam.token_ids) for beam in found] == [5, 5, 5]
    assert not any(beam.is_finished for beam in found)
    assert found[0].cumulative_logprob >= found[1].cumulative_logprob > -math.inf


@pytest.mark.parametrize("num_beams", [2, 8])
async def test_when_no_beam_lives_on_the_search_ends(num_beams: int) -> None:
    """As where only ids that end a sequence may be sampled."""
    model = Model(1)
    found = await _search(model, num_beams, 5, 1.0, eos=tuple(range(VOCABULARY))).run(model.extend)
    likeliest = np.argsort(-model.logprobs(()))[:num_beams]
    assert [beam.token_ids for beam in found] == [(token_id,) for token_id in likeliest]
    assert model.num_steps == 1


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0, -2.0])
async def test_a_narrow_search_is_the_one_written_out(penalty: float) -> None:
    def rank(ids: tuple[int, ...]) -> float:
        return _score(model, ids, 3, penalty)

    for seed in range(20):
        model = Model(seed)
        live: list[tuple[int, ...]] = [()]
        ended: list[tuple[int, ...]] = []
        for _ in range(6):
            longer = [(*ids, token_id) for ids in live for token_id in range(VOCABULARY)]
            ended += [ids for ids in longer if ids[-1] == EOS]
            going = [ids for ids in longer if ids[-1] != EOS]
            live = sorted(going, key=lambda ids: _score(model, ids, 3, 0.0), reverse=True)[:2]
        expected = sorted([*ended, *live], key=rank, reverse=True)[:2]
        found = await _search(model, 2, 6, penalty).run(model.extend)
        assert [beam.token_ids for beam in found] == expected


async def test_only_what_lives_on_or_ends_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step weighs twice the square of the beams; each copy is as long as the completion."""
    num_beams, num_steps, num_copies = 8, 5, 0
    extended = FoundBeam.extended

    def counted(beam: FoundBeam, token_id: int, logprob: float, version: int, *, is_finished: bool) -> FoundBeam:
        nonlocal num_copies
        num_copies += 1
        return extended(beam, token_id, logprob, version, is_finished=is_finished)

    async def extend(beams: Sequence[FoundBeam]) -> list[NextTokens]:
        return [NextTokens(0, tuple(range(16)), tuple(-0.1 * rank - 1 for rank in range(16)))] * len(beams)

    monkeypatch.setattr(FoundBeam, "extended", counted)
    search = BeamSearch(
        num_beams=num_beams, max_tokens=num_steps, num_prompt_tokens=3, eos_ids=range(12), length_penalty=1.0
    )
    assert len(await search.run(extend)) == num_beams
    assert num_copies <= 2 * num_beams * num_steps


@pytest.mark.parametrize("penalty", [32.0, -32.0])
def test_scores_under_the_largest_penalty_are_numbers(penalty: float) -> None:
    """Of the longest prompts and completions, and of the least and the most likely beams; better beams score higher."""
    search = BeamSearch(num_beams=2, max_tokens=2**20, num_prompt_tokens=2**20, eos_ids=(), length_penalty=penalty)
    worst, bad, good, best = (
        search.score(FoundBeam((5,) * 2**20, cumulative_logprob=total)) for total in (-1e9, -1.0, -1e-40, 0.0)
    )
    assert -math.inf < worst < bad < good < best
