"""Errors name what is wrong and cross process boundaries unharmed."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest

from tla_service import errors
from tla_service.errors import ConfigError, UnavailableError, UserError, one_line, readable, without_credentials

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_all_kinds_are_found() -> None:
    assert {UserError, ConfigError, UnavailableError} <= set(KINDS)
    assert all(issubclass(kind, UserError) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [8, None, "8/255", Path("somewhere"), [1, 2], 0.5, ""])
def test_survives_pickling(kind: type[UserError], value: object) -> None:
    error = kind("attack.epsilon", value, "outside [0, 1]", "write 8/255")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert (found.subject, found.value, found.reason, found.remedy) == (
        "attack.epsilon",
        value,
        "outside [0, 1]",
        "write 8/255",
    )
    assert str(found) == str(error)
    assert found.exit_code == error.exit_code


@pytest.mark.parametrize("kind", KINDS)
def test_survives_copying_and_notes(kind: type[UserError]) -> None:
    error = kind("path", "x", "is missing", "make it")
    error.add_note("on worker 3")
    for found in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert str(found) == "path=x: is missing; make it"
        assert found.__notes__ == ["on worker 3"]


def test_group_of_errors_survives_pickling() -> None:
    group = ExceptionGroup("wrong", [ConfigError("a", 1, "b", "c"), UnavailableError("d", None, "e", "f")])
    found = pickle.loads(pickle.dumps(group))
    assert [str(error) for error in found.exceptions] == ["a=1: b; c", "d: e; f"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(8, "x=8: r; m"), (None, "x: r; m"), (0, "x=0: r; m"), (False, "x=False: r; m"), ("", "x=: r; m")],
)
def test_message_shows_the_value_where_there_is_one(value: object, expected: str) -> None:
    assert str(ConfigError("x", value, "r", "m")) == expected


def test_exit_codes_tell_the_kinds_apart() -> None:
    assert (UserError.exit_code, ConfigError.exit_code, UnavailableError.exit_code) == (1, 2, 3)


CREDENTIALS = [
    ("http://me:hunter2@host:5000/x", "http://host:5000/x"),
    ("http://hunter2@host", "http://host"),
    ("http://me:hun@ter2@host", "http://host"),
    ("postgresql+psycopg2://me:hunter2@host/db", "postgresql+psycopg2://host/db"),
    ("postgresql://host/db?user=me&password=hunter2&x=1", "postgresql://host/db?user=me&password=&x=1"),
    ("--uri=http://me:hunter2@a, http://me:hunter2@b", "--uri=http://a, http://b"),
    ("http://host/a@b?c=d@e", "http://host/a@b?c=d@e"),
    ("models:/tla-digits@champion", "models:/tla-digits@champion"),
    ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ("s3://bucket/a@b", "s3://bucket/a@b"),
]


@pytest.mark.parametrize(("text", "expected"), CREDENTIALS)
def test_credentials_are_removed_from_urls(text: str, expected: str) -> None:
    assert without_credentials(text) == expected
    for error in (
        ConfigError("tracking.uri", text, "r", "m"),
        ConfigError("x", 1, text, "m"),
        ConfigError("x", 1, "r", text),
    ):
        assert expected in str(pickle.loads(pickle.dumps(error)))
        assert "hunter2" not in repr(error)


def test_credentials_are_removed_before_a_text_is_cut() -> None:
    assert one_line(RuntimeError("http://me:hunter2@host failed\nagain"), 18) == "http://host fai..."


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    text = str(ConfigError("a\x1b[31m", "x\ny" + "z" * 10_000, "\u202ebad\r", "e" * 10_000))
    assert text.isprintable()
    assert text.startswith("a\\x1b[31m=x y")
    assert len(text) < 1200
    assert "(10003 characters)" in text


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"^file=x: cannot be read \(KeyError: 'a'\); fetch it again$"):
        with readable("file", "x", "fetch it again"):
            raise KeyError("a")
    with pytest.raises(ConfigError, match=r"^own=1: bad"), readable("file", "x", "fetch it again"):
        raise ConfigError("own", 1, "bad", "mend it")
