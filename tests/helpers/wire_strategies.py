"""hypothesis strategies: every domain type that crosses the wire, and bytes that nearly do."""

import itertools
import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from common.tensors import ITEM_SIZES, NamedTensor, Tensor
from common.types import (
    ActorState,
    ActorStatus,
    BeamScore,
    ChatMessage,
    ChatPrompt,
    Completion,
    Constraint,
    EpochSpec,
    FinishReason,
    Frames,
    Manifest,
    ManifestBucket,
    ManifestParameter,
    MediaItem,
    MediaPart,
    MediaUse,
    Modality,
    PlaceholderRange,
    PromptInfo,
    RepetitionDetection,
    RolloutRequest,
    SamplingParams,
    ServerInfo,
    ServerLimits,
    StructuredOutput,
    TextPart,
    TextPrompt,
    TokenPrompt,
    TopLogprobs,
    VersionSpan,
)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
uint32 = st.integers(0, 2**32 - 1)
int32 = st.integers(-(2**31), 2**31 - 1)
uint64 = st.integers(0, 2**64 - 1)
versions = st.integers(0, 2**63 - 1)
hashes = st.binary(min_size=32, max_size=32)
float32 = st.floats(width=32, allow_nan=False)
seconds = st.floats(0, 1e6, width=32)
id_tuples = st.lists(int32, max_size=6).map(tuple)
runs = st.builds(PlaceholderRange, uint32, uint32)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any that adds up."""
    dtype = draw(st.sampled_from(sorted(ITEM_SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = math.prod(shape) * ITEM_SIZES[dtype]
    data = draw(st.binary(min_size=size, max_size=size))
    return Tensor(dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data)


named_tensors = st.lists(st.builds(NamedTensor, names, tensors()), max_size=3, unique_by=lambda named: named.name).map(
    tuple
)
_contents: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.builds(lambda data: {"encoded": data}, st.binary(max_size=40)),
    st.builds(
        lambda files, pace: {"frames": Frames(tuple(files)), "modality": Modality.VIDEO, "frames_per_second": pace},
        st.lists(st.binary(max_size=10), max_size=3),
        st.none() | st.floats(allow_nan=False),
    ),
    st.builds(lambda tensor: {"pixels": tensor}, tensors()),
    st.builds(lambda tensors: {"processed": tensors}, named_tensors.filter(bool)),
)
media_items = st.builds(
    lambda sha256, content, low, high: MediaItem(sha256, **content, min_pixels=low, max_pixels=high),
    hashes,
    _contents,
    st.none() | uint64,
    st.none() | uint64,
)

structured_outputs = st.one_of(
    st.just(StructuredOutput(Constraint.JSON_OBJECT)),
    st.builds(lambda choices: StructuredOutput(Constraint.CHOICE, choices=tuple(choices)), st.lists(texts, max_size=3)),
    st.builds(StructuredOutput, st.sampled_from([Constraint.REGEX, Constraint.JSON_SCHEMA, Constraint.GRAMMAR]), texts),
)
# Unset is not 0 in these, so that whatever is given crosses.
sampling_params = st.builds(
    SamplingParams,
    n=st.integers(1, 2**32 - 1),
    temperature=float32,
    top_p=float32,
    top_k=uint32,
    min_p=float32,
    max_tokens=uint32,
    min_tokens=uint32,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=id_tuples,
    stop=st.lists(texts, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    allowed_token_ids=id_tuples,
    repetition_penalty=float32,
    presence_penalty=float32,
    frequency_penalty=float32,
    top_logprobs=uint32,
    prompt_logprobs=st.booleans(),
    prompt_top_logprobs=uint32,
    logit_bias=st.dictionaries(int32, float32, max_size=4).map(lambda biases: tuple(sorted(biases.items()))),
    bad_token_ids=id_tuples,
    bad_words=st.lists(texts, max_size=3).map(tuple),
    structured_output=st.none() | structured_outputs,
    num_beams=uint32,
    length_penalty=st.none() | float32,
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    repetition_detection=st.none() | st.builds(RepetitionDetection, uint32, st.integers(1, 2**32 - 1), uint32),
)
_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
_parts = st.one_of(st.builds(TextPart, texts), st.builds(MediaPart, uint32))
prompts = st.one_of(
    st.builds(TextPrompt, texts),
    st.builds(TokenPrompt, id_tuples, st.lists(runs, max_size=3).map(tuple)),
    st.builds(
        ChatPrompt,
        st.lists(st.builds(ChatMessage, texts, st.lists(_parts, max_size=3).map(tuple)), max_size=3).map(tuple),
        st.dictionaries(texts.map("_".__add__), _json, max_size=3),
    ),
)
rollout_requests = st.builds(
    RolloutRequest,
    group_id=texts,
    prompt=prompts,
    media=st.lists(media_items, max_size=3).map(tuple),
    sampling=sampling_params,
    min_policy_version=st.integers(-(2**63), 2**63 - 1),
    return_text=st.booleans(),
    return_processed=st.booleans(),
    model=texts,
    run_id=texts,
    return_routed_experts=st.booleans(),
)


@st.composite
def top_logprobs(draw: st.DrawFn) -> TopLogprobs:
    """As many logprobs as ids."""
    pairs = draw(st.lists(st.tuples(int32, float32), max_size=3))
    return TopLogprobs(tuple(token_id for token_id, _ in pairs), tuple(logprob for _, logprob in pairs))


@st.composite
def prompt_infos(draw: st.DrawFn) -> PromptInfo:
    """Placeholders lie in the prompt, logprobs cover it or are not there."""
    ids = draw(st.lists(int32, max_size=8))
    uses = []
    for _ in range(draw(st.integers(0, 2))):
        offset = draw(st.integers(0, len(ids)))
        length = draw(st.integers(0, len(ids) - offset))
        uses.append(
            MediaUse(
                draw(hashes),
                PlaceholderRange(offset, length),
                draw(st.integers(0, length)),
                tuple(draw(st.lists(uint32, max_size=3))),
                processed=draw(named_tensors),
            )
        )
    has_logprobs, has_top = draw(st.booleans()), draw(st.booleans())
    return PromptInfo(
        draw(texts),
        draw(texts),
        np.asarray(draw(st.lists(int32, max_size=6)), np.int32),
        np.asarray(ids, np.int32),
        tuple(uses),
        draw(id_tuples),
        tuple(draw(float32) for _ in ids) if has_logprobs else (),
        tuple(draw(top_logprobs()) for _ in ids) if has_top else (),
        draw(st.none() | st.integers(0, 2**63 - 1)),
    )


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    """Spans cover the tokens."""
    ids = draw(st.lists(int32, max_size=6))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=2))) if len(ids) > 1 else []
    edges = [0, *cuts, len(ids)] if ids else []
    spans = tuple(VersionSpan(draw(versions), start, end) for start, end in itertools.pairwise(edges))
    return Completion(
        draw(texts),
        draw(uint32),
        np.asarray(ids, np.int32),
        np.asarray([draw(float32) for _ in ids], np.float32),
        draw(st.sampled_from(FinishReason)),
        spans,
        draw(seconds),
        draw(seconds),
        draw(texts),
        tuple(draw(top_logprobs()) for _ in ids) if draw(st.booleans()) else (),
        draw(st.none() | int32 | texts),
        draw(st.none() | st.builds(BeamScore, st.floats(allow_nan=False), st.floats(allow_nan=False))),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Parameters end to end, each aligned to 16 bytes, whole or as a delta: laid out here as the proto file says it."""
    base_version = draw(st.just(-1) | versions)
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1}
    parameters, buckets = [], []
    for bucket in range(draw(st.integers(1, 3))):
        end = 0
        for _ in range(draw(st.integers(1, 3))):
            dtype = draw(st.sampled_from(sorted(sizes)))
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
            offset = -(-end // 16) * 16
            parameters.append(ManifestParameter(draw(names), dtype, shape, bucket, offset))
            end = offset + math.prod(shape) * sizes[dtype]
        delta: tuple[int, ...] = ()
        if base_version >= 0:
            words = [size for size in (1, 2, 4, 8) if end % size == 0]
            delta = (draw(st.integers(1, max(1, end))), draw(st.sampled_from(words)))
        buckets.append(ManifestBucket(end, draw(uint64), draw(st.booleans()), *delta))
    return Manifest(draw(versions), tuple(parameters), tuple(buckets), draw(st.booleans()), base_version=base_version)


@st.composite
def epochs(draw: st.DrawFn) -> EpochSpec:
    """The rank is that of a member, but not of the learner."""
    world_size = draw(st.integers(2, 2**32 - 1))
    return EpochSpec(
        draw(texts.filter(bool)),
        draw(st.integers(1, 2**63 - 1)),
        draw(texts.filter(bool)),
        draw(st.integers(1, 65535)),
        world_size,
        draw(st.integers(1, world_size - 1)),
        draw(st.sampled_from(["gloo", "nccl"])),
        draw(st.integers(1, 2**32 - 1)) / 1e3,
    )


statuses = st.builds(
    ActorStatus,
    texts,
    st.sampled_from(ActorState),
    versions,
    texts,
    versions,
    st.integers(-1, 2**63 - 1),
    uint32,
    uint32,
    uint32,
)
server_limits = st.builds(ServerLimits, uint32, uint32, uint32, uint64, uint64, uint64, *[uint32] * 4)
server_infos = st.builds(ServerInfo, texts, texts, texts, texts, texts, texts, versions, server_limits, id_tuples)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes with some replaced, removed or added."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 2)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[place : place + draw(st.integers(1, 8))]
            case _:
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)
