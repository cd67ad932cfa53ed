"""Bad configurations from every source: each is refused with one message, by the job that would use it."""

import importlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.fuzz.harness import Accepted, Faults, chunks, environment, random_of, run_case
from tests.fuzz.own_code import own_code
from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.config import RunConfig
from tla_service.config.loading import RunSettings
from tla_service.registry.job_settings import ExportSettings, ImportSettings, LeaderboardSettings, PromoteSettings
from tla_service.report.settings import EvaluateSettings
from tla_service.tuning.settings import TuneSettings
from tla_service.workflows.run import check_before_start

COUNT = 2000
JOBS: dict[str, tuple[Any, list[str]]] = {
    "train_tla": (RunSettings, ["--preset", "digits"]),
    "tune_tla": (TuneSettings, ["--preset", "digits"]),
    "evaluate_tla": (EvaluateSettings, ["--model", "x"]),
    "promote_model": (PromoteSettings, ["--model", "x", "--version", "1"]),
    "export_model": (ExportSettings, ["--model", "x"]),
    "import_model": (ImportSettings, ["--file", "x"]),
    "leaderboard": (LeaderboardSettings, []),
    "doctor": (CheckupSettings, []),
}
# What no number is, in a file or on a command line.
NO_NUMBERS = [
    "abc", "", " ", "8//255", "1/0", "1/2/3", "nan/1", "nan", "inf", "-inf", "1e999", "0x1f", "1,5", "--", "true",
    "\x1b[31m1", "5\n6", "\uff11e", "9" * 5000 + "x", "∞", "٣/٤", "1/" + "9" * 400, "None1", "{", "[1", "\u202e7",
]  # fmt: skip
NO_WHOLE = [*NO_NUMBERS, "1.5", "1e3", "1/2"]
NO_WORDS = [
    "",
    "x" * 100_000,
    "tla\n",
    "\x00x",
    "\x1b[2J",
    "DIGITS ",
    "t\u200bla",
    "../../etc/passwd",
    "'",
    "🦙",
    "a;b",
]
NESTED = {"a": {"b": [{"c": None}]}}


class Case(NamedTuple):
    """What a job is given."""

    job: str
    arguments: list[str]
    files: dict[str, str | bytes]
    variables: dict[str, str]


class Leaf(NamedTuple):
    """A setting: its path, and the JSON schemas that its value may fit."""

    path: tuple[str, ...]
    schemas: list[dict[str, Any]]

    @property
    def types(self) -> set[str]:
        return {found.get("type", "any") for found in self.schemas}


def leaves(schema: dict[str, Any], node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """All settings below a node of a JSON schema, and its sections."""
    reference = node.get("$ref") or (node.get("allOf") or [{}])[0].get("$ref")
    if reference:
        yield from leaves(schema, schema["$defs"][reference.rpartition("/")[2]], path)
        return
    if "properties" in node:
        if path:
            yield Leaf(path, [{"type": "section"}])
        for name, field in node["properties"].items():
            yield from leaves(schema, field, (*path, name))
        return
    if path == ("evaluation", "test"):
        yield from leaves(schema, node["additionalProperties"], (*path, "own"))
    yield Leaf(path, node.get("anyOf", [node]))


def settings_of(job: str) -> list[Leaf]:
    schema = JOBS[job][0].model_json_schema()
    given = {word.removeprefix("--") for word in JOBS[job][1]}  # on the command line, which goes before other sources
    return [leaf for leaf in leaves(schema, schema) if leaf.path[0] not in given and bad_values(leaf)]


def bad_values(leaf: Leaf) -> list[Any]:  # noqa: C901 - one rule per type
    """Values that a setting must not have: of another type, beyond its bounds, not among its choices."""
    kinds, found = leaf.types, [NESTED, [[1]]]
    if kinds == {"section"}:
        return [7, "text", [1, 2], True]
    if "any" in kinds or "array" in kinds or (leaf.path[0] == "sweep" and leaf.path[1] == "space"):
        return [NESTED] if "array" in kinds else []
    if "object" in kinds:
        return [7, "text", [1]]
    numbers = kinds & {"number", "integer"}
    if numbers and not any(schema.get("type") == "string" and not limited(schema) for schema in leaf.schemas):
        found += NO_NUMBERS if "number" in kinds else NO_WHOLE
        if "boolean" in kinds:
            found = [value for value in found if value != "true"]
    if numbers:
        found += [float("nan"), float("inf"), -float("inf"), *([] if "boolean" in kinds else [True])]
        schema = next(schema for schema in leaf.schemas if schema.get("type") in numbers)
        for key, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
            if key in schema:
                found += [schema[key] + step, (schema[key] + step) + (10**30 if "max" in key.lower() else -(10**30))]
        found += [0.5] if numbers == {"integer"} else []
    elif kinds <= {"boolean", "null"}:
        found += ["maybe", "2", "", "truth", 7.5, "nan", "x" * 5000]
    elif all(map(limited, leaf.schemas)):
        found += [word for word in NO_WORDS if word or not accepts_empty(leaf)] + [7, 1.5, True]
    else:
        found += [7, 2.5, True]  # free text: numbers of a file are refused
    return found if "null" in kinds else [*found, None]


def limited(schema: dict[str, Any]) -> bool:
    """Whether a schema allows some words only, or none."""
    return schema.get("type") != "string" or bool({"enum", "const"} & schema.keys())


def accepts_empty(leaf: Leaf) -> bool:
    return any("" in schema.get("enum", []) for schema in leaf.schemas)


def value_case(rng: random.Random) -> Case:
    """A setting with a value that it cannot have, from one of the sources."""
    job = rng.choice(["train_tla", "train_tla", "tune_tla", *JOBS])
    leaf = rng.choice(settings_of(job))
    value = rng.choice(bad_values(leaf))
    channel = rng.choice(["yaml", "flag", "env"])
    name = ".".join(leaf.path)
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=True).replace("Infinity", "inf")
    # Text of a command line has no types, and no byte 0; lists and words are fine for free text.
    typed = not isinstance(value, str) and (value is None or leaf.types & {"string", "any", "array", "object"})
    if channel == "yaml" or typed or "\0" in text or leaf.types == {"section"}:
        return Case(job, ["--config", "a.yaml"], {"a.yaml": yaml.safe_dump(nested(leaf.path, value))}, {})
    if channel == "flag":
        return Case(job, [f"--{name}={text}"], {}, {})
    return Case(job, [], {}, {f"TLA_{'__'.join(leaf.path)}".upper(): text})


def nested(path: tuple[str, ...], value: Any) -> Any:
    return {path[0]: nested(path[1:], value)} if path else value


def name_case(rng: random.Random) -> Case:
    """A setting that does not exist."""
    job = rng.choice([*JOBS])
    leaf = rng.choice(settings_of(job))
    *above, last = leaf.path
    wrong = rng.choice([f"{last}x", last.upper() + "_", f"{last[:-1]}é", f"{last}.{last}", "\x1b]0;x\a", "x" * 10_000])
    path = (*above, wrong)
    if rng.random() < 0.5 and wrong.isprintable():
        return Case(job, [f"--{'.'.join(path)}", "1"], {}, {})
    return Case(job, ["--config", "a.yaml"], {"a.yaml": yaml.safe_dump(nested(path, 1))}, {})


def deep(rng: random.Random) -> str:
    return rng.choice("[{") * rng.choice([500, 5000, 100_000])


def laughs(rng: random.Random, key: str) -> str:
    """A few lines that stand for 10^20 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]" for number in range(1, 20)]
    return "\n".join([*lines, f"{key}: *a19", ""])


FILES: list[str | bytes | Callable[[random.Random], str]] = [
    "seed: 1\nseed: 2\n",
    "loss:\n  margin: 0.1\n  margin: 0.2\n",
    "loss: {margin: 0.1}\nloss: {margin: 0.1}\n",
    "loss:\n\tmargin: 0.1\n",
    "a: &a [*a]\n",
    "loss: &l {margin: *l}\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "seed: !!int abc\n",
    "seed: 1\n---\nseed: 2\n",
    "- seed\n",
    "just text",
    b"seed: \xff\xfe\n",
    "seed: 1\n".encode("utf-16"),
    b"\x00" * 100,
    lambda rng: rng.randbytes(rng.randrange(1, 200)) + b"\xff",
    deep,
    lambda rng: "seed: " + deep(rng),
    lambda rng: laughs(rng, rng.choice(["seed", "loss", "tracking", "name", "x"])),
    "? {a: b}\n: 1\n",
    "1: 2\n",
    "seed: 2020-99-99\n",
    "loss.margin: 0.1\n",
    "seed: |\n  1\n  2\n",
    "x: " + "y" * 2_000_000,
]


def file_case(rng: random.Random) -> Case:
    """A file that is no configuration."""
    number = rng.randrange(len(FILES) + 4)
    job = rng.choice([*JOBS])
    if number < len(FILES):
        content = FILES[number]
        return Case(job, ["--config", "a.yaml"], {"a.yaml": content(rng) if callable(content) else content}, {})
    path = rng.choice(
        ["no/such.yaml", ".", "/dev/zero", "x" * 5000, "a\nb.yaml", "~nobody/x", "/proc/self/mem", "loop"]
    )
    return Case(job, ["--config", path], {}, {})


WORDS: list[list[str]] = [
    ["--nonsense"], ["--loss.margn", "0.1"], ["--seed"], ["stray"], ["--seed", "1", "2"], ["--", "x"], ["-z"],
    ["--loss", '{"margin": 0.1, "margin": 0.2}'], ["--loss", "{margin"], ["--loss", "[1]"], ["--loss", "null7"],
    ["--tracking.tags", '{"a%": "b"}'], ["--tracking.tags", '{"tla.x": "b"}'], ["--tracking.tags", '{"a": 1'],
    ["--tracking.tags", json.dumps({"a": "x" * 9000})], ["--tracking.tags", json.dumps({"x" * 300: "y"})],
    ["--tracking.experiment", ""], ["--tracking.experiment", "\n"], ["--tracking.experiment", "x" * 300],
    ["--tracking.registered_model", "a/b"], ["--tracking.registered_model", "m-1"],
    ["--tracking.registered_model", "a\nb"], ["--tracking.registered_model", ".."],
    ["--evaluation.test", '{"a b%": {}}'], ["--evaluation.test", '{"worst": {}}'], ["--evaluation.test", "[1]"],
    ["--evaluation.test", '{"../x": {}}'], ["--evaluation.test", '{"a": {"kind": "lbfgs"}}'],
    ["--evaluation.test", '{"a": {"epsilon": 2}}'], ["--evaluation.test", '{"a": {"norm": "l2", "epsilon": 1e9}}'],
    ["--name", "a/b"], ["--name", "../x"], ["--name", ".hidden"], ["--name", "a\nb"], ["--name", "x" * 241],
    ["--name", "a\x00b"], ["--preset", "digit"], ["--preset", "../digits"], ["--preset", ""], ["--preset", "x" * 9999],
    ["--loss.extra", '{"os:system": "x"}'], ["--loss.extra", '{"nonsense": 1}'], ["--mining.miner", "x"],
    ["--attack.kind", "a:b:c"], ["--attack.kind", "1a:b"], ["--attack.kind", ":"], ["--attack.epsilon", "8"],
    ["--attack.step_size", "0.9", "--attack.epsilon", "0.1"], ["--attack.norm", "l2"], ["--attack.norm", "linf2"],
    ["--attack.norm", "l2", "--attack.epsilon", "99", "--attack.step_size", "9"],
    ["--attack.on_collapse", "pgd", "--attack.num_steps", "1"], ["--attack.awp", "--attack.kind", "free"],
    ["--method", "natural", "--attack.awp"], ["--method", "at", "--loss.robust_term", "mart",
    "--loss.clean_weight", "1"],
    ["--method", "trades", "--loss.clean_weight", "0.5"], ["--method", "at", "--loss.robust_weight", "3"],
    ["--schedule.name", "piecewise", "--schedule.milestones", "3,2"], ["--schedule.milestones", "[1"],
    ["--schedule.name", "piecewise", "--schedule.milestones", "[]"],
    ["--training.global_batch_size", "2", "--scaling.num_workers", "8"], ["--scaling.num_workers", "0"],
    ["--scaling.num_workers", "-3"], ["--data.name", "cifar10"], ["--model.head", "new"],
    ["--optimizer.body_rate", "0.1"], ["--training.freeze_batchnorm"], ["--model.code", "x"],
    ["--mining.pool", "separate", "--mining.pool_size", "10", "--mining.scope", "global", "--scaling.num_workers", "4"],
    ["--loss.triplet_weight", "0"], ["--seed", "2147483648"], ["--seed", "9" * 4400], ["--seed", "-1"],
]  # fmt: skip


def word_case(rng: random.Random) -> Case:
    """A command line that is wrong as a whole, or an environment variable that is."""
    if rng.random() < 0.25:
        name = rng.choice(["TLA_NONSENSE", "TLA_LOSS_MARGIN", "TLA_LOSS__", "TLA__", "TLA_LOSS__MARGN"])
        value = rng.choice(["1", "", "{", "x" * 100_000, "\x1b[31m"])
        return Case(rng.choice(["train_tla", "tune_tla"]), [], {}, {name: value})
    return Case(rng.choice(["train_tla", "tune_tla"]), rng.choice(WORDS), {}, {})


FIELDS = ["loss.margin", "loss.triplet_weight", "optimizer.learning_rate", "attack.epsilon", "training.epochs"]
SPACES: list[Any] = [
    lambda field: {f"{field}x": [1, 2]},
    {"": [1]},
    {"loss": [1]},
    {"..": [1]},
    {"data.root": ["/a", "/b"]},
    {"scaling.num_workers": [1, 2]},
    lambda field: {field: []},
    lambda field: {field: [1, 1]},
    lambda field: {field: ["abc"]},
    lambda field: {field: [None]},
    lambda field: {field: [float("nan")]},
    lambda field: {field: [-1]},
    lambda field: {field: [True]},
    lambda field: {field: [[1]]},
    lambda field: {field: {}},
    lambda field: {field: {"low": 0.1}},
    lambda field: {field: {"low": 0.2, "high": 0.1}},
    lambda field: {field: {"low": 0.1, "high": 0.1}},
    lambda field: {field: {"low": 0, "high": 0.1, "log": True}},
    lambda field: {field: {"low": "a", "high": 1}},
    lambda field: {field: {"low": float("nan"), "high": 1}},
    lambda field: {field: {"low": -1e308, "high": 1e308}},
    lambda field: {field: {"low": -5, "high": -1}},
    lambda field: {field: {"low": 0.1, "high": 0.2, "values": [1]}},
    lambda field: {field: {"hgih": 1}},
    lambda field: {field: 7},
    lambda field: {field: "a"},
    {"v": {"variants": {}}},
    lambda field: {"v": {"variants": {"a": {f"{field}x": 1}}}},
    lambda field: {"v": {"variants": {"a": {field: "abc"}}}},
    {"v": {"variants": {"a": 1}}},
    lambda field: {field: [0.1], "v": {"variants": {"a": {field: 0.2}}}},
    {"attack.norm": ["l2", "linf"]},
    {"method": ["tla", "nonsense"]},
    {"seed": {"low": 0, "high": 1e300}},
    lambda field: {f"{field}\x1b[31m\n": [1]},
    {"x" * 50_000: [1]},
    lambda field: [field],
    lambda field: field,
    None,
]
CONSTRAINTS = [
    "loss.margin", "loss.margin >", "loss.margn > 1", "loss.margin > 1",
    "__import__('os').system('true') > 1", "1 in 2",
    "loss.margin / 0 > 1", "loss > 1", "method > 1", "(" * 5000 + "1" + ")" * 5000 + " > 1", "2 ** 999999999 > 1",
    "loss.margin > 'a'", "x" * 50_000 + " > 1", "a\x00 > 1", "-method > 1", "1" + "+1" * 20_000 + " > 1e9",
    "data.root > 1",
    "1e308 * 1e308 > loss.margin * 0 * 1e999", "9" * 5000 + " < 1", "loss.margin > 1; 1 > 0", "\n", "∞ > 1",
]  # fmt: skip


def space_case(rng: random.Random) -> Case:
    """A sweep that searches nothing, or what cannot be searched."""
    if rng.random() < 0.3:
        return Case("tune_tla", ["--sweep.constraints", json.dumps([rng.choice(CONSTRAINTS)])], {}, {})
    space = rng.choice(SPACES)
    content = space(rng.choice(FIELDS)) if callable(space) else space
    if rng.random() < 0.5:
        text = yaml.safe_dump({"sweep": {"space": content}})
        return Case("tune_tla", ["--config", "a.yaml"], {"a.yaml": text}, {})
    return Case("tune_tla", ["--sweep.space", json.dumps(content)], {}, {})


def code_case(rng: random.Random) -> Case:
    """A network or a function from outside the package that cannot be used."""
    arguments, files = own_code(rng)
    return Case("train_tla", arguments, files, {})


KINDS = (value_case, value_case, value_case, name_case, file_case, word_case, code_case, space_case)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run jobs in; a job that goes on after reading its configuration has accepted it."""

    def accept(*_: Any, **__: Any) -> None:
        raise Accepted

    def check(config: RunConfig, *_: Any, **__: Any) -> None:
        if config.model.code is not None:
            check_before_start(config)
        raise Accepted

    monkeypatch.setattr(importlib.import_module("tla_service.workflows.train"), "train_and_register", check)
    accepting = {
        "tla_service.workflows.sweep": ["run_sweep"],
        "tla_service.workflows.evaluate": ["evaluate_and_log"],
        "tla_service.registry.promotion": ["Promotion"],
        "tla_service.registry.exporting": ["export_model"],
        "tla_service.registry.importing": ["import_model"],
        "tla_service.registry.leaderboard": ["read_leaderboard"],
        "tla_service.cluster.doctor.examine": ["examine"],
    }
    for module, names in accepting.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(module), name, accept)
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def run_configuration(case: Case, folder: Path) -> Any:
    for name, content in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str) and content.startswith("->"):
            (folder / name).symlink_to(content[2:])
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    base = JOBS[case.job][1] if "--preset" not in case.arguments else []
    with environment(case.variables, [*base, *case.arguments], folder):
        ended = run_case(importlib.import_module(f"jobs.{case.job}").main)
    shutil.rmtree(folder / "code", ignore_errors=True)
    return ended


@chunks(COUNT, 20)
def test_bad_configurations_are_refused(numbers: range, folder: Path) -> None:
    with Faults() as faults:
        for number in numbers:
            rng = random_of("configuration", number)
            case = KINDS[number % len(KINDS)](rng)
            ended = run_configuration(case, folder)
            faults.add(ended.fault, number, case, ended)


@pytest.mark.parametrize("job", JOBS)
def test_the_same_jobs_accept_what_is_right(job: str, folder: Path) -> None:
    ended = run_configuration(Case(job, [], {}, {}), folder)
    assert (ended.code, ended.text) == (None, "")
