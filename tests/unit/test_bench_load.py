"""The load of `twostroke bench`: lengths, arrivals, traces, prompts, and the flags that describe them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import msgspec
import pytest
from twostroke_cli.bench.arrivals import Arrivals, Closed, Open, Replay, describe
from twostroke_cli.bench.flags import Flags, arrivals_of, check_prompts, form_of, limits_of, prompts_of
from twostroke_cli.bench.job import Form, Job, body_of
from twostroke_cli.bench.lengths import Length, parse_length
from twostroke_cli.bench.prompts import FromFile, FromTrace, PromptSpec, Synthetic, open_prompts
from twostroke_cli.bench.targets import named_url, spawned, with_url
from twostroke_cli.bench.trace import read_trace
from twostroke_cli.errors import CommandError

TEN = Length("fixed", 10, 10)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    '{"timestamp": 3000, "input_length": 1030, "output_length": 500, "hash_ids": [0, 1, 9]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)


def job(**changes: Any) -> Job:
    plain: dict[str, Any] = {"url": "u", "form": Form("m"), "prompts": Synthetic(TEN, TEN), "arrivals": Open(5.0)}
    return Job(**{**plain, **changes})


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_are_drawn_as_written() -> None:
    source = random.Random(1)
    assert {parse_length("7", "--x").draw(source) for _ in range(5)} == {7}
    even = [parse_length("10..20", "--x").draw(source) for _ in range(2000)]
    assert (min(even), max(even)) == (10, 20)
    assert mean(even) == pytest.approx(15, abs=0.5)
    skewed = [parse_length("lognormal:100:0.8:500", "--x").draw(source) for _ in range(4000)]
    assert median(skewed) == pytest.approx(100, rel=0.1)
    assert mean(skewed) > 120
    assert max(skewed) == 500


@pytest.mark.parametrize("text", ["0", "x", "9..3", "-1", "lognormal:5", "lognormal:0:1", "9999999", ""])
def test_a_wrong_length_names_its_flag(text: str) -> None:
    with pytest.raises(CommandError, match="--prompt-len"):
        parse_length(text, "--prompt-len")


@pytest.mark.parametrize("text", ["7", "10..20", "lognormal:100:0.8:500"])
def test_a_length_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_length(text, "--x")) == text


# ---- arrivals --------------------------------------------------------------------------------------------------------


def gaps(arrivals: Open, count: int = 4000) -> list[float]:
    return [later - earlier for earlier, later in pairwise(islice(arrivals.due_s(seed=3), count))]


def test_arrivals_keep_their_rate_and_differ_in_bursts() -> None:
    spread = {}
    for name, arrivals in {
        "constant": Open(10.0, "constant"),
        "even": Open(10.0, "gamma", 4.0),
        "poisson": Open(10.0),
        "bursts": Open(10.0, "gamma", 0.25),
    }.items():
        found = gaps(arrivals)
        assert mean(found) == pytest.approx(0.1, rel=0.1), name
        spread[name] = pstdev(found) / mean(found)
    # The coefficient of variation of gamma gaps is 1 / sqrt(burstiness).
    assert spread == pytest.approx({"constant": 0.0, "even": 0.5, "poisson": 1.0, "bursts": 2.0}, abs=0.15)


def test_arrivals_begin_at_once_and_follow_their_seed() -> None:
    assert next(Open(2.0).due_s(1)) == 0.0
    assert list(islice(Open(2.0).due_s(1), 9)) == list(islice(Open(2.0).due_s(1), 9))
    assert list(islice(Open(2.0).due_s(1), 9)) != list(islice(Open(2.0).due_s(2), 9))
    assert list(islice(Open(None).due_s(1), 3)) == [0.0] * 3
    assert list(Replay(2.0).due_s([5.0, 6.0, 9.0])) == [0.0, 0.5, 2.0]


def test_a_plan_ends_by_number_or_by_time() -> None:
    prompts = open_prompts(Synthetic(TEN, TEN), 0)
    even = Open(10.0, "constant")
    assert [number for number, _ in job(arrivals=even, num_requests=4).plan(prompts)] == [0, 1, 2, 3]
    assert [due for _, due in job(arrivals=even, duration_s=0.35).plan(prompts)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert len(list(job(arrivals=even, duration_s=0.35, num_requests=2).plan(prompts))) == 2
    assert list(job(num_requests=3).numbers()) == [0, 1, 2]


def test_loads_have_words() -> None:
    assert describe(Closed(1)) == "closed loop, 1 client"
    assert describe(Open(None)) == "open loop, all at once"
    assert describe(Open(2.5, "gamma", 0.5)) == "open loop, 2.5 requests/s, gamma, burstiness 0.5"
    assert describe(Replay(4)) == "open loop, times of the trace at 4 x"


@pytest.mark.parametrize("arrivals", [Open(None), Open(2.0, "gamma", 0.5), Replay(2.0), Closed(3)])
@pytest.mark.parametrize("prompts", [Synthetic(TEN, TEN), FromFile("p", TEN), FromTrace("t", 0.5, 90)])
def test_a_job_reaches_a_client_process_as_it_is(arrivals: Arrivals, prompts: PromptSpec) -> None:
    told = job(arrivals=arrivals, prompts=prompts, duration_s=2.5, key_variable="KEY")
    assert msgspec.json.decode(msgspec.json.encode(told), type=Job) == told


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_both_kinds_of_trace_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    rows = read_trace(tmp_path / "m.jsonl")
    assert [(row.at_s, row.prompt_len, row.max_tokens) for row in rows] == [(0, 1100, 5), (3, 1030, 500)]
    assert rows[1].blocks == (0, 1, 9)
    (tmp_path / "a.csv").write_text(AZURE)
    rows = read_trace(tmp_path / "a.csv")
    assert rows[1].at_s - rows[0].at_s == pytest.approx(4.314579)
    assert (rows[0].prompt_len, rows[0].max_tokens, rows[0].blocks) == (374, 44, ())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.jsonl", MOONCAKE + "{}\n", "line 3"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 5}', "line 1: lengths must be positive"),
        ("m.jsonl", "\n", "no request"),
        ("a.csv", "a,b\n1,2\n", "no column TIMESTAMP"),
        ("a.csv", AZURE + "yesterday,1,2\n", "line 4"),
        ("a.csv", AZURE + "2023-11-16 18:15:50.9951690,x,2\n", "line 4"),
    ],
)
def test_a_wrong_trace_names_the_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CommandError, match=says) as refused:
        read_trace(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--trace .*nowhere: No such file"):
        read_trace(tmp_path / "nowhere")


def test_equal_blocks_of_a_trace_are_equal_words(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    prompts = open_prompts(FromTrace(str(tmp_path / "m.jsonl")), seed=1)
    first, second = (str(prompts.draft(number).prompt).split() for number in (0, 1))
    assert (len(first), len(second)) == (1100, 1030)
    assert first[:1024] == second[:1024]
    assert first[1024:1030] != second[1024:1030]
    assert prompts.draft(1).max_tokens == 500


def test_a_trace_is_scaled_and_cut(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    prompts = open_prompts(FromTrace(str(tmp_path / "m.jsonl"), 0.1, max_prompt_len=80), seed=1)
    first, second = (prompts.draft(number) for number in (0, 1))
    assert [len(str(draft.prompt).split()) for draft in (first, second)] == [80, 80]
    assert [first.max_tokens, second.max_tokens] == [1, 50]
    assert str(first.prompt).split()[:51] == str(second.prompt).split()[:51]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_made_up_prompts_share_what_they_should() -> None:
    prompts = open_prompts(Synthetic(Length("fixed", 40, 40), TEN, prefix_share=0.5, groups=2), seed=5)
    texts = [str(prompts.draft(number).prompt).split() for number in range(30)]
    assert {len(text) for text in texts} == {40}
    assert len({tuple(text[:20]) for text in texts}) == 2
    assert len({tuple(text[20:]) for text in texts}) == 30
    assert prompts.draft(3) == open_prompts(Synthetic(Length("fixed", 40, 40), TEN, 0.5, 2), seed=5).draft(3)
    assert prompts.draft(3) != open_prompts(Synthetic(Length("fixed", 40, 40), TEN, 0.5, 2), seed=6).draft(3)


def test_token_ids_stay_below_the_vocabulary() -> None:
    prompt = open_prompts(Synthetic(Length("fixed", 500, 500), TEN, vocab_size=9), seed=0).draft(0).prompt
    assert len(prompt) == 500
    assert set(prompt) == set(range(9))


def test_a_file_of_prompts_is_asked_whole_before_it_repeats(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    prompts = open_prompts(FromFile(str(file), TEN), seed=1)
    drafts = [prompts.draft(number) for number in range(4)]
    assert drafts[:2] == drafts[2:]
    assert sorted(map(str, drafts[:2])) == sorted(
        map(
            str,
            [("Draft(prompt='a', max_tokens=3)"), "Draft(prompt=[{'role': 'user', 'content': 'b'}], max_tokens=10)"],
        )
    )
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert {str(open_prompts(FromFile(str(tmp_path / "p.txt"), TEN), 1).draft(n).prompt) for n in (0, 1)} == {
        "one",
        "two",
    }


@pytest.mark.parametrize(
    ("content", "endpoint", "says"),
    [
        ('{"prompt": 5}', "chat", "line 1"),
        ("{}", "chat", "neither `prompt` nor `messages`"),
        ("", "chat", "no prompt"),
        ('{"messages": [{"role": "user", "content": "b"}]}', "completions", "--endpoint chat"),
        ('{"prompt": [1, 2]}', "chat", "--endpoint completions"),
    ],
)
def test_a_wrong_file_of_prompts_says_why(tmp_path: Path, content: str, endpoint: str, says: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    flags = Flags(prompts=file, endpoint=endpoint)
    with pytest.raises(CommandError, match=says):
        check_prompts(prompts_of(flags), flags)


def test_bodies_are_what_the_endpoint_takes() -> None:
    chat = body_of(Form("m", more={"top_p": 0.5}), "hello", 5)
    assert b'"messages":[{"role":"user","content":"hello"}]' in chat
    assert b'"stream":true' in chat
    assert b'"include_usage":true' in chat
    assert b'"top_p":0.5' in chat
    whole = body_of(Form("m", "completions", is_streamed=False), [1, 2], 5)
    assert whole == b'{"model":"m","max_tokens":5,"prompt":[1,2]}'


# ---- flags -----------------------------------------------------------------------------------------------------------


def everything_of(flags: Flags) -> None:
    form_of(flags, "m")
    arrivals_of(flags)
    limits_of(flags, check_prompts(prompts_of(flags), flags))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate": 2.0, "concurrency": 2}, "--rate"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": math.nan}, "--rate"),
        ({"rate": math.inf}, "--requests"),
        ({"rate": 2.0, "arrivals": "daily"}, "--arrivals"),
        ({"rate": 2.0, "burstiness": -1.0}, "--burstiness"),
        ({"duration": 0.0}, "--duration"),
        ({"deadline": -1.0}, "--deadline"),
        ({"timeout": 0.0}, "--timeout"),
        ({"endpoint": "embeddings"}, "--endpoint"),
        ({"extra": "{"}, "--extra"),
        ({"extra": "[1]"}, "--extra"),
        ({"vocab_size": 5}, "--vocab-size"),
        ({"prompt_len": "many"}, "--prompt-len"),
        ({"max_tokens": "0"}, "--max-tokens"),
        ({"trace": Path("a"), "prompts": Path("b")}, "--trace"),
        ({"trace": Path("/nowhere.csv")}, "--trace"),
        ({"prompts": Path("/nowhere.txt")}, "--prompts"),
        ({"trace": Path("a"), "trace_speed": 0.0}, "--trace-speed"),
    ],
)
def test_a_flag_that_does_not_fit_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CommandError, match=named):
        everything_of(replace(Flags(), **changes))


def test_flags_say_how_much_is_sent(tmp_path: Path) -> None:
    assert arrivals_of(Flags()) == Closed(1)
    assert limits_of(Flags(), None) == (100, None)
    assert limits_of(Flags(duration=3.0), None) == (None, 3.0)
    assert limits_of(Flags(duration=3.0, requests=5), None) == (5, 3.0)
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    flags = Flags(trace=tmp_path / "m.jsonl", trace_speed=2.0)
    assert arrivals_of(flags) == Replay(2.0)
    assert arrivals_of(replace(flags, rate=3.0)) == Open(3.0)
    assert arrivals_of(Flags(rate=math.inf, requests=3)) == Open(None)
    assert limits_of(flags, check_prompts(prompts_of(flags), flags)) == (2, None)
    assert limits_of(replace(flags, requests=1), 2) == (1, None)


def test_targets_are_urls_or_clusters() -> None:
    assert with_url("http://h:1").url == "http://h:1/v1"
    assert with_url("https://h/api/v1/").url == "https://h/api/v1"
    assert named_url("a=http://h:1/v1").name == "a"
    assert (spawned("pd:--prefill 1").name, spawned("pd:--prefill 1").flags) == ("pd", "--prefill 1")
    assert spawned("--prefill 0 --decode 2").name == "--prefill 0 --decode 2"
    assert spawned("--model m --http 1.2.3.4:5").flags == "--model m --http 1.2.3.4:5"
    for wrong in ("h:1", "ftp://h", "http://", "http://h:x"):
        with pytest.raises(CommandError, match="expected a URL"):
            with_url(wrong)
    with pytest.raises(CommandError, match="NAME=URL"):
        named_url("http://h:1")
