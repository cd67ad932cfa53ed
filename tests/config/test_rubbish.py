"""Rubbish from every side: a configuration loads, or is refused with ConfigErrors; nothing else comes out."""

import contextlib
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.refusal import file_of, refusals
from tla_service.config import RunConfig
from tla_service.config.loading import RunSettings

NAMES = st.sampled_from(
    [*RunSettings.model_fields, "epsilon", "name", "kind", "test", "validation", "milestones", "tags"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.binary(max_size=5)
    | st.text(max_size=8)
    | st.sampled_from(["8/255", "1/0", "auto", "digits", "tla", "None", "function-", "lax"])
)
RUBBISH = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(st.none() | st.integers() | st.text(max_size=5) | NAMES, inner, max_size=3)
    ),
    max_leaves=12,
)


def assert_loads_or_refuses(arguments: list[str]) -> None:
    for error in refusals(arguments):
        assert error.exit_code == 2


@settings(max_examples=80)
@given(RUBBISH | st.dictionaries(st.sampled_from(list(RunConfig.model_fields)), RUBBISH))
def test_any_yaml_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert_loads_or_refuses(file_of(folder, yaml.safe_dump(content)))


@settings(max_examples=60)
@given(st.binary(max_size=30) | st.text("{}[]:,-&*!|>?%@'\"\n #~<=0x1_.seda", max_size=30).map(str.encode))
def test_any_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    assert_loads_or_refuses(["--config", str(path)])


WORDS = st.sampled_from(
    [
        "--attack",
        "--attack.epsilon",
        "--seed",
        "--evaluation.test",
        "--schedule.milestones",
        "--tracking.tags",
        "--data.flip",
        "--no-data.flip",
        "--scaling.num_workers",
        "--preset",
        "--config",
        "--",
        "-",
        "--debug",
        "--x",
        "digits",
        "8/255",
        "{}",
        "[1,2]",
        '{"a": {"kind": "pgd"}}',
        "{",
        "a=b",
        "auto",
        "None",
    ]
) | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=80)
@given(st.lists(WORDS, max_size=5) | st.tuples(WORDS, WORDS).map(lambda pair: ["=".join(pair)]))
def test_any_command_line_loads_or_is_refused(arguments: list[str]) -> None:
    with (
        contextlib.suppress(SystemExit)
        if any(word.startswith("-h") for word in arguments)
        else contextlib.nullcontext()
    ):
        assert_loads_or_refuses(arguments)
