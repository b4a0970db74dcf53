"""docs/reference says what the code says, and docs/adr/README.md what lies beside it."""

from __future__ import annotations

import json
import re

import pytest
from openapi_spec_validator import validate
from twostroke_router.errors import Fault, RequestError
from twostroke_router.openai_schema import ChatRequest, CompletionRequest, decode_body, sampling_of
from twostroke_router.openapi import openapi_document
from twostroke_router.openapi_fields import FIELDS, LIMITS
from twostroke_router.sampling_check import check_choices, check_sampling
from twostroke_router.settings import RouterSettings

from docs.generate import FOLDER, references
from tests.support.documents import ROOT

GENERATED = references()
DOCUMENT = openapi_document()
BODIES = ("ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest", "Message", "StreamOptions")

FRACTIONS = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}


@pytest.mark.parametrize("name", GENERATED)
def test_the_committed_file_is_the_generated_one(name: str) -> None:
    assert (FOLDER / name).read_text() == GENERATED[name], "run `make docs`"


def test_nothing_else_lies_there() -> None:
    found = {f"reference/{path.name}" for path in (FOLDER / "reference").iterdir()}
    assert found == {name for name in GENERATED if name.startswith("reference/")}


def test_the_references_say_something() -> None:
    assert "`--max-live` | `TWOSTROKE_MAX_LIVE` | `1024` |" in GENERATED["reference/settings.md"]
    assert f"`{RouterSettings.model_fields['http'].default}`" in GENERATED["reference/settings.md"]
    assert "## `twostroke up`" in GENERATED["reference/cli.md"]
    assert re.search(
        r"`twostroke_requests_total` \| counter \| `endpoint`, `outcome`", GENERATED["reference/metrics.md"]
    )


def test_every_decision_is_listed() -> None:
    files = sorted(path.name for path in (FOLDER / "adr").glob("[0-9]*.md"))
    assert len(files) >= 15
    assert re.findall(r"^- \[\d{4}\]\((\S+)\): \w", GENERATED["adr/README.md"], re.MULTILINE) == files


def test_openapi_is_valid() -> None:
    validate(DOCUMENT)
    json.dumps(DOCUMENT)


def test_every_field_of_a_request_is_explained() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    bare = {
        f"{kind}.{name}"
        for kind in BODIES
        for name, field in schemas[kind]["properties"].items()
        if not field.get("description")
    }
    assert bare == set()
    used = {name for schema in schemas.values() for name in schema.get("properties", ())}
    assert set(FIELDS) - used == set()


def test_every_route_is_documented() -> None:
    """Static files of the live page are no part of the API."""
    folder = ROOT / "services" / "router" / "twostroke_router"
    sources = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    routes = {re.sub(r":\w+}", "}", path) for path in re.findall(r'Route\(\s*"(/[^"]*)"', sources)}
    assert len(routes) >= 10
    assert routes - set(DOCUMENT["paths"]) == set()


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def test_every_error_is_in_the_table() -> None:
    rows = [line for line in (FOLDER / "api.md").read_text().splitlines() if re.match(r"\| \d{3} ", line)]
    for fault in Fault:
        status, code, grpc_status = str(fault.http_status), fault.openai_code or "", fault.grpc_status.name
        assert [row for row in rows if row.startswith(f"| {status} ") and code in row and grpc_status in row], fault


def refuses(name: str, value: float) -> bool:
    """Whether the router refuses a number of a field, and by its name."""
    body = {"prompt": "a", "logprobs": 0, name: value}
    kind: type[CompletionRequest | ChatRequest] = CompletionRequest
    if name == "top_logprobs":
        kind, body = ChatRequest, {"messages": [{"role": "user", "content": "a"}], "logprobs": True, name: value}
    try:
        parsed = decode_body(json.dumps(body).encode(), kind)
        parsed.check()
        check_choices(parsed.choices())
        check_sampling(sampling_of(parsed, parsed.wanted_logprobs(), 1, parsed.seed or 0), 1000)
    except RequestError as error:
        return error.param == name
    return False


@pytest.mark.parametrize("name", LIMITS)
def test_ranges_are_those_of_the_router(name: str) -> None:
    whole = name not in FRACTIONS
    for word, bound in LIMITS[name].items():
        outwards = (1 if whole else 1e-3) * (-1 if "inimum" in word else 1)
        is_in = not word.startswith("exclusive")
        assert refuses(name, bound) is not is_in, (word, bound)
        assert refuses(name, bound + outwards), (word, bound)
        assert not refuses(name, bound - outwards), (word, bound)
