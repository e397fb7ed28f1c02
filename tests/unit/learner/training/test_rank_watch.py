"""Who is accused of silence, by counts and over a real store; and that nobody else is."""

import threading
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from learner.stopping import AgreedStop
from learner.training import rank_watch
from learner.training.rank_watch import Silence, at_fault, watching

# With beats so short apart, that many go into the time that a rank may be silent.
BEAT_S, NUM_LOOKS = 0.01, 100
TIMEOUT_S = BEAT_S * NUM_LOOKS


def looks(silence: Silence, *seconds: list[bytes]) -> list[list[int]]:
    """Who has been silent for two looks, after each look."""
    return [(silence.look(beats), silence.ranks(2))[1] for beats in seconds]


def test_only_a_beat_that_does_not_move_is_silence() -> None:
    beats = [[b"1", b"1"], [b"2", b"1"], [b"3", b"1"], [b"4", b"2"]]
    assert looks(Silence(2), *beats) == [[], [], [1], []]


def test_a_rank_that_said_goodbye_may_be_silent_and_no_other() -> None:
    beats = [[b"1", b"goodbye"]] * 3
    assert looks(Silence(2), *beats) == [[], [], [0]]


def test_without_answers_of_the_store_everybody_is_silent() -> None:
    assert looks(Silence(2), [], [], [b"1", b"1"], [], []) == [[], [0, 1], [], [], [0, 1]]


def test_the_longest_silence_counts() -> None:
    silence = Silence(3)
    assert [silence.look(beats) for beats in ([b"1", b"1", b"1"], [b"1", b"1", b"2"], [b"1", b"2", b"3"])] == [0, 1, 2]
    assert silence.ranks(1) == [0]


def test_a_store_that_is_gone_is_not_taken_for_a_rank_whose_last_beat_was_seen_earlier() -> None:
    silence = Silence(2)
    for beats in ([b"1", b"1"], [b"2", b"1"], [], [], []):
        silence.look(beats)
    assert silence.ranks(4) == [1]
    assert at_fault(silence, 0, 4).startswith("the store that the ranks meet at: ")
    assert at_fault(silence, 1, 4).startswith("the store that the ranks meet at: ")


def test_a_beat_of_ones_own_that_is_late_excuses_nobody() -> None:
    silence = Silence(2)
    for beats in ([b"1", b"1"], [b"2", b"1"], [b"3", b"1"], [b"4", b"1"], []):
        silence.look(beats)
    assert at_fault(silence, 0, 4) == "rank 1: stopped or cut off"


def test_the_shortest_timeout_names_the_rank_too() -> None:
    silence = Silence(2)
    for beats in ([b"1", b"1"], [b"2", b"1"]):
        silence.look(beats)
    assert at_fault(silence, 0, 1) == "rank 1: stopped or cut off"


@dataclass
class Accusations:
    """What a watch says."""

    lines: list[str] = field(default_factory=list)
    any: threading.Event = field(default_factory=threading.Event)

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.any.set()

    def wait(self) -> str:
        assert self.any.wait(30)
        return self.lines[0]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> list[dist.TCPStore]:
    """The store of the ranks; who takes it out of the list ends it."""
    monkeypatch.setattr(rank_watch, "_BEAT_S", BEAT_S)
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(stores[0].port))
    return stores


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released by each look of a watch."""
    semaphore = threading.Semaphore(0)
    look = Silence.look

    def counted(self: Silence, beats: list[bytes]) -> int:
        semaphore.release()
        return look(self, beats)

    monkeypatch.setattr(Silence, "look", counted)
    return semaphore


def test_a_rank_that_stops_beating_is_named(store: list[dist.TCPStore]) -> None:
    accused = Accusations()
    for rank in (1, 2):
        store[0].set(f"rank-watch/{rank}", "7")
    with watching(3, 0, TIMEOUT_S, accused):
        assert accused.wait() == (
            "nothing has been heard for 1 s of ranks 1, 2: stopped or cut off; "
            "the job ends, and started again it goes on from its last checkpoint"
        )


def test_ranks_that_beat_are_not_accused_nor_one_that_has_left(
    store: list[dist.TCPStore], looked: threading.Semaphore
) -> None:
    accused = Accusations()
    with watching(2, 0, TIMEOUT_S, accused):
        with watching(2, 1, TIMEOUT_S, accused):
            pass_looks(looked, 6 * NUM_LOOKS)  # of two watches
        assert store[0].get("rank-watch/1") == b"goodbye"
        pass_looks(looked, 3 * NUM_LOOKS)
        assert not accused.lines


def test_a_rank_that_ends_as_agreed_has_left(store: list[dist.TCPStore]) -> None:
    """The others may take their time to clean up."""
    store[0].set("rank-watch/0", "7")
    with pytest.raises(AgreedStop), watching(2, 1, TIMEOUT_S, Accusations()):
        raise AgreedStop
    assert store[0].get("rank-watch/1") == b"goodbye"


def pass_looks(looked: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert looked.acquire(timeout=30)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_rank_that_fails_says_no_goodbye(store: list[dist.TCPStore], error: type[BaseException]) -> None:
    accused = Accusations()
    with watching(2, 0, TIMEOUT_S, accused):
        with pytest.raises(error), watching(2, 1, TIMEOUT_S, accused):
            raise error
        assert "of rank 1: stopped or cut off" in accused.wait()


def test_a_store_that_is_gone_is_said_to_be(store: list[dist.TCPStore], looked: threading.Semaphore) -> None:
    accused = Accusations()
    with watching(2, 0, TIMEOUT_S, accused), watching(2, 1, TIMEOUT_S, accused):
        pass_looks(looked, 4)
        store.clear()
        assert "nothing has been heard for 1 s of the store that the ranks meet at: " in accused.wait()


def test_a_single_rank_has_nobody_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    before = threading.active_count()
    with watching(1, 0, TIMEOUT_S, Accusations()):
        assert threading.active_count() == before
