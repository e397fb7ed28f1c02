"""Which adapter a request means, through updates of all kinds."""

import pytest

from actor.weights.adapters import Adapters, LoadedAdapter
from common.errors import InvalidRequest
from common.types import Manifest, ManifestParameter


def update(version: int, adapter: str = "", rank: int = 0, *, base: bool = False) -> Manifest:
    names = [("w", (4, 4))] if base or not adapter else []
    names += [("x.lora_A.weight", (rank, 4)), ("x.lora_B.weight", (4, rank))] if adapter else []
    parameters = tuple(ManifestParameter(name, "F32", shape, 0, 0) for name, shape in names)
    return Manifest(version, parameters, (), updates_vision=False, adapter=adapter)


def taken(adapters: Adapters, manifest: Manifest) -> None:
    adapters.check(manifest)
    adapters.commit(manifest)


def test_the_policy_is_what_was_committed_last() -> None:
    adapters = Adapters("base", max_rank=8, max_adapters=2)
    assert adapters.find("") is None
    taken(adapters, update(1, "a", 8, base=True))
    assert adapters.find("") == adapters.find("a") == LoadedAdapter("a", 1, 1)
    taken(adapters, update(2, "b", 4))
    assert adapters.find("") == adapters.find("b") == LoadedAdapter("b", 2, 2)
    assert adapters.find("a") == LoadedAdapter("a", 1, 1)
    taken(adapters, update(3, "a", 2))  # replaced: the same number, another version
    assert adapters.find("") == adapters.find("a") == LoadedAdapter("a", 1, 3)
    assert adapters.find("base") is None
    assert adapters.names == ("a", "b")


def test_weights_of_the_model_void_adapters() -> None:
    adapters = Adapters("base", max_rank=8, max_adapters=2)
    taken(adapters, update(1, "a", 8))
    taken(adapters, update(2, "b", 8, base=True))
    assert list(adapters.names) == ["b"]
    taken(adapters, update(3))
    assert list(adapters.names) == []
    assert adapters.find("") is None
    taken(adapters, update(4, "b", 8))
    assert adapters.find("b") == LoadedAdapter("b", 3, 4)  # not the number of a request that is still under way


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (update(5, "c", 9), "has rank 9; this actor takes up to rank 8"),
        (update(5, "c", 8), "2 other adapters are here; max_loras is 2"),
        (update(5, "base", 8, base=True), "is the name of the base model"),
    ],
)
def test_adapters_that_cannot_be_taken(manifest: Manifest, message: str) -> None:
    adapters = Adapters("base", max_rank=8, max_adapters=2)
    taken(adapters, update(1, "a", 8))
    taken(adapters, update(2, "b", 8))
    with pytest.raises(InvalidRequest, match=message) as raised:
        adapters.check(manifest)
    assert raised.value.field == "manifest.adapter"


def test_an_actor_without_adapters() -> None:
    adapters = Adapters("base", max_rank=0, max_adapters=1)
    with pytest.raises(InvalidRequest, match=r"takes no adapters \(max_lora_rank is 0\)"):
        adapters.check(update(1, "a", 1))
    adapters.check(update(1))


def test_a_name_that_is_not_here_is_an_error_of_the_field() -> None:
    adapters = Adapters("base", max_rank=8, max_adapters=2)
    taken(adapters, update(1, "a", 8))
    with pytest.raises(InvalidRequest, match="'z' is not here; there is 'base', 'a'") as raised:
        adapters.find("z")
    assert raised.value.field == "model"
