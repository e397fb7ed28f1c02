"""How completions are sampled."""

import enum
from dataclasses import dataclass

# Of those that a request allows, forbids or favours: what vLLM's model runner on GPUs has room for; it dies of more.
MAX_TOKEN_IDS = 1024
# Of strings that end a completion, or that it must not have.
MAX_STRINGS = 16
MAX_STRING_CHARS = 128


class Constraint(enum.Enum):
    """Kinds of structured output."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    JSON_OBJECT = "json_object"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the text of every completion must match; `spec` for all kinds but CHOICE, which has `choices`."""

    constraint: Constraint
    spec: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """Ends a completion whose last tokens are one pattern, `min_count` times in a row."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled. `None` and the defaults mean "off"; `temperature=0` is greedy.

    With `num_beams` nothing is sampled: the `n` best beams of a beam search are returned.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 0
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    structured_output: StructuredOutput | None = None
    num_beams: int = 0
    length_penalty: float | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = False
    repetition_detection: RepetitionDetection | None = None
