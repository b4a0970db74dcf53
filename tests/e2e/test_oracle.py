"""The oracle: cluster = colocated = transformers, token for token, in fp32.

Greedy answers are checked by teacher forcing: transformers reads prompt and answer in one pass, and its best token at
every position must be the one that came. A difference is excused only where its two best logits are less than 1e-3
apart; excused ones are counted and may be 1 % of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from twostroke_proto.v1 import types_pb2

from tests.support.cluster import assert_blocks_come_home, running_cluster
from tests.support.inference import Answer, connect, generate, generate_all

NEW_TOKENS = 64
CHUNK = 96
LENGTHS = (
    1,
    2,
    5,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    80,
    95,
    96,
    97,
    111,
    112,
    113,
    128,
    160,
    191,
    192,
    193,
)
MARGIN = 1e-3
TEXT = """The lighthouse keeper climbed the narrow stairs every evening before the sun went down. He carried a lamp, a
book and a piece of bread, and he counted the steps although he knew their number. From the gallery he could see the
harbour, the fishing boats coming home, and far away the mountains of the mainland. In winter the storms threw the waves
against the rocks so hard that the glass trembled. People in the village said that his grandfather had built the tower
with his own hands. Nobody could say whether that was true. One morning a letter arrived from the capital. It explained
that the light would be run by a machine from now on, and that the keeper was free to go wherever he liked. He read it
twice, put it into the book, and went up the stairs as he had always done. """


def prompts_of(model: Path) -> list[list[int]]:
    """Prompts across block (16), chunk (96) and prefix-hit boundaries: distinct ones first, then shared beginnings."""
    text = AutoTokenizer.from_pretrained(model)(TEXT * 2)["input_ids"]
    distinct = [text[start : start + length] for start, length in enumerate(LENGTHS)]
    shared = [
        text[26 : 26 + hit] + text[:tail] for hit, tail in ((16, 1), (48, 7), (96, 16), (112, 40), (193, 1), (192, 0))
    ]
    return distinct + shared


def greedy() -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


def seeded(seed: int) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=seed, max_tokens=24, ignore_eos=True)


class Runs:
    """Every answer of one deployment."""

    def __init__(self, address: str, prompts: Sequence[Sequence[int]]) -> None:
        count = len(prompts)
        self.greedy = generate_all(address, prompts, [greedy()] * count, concurrency=16)
        sampled = [prompts[index] for index in range(10, 26)]
        self.batch = generate_all(address, sampled, [seeded(index) for index in range(16)], concurrency=16)
        stub = connect(address)
        self.alone = [generate(stub, sampled[index], seeded(index))[0] for index in range(4)]


@pytest.fixture(scope="module")
def runs(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    prompts = prompts_of(demo_model)
    flags = ("--dtype", "float32", "--max-step-tokens", str(CHUNK))
    done = {}
    for name, pools in {"cluster": ("--prefill", "1"), "colocated": ("--prefill", "0")}.items():
        with running_cluster(
            tmp_path_factory.mktemp(name), demo_model, *flags, *pools, workers=1 + int(pools[1])
        ) as cluster:
            done[name] = Runs(cluster.grpc, prompts)
            assert_blocks_come_home(cluster)
            roles = {worker["role"]: worker for worker in cluster.workers()}
            assert ("prefill" in roles) == (name == "cluster")
            if name == "cluster":
                assert roles["decode"]["kv_bytes"] > 0
            assert any(worker["hit_rate"] for worker in cluster.workers()), "no prompt hit the prefix cache"
    return done


class Reference:
    """transformers, reading prompt and answer in one pass."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def best_two(self, prompt: Sequence[int], answer: Answer) -> tuple[list[list[int]], list[float]]:
        """The two best tokens at each position of the answer, and how far apart their logits are."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *answer.token_ids[:-1]]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2, dim=-1)
        return best.indices.tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", ["cluster", "colocated"])
def test_greedy_equals_transformers(
    name: str,
    demo_model: Path,
    runs: dict[str, Runs],
    reference: Reference,
    record_property: Callable[[str, object], None],
) -> None:
    prompts = prompts_of(demo_model)
    assert len(prompts) >= 32
    excused = 0
    for prompt, answer in zip(prompts, runs[name].greedy, strict=True):
        assert len(answer.token_ids) == NEW_TOKENS
        best, margins = reference.best_two(prompt, answer)
        for position, token in enumerate(answer.token_ids):
            if token != best[position][0]:
                assert token == best[position][1], (len(prompt), position)
                assert margins[position] < MARGIN, f"prompt of {len(prompt)} differs at token {position}"
                excused += 1
    record_property("excused_tokens", excused)
    assert excused <= 0.01 * NEW_TOKENS * len(prompts), f"{excused} tokens excused"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_cluster_equals_colocated(demo_model: Path, runs: dict[str, Runs], reference: Reference) -> None:
    """Token for token; where two answers part, the reference must have been undecided."""
    for prompt, one, other in zip(
        prompts_of(demo_model), runs["cluster"].greedy, runs["colocated"].greedy, strict=True
    ):
        if one.token_ids != other.token_ids:
            parting = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b)
            assert reference.best_two(prompt, one)[1][parting] < MARGIN, f"prompt of {len(prompt)}, token {parting}"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_seeded_sampling_is_the_same_everywhere(runs: dict[str, Runs]) -> None:
    cluster, colocated = runs["cluster"], runs["colocated"]
    assert [a.token_ids for a in cluster.batch] == [a.token_ids for a in colocated.batch]
    assert [a.token_ids for a in cluster.alone] == [a.token_ids for a in colocated.alone]
    assert [a.token_ids for a in cluster.alone] == [a.token_ids for a in cluster.batch[:4]]
    assert len({tuple(a.token_ids) for a in cluster.batch}) == 16
