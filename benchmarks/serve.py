"""Served, not only stepped: whole requests over HTTP, ours and vLLM's server under the same client.

    python -m benchmarks.serve --server both --device cuda --vllm-path /tmp/peer/site   # starts each in turn
    python -m benchmarks.serve --url http://127.0.0.1:8000 --model NAME                 # one that runs already
    python -m benchmarks.serve --tiny                                                   # any machine, in seconds

Cases: `serve/throughput/512x512+256`, output tokens per second of 512 requests sent at once; `serve/itl_p50/64x512+256`
and `serve/itl_p99/64x512+256`, the gap between two events of a stream while all of 64 streams decode: from the first
token of the last of them to the end of the first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import median

from twostroke_cli.bench.arrivals import Open
from twostroke_cli.bench.crew import send
from twostroke_cli.bench.job import Form, Job
from twostroke_cli.bench.lengths import Length
from twostroke_cli.bench.outcome import Outcome
from twostroke_cli.bench.prompts import Synthetic
from twostroke_cli.bench.servers import running
from twostroke_cli.bench.targets import with_url
from twostroke_cli.errors import CommandError

from benchmarks.model_folder import write_model_folder
from benchmarks.record import ROOT, Measurement, append
from benchmarks.servers import ServerOptions, Target, flags_of, our_server, vllm_server
from benchmarks.workload import LLAMA_8B, TINY, Figure, Work

RESULTS = ROOT / "benchmarks" / "results" / "serve.jsonl"
WARM_UP_REQUESTS = 16


@dataclass(frozen=True)
class Load:
    """What a server is given."""

    crowd: Work
    """All at once, for throughput."""
    streams: Work
    """Few enough to decode together, for gaps."""
    vocab_size: int
    processes: int
    repeat: int


FULL = (Work(512, 512, 256), Work(64, 512, 256))
SMALL = (Work(6, 20, 8), Work(2, 20, 128))


def streams_of(target: Target, work: Work, vocab_size: int, processes: int, seed: int) -> list[Outcome]:
    """All requests at once, their prompts token ids that the seed draws; greedy, end tokens ignored.

    Raises:
        RuntimeError: a request failed, or a stream ended early.
    """
    length, max_tokens = (Length("fixed", size, size) for size in (work.prompt_len, work.max_tokens))
    job = Job(
        url=target.url,
        form=Form(target.model, "completions", more={"temperature": 0, "ignore_eos": True}),
        prompts=Synthetic(length, max_tokens, vocab_size=vocab_size),
        arrivals=Open(None),
        num_requests=work.num_requests,
        seed=seed,
    )
    streams = send(job, processes, target.model, 0, lambda outcome: None).outcomes
    if failed := [stream for stream in streams if stream.error]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].error}: {failed[0].message}")
    if short := [stream for stream in streams if stream.num_tokens != work.max_tokens]:
        raise RuntimeError(f"{len(short)} streams had {short[0].num_tokens} tokens, not {work.max_tokens}")
    return streams


def output_rate(streams: Sequence[Outcome]) -> float:
    """Output tokens a second, from the first request sent to the last event."""
    began_s, ended_s = min(s.sent_at_s for s in streams), max(s.piece_times_s[-1] for s in streams)
    return sum(stream.num_tokens for stream in streams) / (ended_s - began_s)


def gaps_s(streams: Sequence[Outcome]) -> list[float]:
    """Gaps between events while every stream decodes, ascending; none if the streams never overlapped."""
    events_s = [stream.piece_times_s for stream in streams]
    begin_s, end_s = max(times[0] for times in events_s), min(times[-1] for times in events_s)
    gaps = [
        later - earlier
        for times in events_s
        for earlier, later in pairwise(times)
        if begin_s <= earlier and later <= end_s
    ]
    return sorted(gaps)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of an ascending list does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(target: Target, load: Load) -> Iterator[tuple[str, Figure]]:
    """Each case's median over `repeat` runs; prompts are new in each."""
    seeds = count()

    def streams(work: Work) -> list[Outcome]:
        return streams_of(target, work, load.vocab_size, load.processes, next(seeds))

    streams(Work(min(WARM_UP_REQUESTS, load.crowd.num_requests), load.crowd.prompt_len, load.streams.max_tokens // 8))
    rates = [output_rate(streams(load.crowd)) for _ in range(load.repeat)]
    yield f"serve/throughput/{_size(load.crowd)}", Figure(round(median(rates), 1), "output tokens/s")
    runs = [run for _ in range(load.repeat) if (run := gaps_s(streams(load.streams)))]
    if not runs:
        print("the streams never decoded all at once: no gaps", file=sys.stderr)
        return
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        value = 1000 * median(percentile(run, share) for run in runs)
        yield f"serve/itl_{name}/{_size(load.streams)}", Figure(round(value, 3), "ms")


def _size(work: Work) -> str:
    return f"{work.num_requests}x{work.prompt_len}+{work.max_tokens}"


class Report:
    """Prints and appends each figure, ours beside the peer's if it was measured before."""

    def __init__(self, results: Path, device: str) -> None:
        self._results = results
        self._device = device
        self._peer: dict[str, float] = {}

    def tell(self, engine: str, case: str, figure: Figure) -> None:
        """One figure of one server."""
        peer_value = None
        if engine == "vLLM":
            self._peer[case] = figure.value
        else:
            peer_value = self._peer.get(case)
        peer = "vLLM" if peer_value else None
        words = f"{case:34} {engine:9} {figure.value:10.3f} {figure.unit:15}"
        words += f"  {figure.value / peer_value:.3f} of the peer" if peer_value else ""
        print(words.rstrip(), flush=True)
        append(Measurement(case, figure.value, figure.unit, peer, peer_value, engine), self._results, self._device)


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """The peer first, so that our lines carry its figures."""
    report = Report(arguments.results, arguments.device)
    config = TINY if arguments.tiny else LLAMA_8B
    crowd, streams = SMALL if arguments.tiny else FULL
    load = Load(crowd, streams, arguments.vocab_size or config["vocab_size"], arguments.clients, arguments.repeat)
    if arguments.url:
        target = Target(with_url(arguments.url).url, arguments.model)
        for case, figure in figures(target, load):
            report.tell(arguments.name, case, figure)
        return
    options = ServerOptions(
        folder=write_model_folder(scratch / "model", config),
        device=arguments.device,
        scratch=scratch,
        gpu_memory_fraction=arguments.gpu_memory_fraction,
        max_model_len=256 if arguments.tiny else 16384,
        vllm_path=arguments.vllm_path.resolve() if arguments.vllm_path else None,
        extra=flags_of(arguments.flags),
    )
    kinds = {"vllm": ["vLLM"], "twostroke": ["twostroke"], "both": ["vLLM", "twostroke"]}[arguments.server]
    for engine in kinds:
        subject = vllm_server(options) if engine == "vLLM" else our_server(options)
        with running(subject.server, arguments.wait):
            for case, figure in figures(subject.target, load):
                report.tell(engine, case, figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="twostroke", choices=("twostroke", "vllm", "both"), help="what to start")
    parser.add_argument("--url", default="", help="start nothing: ask this server")
    parser.add_argument("--model", default="", help="with --url: the model's name there")
    parser.add_argument("--name", default="twostroke", help="with --url: whose figures these are")
    parser.add_argument("--vocab-size", type=int, default=0, help="with --url: ids of prompts stay below it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and small loads")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--repeat", type=int, default=1, help="the median of so many")
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="for a server to be ready")
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.9)
    parser.add_argument("--vllm-path", type=Path, metavar="DIR", help="folder to import vLLM from, if not installed")
    parser.add_argument("--flags", action="append", default=[], help="more flags for `twostroke up`, in one word")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen servers; a server that fails is one message and status 1."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        try:
            run(arguments, Path(name))
        except (CommandError, RuntimeError) as error:
            print(f"serve: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
