"""YAML as people write it: nothing given twice is dropped, and what cannot be read is told in one line."""

from importlib import resources
from pathlib import Path

import pytest
import yaml

from tests.config.refusal import file_of, refusal
from tla_service.config.loading import load_settings, preset_names
from tla_service.config.yaml_files import parse_yaml
from tla_service.errors import ConfigError

TWICE = [
    ("attack: {epsilon: 4/255}\nattack: {num_steps: 20}\n", "attack is given twice, in lines 1 and 2"),
    (
        "attack:\n  epsilon: 4/255\n  num_steps: 3\n  epsilon: 8/255\n",
        "attack.epsilon is given twice, in lines 2 and 4",
    ),
    ("seed: 1\nseed: 2\n\nseed: 3\n", "seed is given 3 times, in lines 1, 2 and 4"),
    ("attack: {epsilon: 0.1, epsilon: 0.2}\n", "attack.epsilon is given twice, in line 1"),
    ('seed: 1\n"seed": 2\n', "seed is given twice, in lines 1 and 2"),
    (
        "evaluation:\n  test:\n    a: {kind: pgd}\n    a: {kind: cw}\n",
        "evaluation.test.a is given twice, in lines 3 and 4",
    ),
    (
        "sweep:\n  space:\n    loss.margin: [0.1]\n    loss.margin: [0.2]\n",
        "sweep.space.loss.margin is given twice, in lines 3 and 4",
    ),
    ("a:\n- {b: 1}\n- {c: 1, c: 2}\n", "a[1].c is given twice, in line 3"),
    ("a: &x {p: 1}\nb: {<<: *x, <<: *x}\n", "b.<< is given twice, in line 2"),
    ("a: &x\n  p: 1\n  p: 2\nb: *x\n", "a.p is given twice, in lines 2 and 3"),
]


@pytest.mark.parametrize(("text", "reason"), TWICE, ids=[row[1] for row in TWICE])
def test_what_is_given_twice_is_refused_with_its_lines(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "config", "run.yaml")
    assert str(caught.value) == f"config=run.yaml: {reason}; keep one of them"


def test_a_file_with_a_section_given_twice_is_refused(tmp_path: Path) -> None:
    arguments = file_of(tmp_path, "attack: {epsilon: 4/255, step_size: 1/255}\nattack: {num_steps: 20}\n")
    assert str(refusal(arguments)).startswith(f"config={arguments[1]}: attack is given twice, in lines 1 and 2; ")


def test_merge_keys_and_anchors_work_as_usual(tmp_path: Path) -> None:
    text = (
        "attack: &attack {epsilon: 4/255, step_size: 1/255, num_steps: 3}\n"
        "evaluation:\n"
        "  validation: {<<: {epsilon: 4/255, step_size: 1/255}, num_steps: 5}\n"
        "  test:\n"
        "    weak: &weak {epsilon: 2/255, step_size: 1/255}\n"
        "    strong: {<<: *weak, epsilon: 6/255}\n"
        "    both: {<<: [*weak, {num_steps: 9}]}\n"
    )
    found = load_settings(file_of(tmp_path, text)).evaluation
    assert (found.validation.epsilon, found.validation.num_steps) == (4 / 255, 5)
    strong = found.test["strong"]
    assert (strong.epsilon, strong.step_size) == (6 / 255, 1 / 255)
    assert (found.test["both"].epsilon, found.test["both"].num_steps) == (2 / 255, 9)


def test_an_anchor_inside_itself_ends() -> None:
    assert list(parse_yaml("a: &a [1, *a]", "config", "x")) == ["a"]


@pytest.mark.parametrize(
    ("text", "seed"), [("010", 10), ("0x10", 16), ("1_000", 1000), ("1.0", 1), ("+3", 3), ("'7'", 7), ("00", 0)]
)
def test_whole_numbers_mean_what_they_mean_on_the_command_line(tmp_path: Path, text: str, seed: int) -> None:
    """As in YAML 1.2; YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    assert load_settings(file_of(tmp_path, f"seed: {text}")).seed == seed
    with pytest.raises(ConfigError, match="seed=1:30: "):
        load_settings(file_of(tmp_path, "seed: 1:30"))


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "1e-03", "'1e-3'", "1/1000"])
def test_numbers_with_exponents(tmp_path: Path, text: str) -> None:
    found = load_settings(file_of(tmp_path, f"attack: {{step_size: {text}}}"))
    assert found.attack.step_size == pytest.approx(0.001)


def test_what_is_written_in_other_ways_is_read_as_by_yaml() -> None:
    text = "a: 1.5\nb: -.inf\nc: yes\nd: ~\ne: [1, 0b11]\nf: 2020-01-01\ng: '010'\nh: 1.5e+3\ni: -0\n"
    assert parse_yaml(text, "config", "x") == yaml.safe_load(text)


def test_presets_and_studies_are_read_by_it_too() -> None:
    home = resources.files("tla_service.config") / "presets"
    for name in [*preset_names(), *(f"sweeps/{study}" for study in preset_names("study"))]:
        text = (home / f"{name}.yaml").read_text()
        assert parse_yaml(text, "preset", name) == yaml.safe_load(text)


UNREADABLE = [
    (b"# r\xe9glages\nseed: 3\n", "not a UTF-8 text file (byte 0xE9 in line 1)", "save it as UTF-8"),
    (b"seed: 3\n# \xff\n", "byte 0xFF in line 2", "save it as UTF-8"),
    ("seed: 3\n".encode("utf-16"), "not a UTF-8 text file", "save it as UTF-8"),
    (b"attack:\n\tepsilon: 8/255\n", "a tab in line 2", "indent with spaces"),
    (b"seed: 1\n---\nseed: 2\n", "contains a second document from line 2 on", "one document per file"),
    (b"attack: {epsilon: 1\nseed: 3\n", "in line 2, column", "correct the file"),
]


@pytest.mark.parametrize(("content", "reason", "remedy"), UNREADABLE, ids=[row[1] for row in UNREADABLE])
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, content: bytes, reason: str, remedy: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    error = refusal(["--config", str(tmp_path / "run.yaml")])
    assert reason in error.reason
    assert remedy in error.remedy
    assert "\n" not in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path: Path, start: bytes, end: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(start + b"attack: {epsilon: 4/255}" + (end or b"\n") + b"seed: 3" + end)
    found = load_settings(["--config", str(tmp_path / "run.yaml")])
    assert (found.seed, found.attack.epsilon) == (3, 4 / 255)


def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)), "seed: *a59", ""]
    error = refusal(file_of(tmp_path, "\n".join(lines)))
    assert str(error).endswith(
        "stands for more than 1000000 values; give a file of settings, without aliases of aliases"
    )


def test_a_file_without_end_is_refused() -> None:
    error = refusal(["--config", "/dev/zero"])
    assert str(error) == "config=/dev/zero: is larger than 10000000 bytes; give a file of settings"


def test_a_file_that_names_another_is_refused(tmp_path: Path) -> None:
    error = refusal(file_of(tmp_path, "config: base.yaml\n"))
    assert (error.subject, error.reason) == ("config", "names another file (base.yaml), which is not read")
