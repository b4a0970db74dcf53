"""Any order of chunks, messages, cancels, losses and corrupted bytes: nothing wrong is adopted, nothing is left."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.messages import (
    FirstToken,
)

from tests.support.transfer_ends import (
    SPEC,
    FlippingScheme,
    Link,
    Prompt,
    Receiving,
    Sending,
    begin,
    make_request,
)

ACTIONS = st.sampled_from(
    ["chunk", "chunk", "chunk", "carry", "carry", "carry", "cancel_send", "cancel_receive", "lose"]
)


@st.composite
def lives(draw: st.DrawFn) -> dict[str, object]:
    num_requests = draw(st.integers(1, 3))
    whose = st.integers(0, num_requests - 1)
    return {
        "prompts": [
            (draw(st.integers(0, 2)), draw(st.integers(1, 90)), draw(st.integers(0, 3))) for _ in range(num_requests)
        ],
        "held": draw(st.integers(0, 4)),
        "layers": draw(st.integers(1, 3)),
        "bad": draw(st.sets(st.integers(0, 12), max_size=2)),  # a third could be one segment's last try
        "finished": draw(st.booleans()),
        "direct": draw(st.booleans()),
        "actions": draw(st.lists(st.tuples(ACTIONS, whose, st.integers(1, 50)), max_size=25)),
    }


@given(lives())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_nothing_wrong_is_adopted_and_nothing_is_left(life: dict[str, object]) -> None:
    scheme = LoopbackScheme(5.0)
    bad: set[int] = life["bad"]  # type: ignore[assignment]
    sending = Sending(scheme, layers_per_segment=life["layers"])
    link = Link(sending, Receiving(FlippingScheme(scheme, bad.__contains__)))
    if life["direct"]:
        link.direct()
    prompts: list[Prompt] = []
    for number, (family, num_tokens, hits) in enumerate(life["prompts"]):  # type: ignore[arg-type, var-annotated]
        request = make_request(str(number), range(family * 1000, family * 1000 + num_tokens))
        link.receiving.hold(request.token_ids, life["held"])  # type: ignore[arg-type]
        prompts.append(begin(link, request, min(hits, (num_tokens - 1) // SPEC.block_size)))
    try:
        is_disturbed = run_life(link, prompts, life["actions"], bool(life["finished"]))  # type: ignore[arg-type]
        for prompt in prompts:
            drive_to_end(prompt, bool(life["finished"]))
        link.until(lambda: sending.sender.num_open == 0)
        # What was never opened, or was lost before, is the router's to cancel.
        for number in range(len(prompts)):
            link.receiving.receiver.cancel(str(number))
        link.settle()
    finally:
        link.close()
    if not is_disturbed and not life["finished"]:
        assert len(link.receiving.host.adopted) == len(prompts)
    assert len(sending.host.outcomes) == len(prompts)


def run_life(link: Link, prompts: list[Prompt], actions: list[tuple[str, int, int]], finished: bool) -> bool:
    is_disturbed = False
    for action, number, amount in actions:
        prompt = prompts[number]
        match action:
            case "chunk":
                if prompt.num_left:
                    prompt.chunk(amount)
            case "carry":
                link.carry()
            case "cancel_send":
                link.sending.sender.cancel(prompt.request.id)
            case "cancel_receive":
                link.receiving.receiver.cancel(prompt.request.id)
            case "lose":
                link.lose(f"stream-{amount}-{number}")
        is_disturbed |= action not in ("chunk", "carry")
    return is_disturbed


def drive_to_end(prompt: Prompt, finished: bool) -> None:
    while prompt.num_left:
        prompt.chunk(1000)
    prompt.finish((FirstToken(0, 5, finished),))
