"""The tiny Qwen2.5-VL of examples/digits, with random weights that are large enough for its outputs to differ."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.digits.model import build_model, build_processor
from learner.batch.processing import PromptProcessor
from learner.model.load import load_policy
from tests.helpers.enlarged import enlarge


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor(model_dir)


@pytest.fixture(scope="session")
def hf_processor() -> Any:
    return build_processor()


@pytest.fixture
def make_policy(model_dir: Path) -> Callable[[], Any]:
    """A fresh policy in train mode, the same every time."""
    return lambda: enlarge(load_policy(model_dir)[0])


@pytest.fixture(scope="session")
def reference_model(model_dir: Path) -> Any:
    """The same weights in stock transformers with eager attention."""
    from transformers import AutoModelForImageTextToText

    return enlarge(AutoModelForImageTextToText.from_pretrained(model_dir, attn_implementation="eager"))
