"""API keys: the file, the header, the metadata, and that nothing shows a key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from twostroke_chassis.lifecycle import StartError
from twostroke_chassis.security import ANONYMOUS, ApiKeys

FILE = """
# the first one is the team's
team-a: s3cret-a
  plain-key  
team.b:with:colon
"""


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(FILE)
    return ApiKeys.load(path)


@pytest.mark.parametrize(
    ("authorization", "caller"),
    [
        ("Bearer s3cret-a", "team-a"),
        ("bearer   s3cret-a ", "team-a"),
        ("Bearer plain-key", "key-4"),
        ("Bearer with:colon", "team.b"),
        ("Bearer s3cret-b", None),
        ("Bearer s3cret", None),
        ("Bearer ", None),
        ("Bearer", None),
        ("Basic s3cret-a", None),
        ("s3cret-a", None),
        ("Bearer team-a", None),
        ("Bearer pl\u00e4in-\udcff", None),
        ("", None),
        (None, None),
    ],
)
def test_who_calls(keys: ApiKeys, authorization: str | None, caller: str | None) -> None:
    assert keys.is_required
    assert keys.caller(authorization) == caller


def test_grpc_metadata(keys: ApiKeys) -> None:
    assert keys.caller_of_call([("user-agent", "x"), ("authorization", "Bearer s3cret-a")]) == "team-a"
    assert keys.caller_of_call([("authorization", b"Bearer plain-key")]) == "key-4"
    assert keys.caller_of_call([("user-agent", "x")]) is None
    assert keys.caller_of_call(None) is None


def test_without_a_file_the_door_is_open() -> None:
    keys = ApiKeys.load(None)
    assert not keys.is_required
    assert keys.caller(None) == keys.caller("Bearer x") == keys.caller_of_call(()) == ANONYMOUS


def test_keys_are_never_shown(keys: ApiKeys, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        keys.caller("Bearer s3cret-a")
        logging.getLogger("test").info("%s %r", keys, keys)
    assert "s3cret" not in caplog.text + repr(vars(keys))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "holds no key"),
        (b"a:SECRET\nb:SECRET\n", "line 2 repeats an earlier key"),
        (b"ok\na b:SECRET\n", "line 2 is not KEY or NAME:KEY"),
        (b"two SECRET words\n", "line 1 is not KEY or NAME:KEY"),
        (b"name:\n", "line 1 is not KEY or NAME:KEY"),
        ("sch\u00fcssel-SECRET\n".encode(), "line 1 is not KEY or NAME:KEY"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(StartError) as refused:
        ApiKeys.load(path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--api-keys-file {path}: ")
    assert "SECRET" not in str(refused.value)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"--keys .*: No such file or directory"):
        ApiKeys.load(tmp_path / "none", "--keys")
