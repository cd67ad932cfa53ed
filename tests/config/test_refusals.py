"""Wrong configurations: one line each, `field=value: reason; remedy`, and never anything but a ConfigError."""

import json
import re
from pathlib import Path

import pytest

from tests.config.refusal import file_of, refusal, refusals
from tla_service.config.loading import load_settings

# Arguments; then the message's field=value, and what its reason and its remedy must contain.
WRONG_FLAGS = [
    ("--attack.epsilon=8", "attack.epsilon=8", "outside (0, 1]", "write 8/255"),
    ("--attack.epsilon=8/0", "attack.epsilon=8/0", "not a fraction", "8/255"),
    ("--attack.epsilon=-1", "attack.epsilon=-1", "greater than 0", "radius"),
    ("--attack.epsilon=nan", "attack.epsilon=nan", "finite", "radius"),
    ("--attack.epsilon=1e999", "attack.epsilon=1e999", "finite", "radius"),
    ("--attack.epsilon=large", "attack.epsilon=large", "valid number", "radius"),
    ("--attack.step_size=0.5", "attack.step_size=0.5", "twice attack.epsilon", "at most 0.0627"),
    ("--attack.epsilon=300", "attack.epsilon=300", "outside (0, 1]", "use at most 1"),
    ("--attack.step_size=2", "attack.step_size=2", "twice attack.epsilon", "write 2/255 if it is in 8-bit levels"),
    ("--attack.step_size=1e-6", "attack.step_size=1e-06", "7 steps cover less than 0.5%", "use about 0.011"),
    (
        "--attack.norm=l2 --attack.epsilon=128 --attack.step_size=15",
        "attack.epsilon=128",
        "longer than the diagonal of 1x8x8 images, 8",
        "write 128/255",
    ),
    (
        "--evaluation.validation.step_size=2",
        "evaluation.validation.step_size=2",
        "over twice evaluation.validation.epsilon=0.0313725",
        "write 2/255",
    ),
    (
        "--evaluation.validation.step_size=1e-7",
        "evaluation.validation.step_size=1e-07",
        "20 steps cover less",
        "0.0039",
    ),
    (
        '--evaluation.test={"a": {"epsilon": "8/255", "step_size": 1}}',
        "evaluation.test.a.step_size=1",
        "over twice evaluation.test.a.epsilon",
        "write 1/255",
    ),
    (
        '--evaluation.test={"a": {"norm": "l2", "epsilon": 9, "step_size": 1}}',
        "evaluation.test.a.epsilon=9",
        "longer than the diagonal of 1x8x8 images",
        "write 9/255",
    ),
    (
        '--evaluation.test={"a": {"norm": "l2", "epsilon": 9000, "step_size": 1}}',
        "evaluation.test.a.epsilon=9000",
        "longer than the diagonal",
        "use at most 8",
    ),
    (
        "--mining.clean_noise=8",
        "mining.clean_noise=8",
        "less than or equal to 1",
        "write 8/255 if it is in 8-bit levels",
    ),
    ("--data.validation_fraction=10", "data.validation_fraction=10", "less than or equal to 0.5", "write 0.1 for 10%"),
    ("--mining.clean_noise=800", "mining.clean_noise=800", "less than or equal to 1", "expected: uniform noise"),
    (
        '--evaluation.test={"a": {"num_steps": 3, "num_steps": 4}}',
        "--evaluation.test",
        "num_steps is given twice",
        "one",
    ),
    ('--attack={"epsilon": 0.1, "epsilon": 0.2}', "--attack", "epsilon is given twice", "keep one of them"),
    ("--attack.num_steps=0", "attack.num_steps=0", "greater than or equal to 1", "gradient steps"),
    ("--attack.num_steps=2.5", "attack.num_steps=2.5", "valid integer", ">= 1 and <= 10000"),
    ("--attack.norm=l1", "attack.norm=l1", "linf, l2", "l"),
    ("--attack.batchnorm=evil", "attack.batchnorm=evil", "eval, train", "did you mean eval?"),
    ("--method=tla_r", "method=tla_r", "not one of natural, at, alp", "did you mean tla_rn?"),
    ("--method=zzzz", "method=zzzz", "not one of", "choose from natural, at"),
    ("--data.name=cifra10", "data.name=cifra10", "not one of", "did you mean cifar10?"),
    ("--data.name=mnist", "data.root=None", "mnist does not ship with the installation", "give a folder"),
    ("--data.validation_fraction=0.6", "data.validation_fraction=0.6", "less than or equal to 0.5", "held out"),
    ("--model.normalization=cifar", "model.normalization=cifar", "not one of", "did you mean cifar10?"),
    ("--evaluation.validation.kind=cww", "evaluation.validation.kind=cww", "not one of", "did you mean cw?"),
    ("--evaluation.validation.epsilon=8", "evaluation.validation.epsilon=8", "outside (0, 1]", "write 8/255"),
    ('--evaluation.test={"a": {"kind": "pgdd"}}', "evaluation.test.a.kind=pgdd", "not one of", "did you mean pgd?"),
    ('--evaluation.test={"a": {"num_step": 3}}', "evaluation.test.a.num_step=3", "no such", "did you mean num_steps?"),
    ('--evaluation.test={"a": {"epsilon": 8}}', "evaluation.test.a.epsilon=8", "outside (0, 1]", "write 8/255"),
    ("--evaluation.test={}", "evaluation.test={}", "would be that on clean images", "give one, or leave it out"),
    ("--schedule.milestones=5,2", "schedule.milestones=(5, 2)", "ascending order", "sort them"),
    ("--schedule.milestones=soon", "schedule.milestones", "valid integer", "multiply by factor"),
    ("--schedule.name=piecewise", "schedule.milestones=()", "needs milestones", "constant"),
    ("--scaling.num_workers=0", "scaling.num_workers=0", "from 1 up", "a range as [2, 8], or auto"),
    ("--scaling.num_workers=[8,2]", "scaling.num_workers=[8, 2]", "fewest and the most of them, from 1 up", "[2, 8]"),
    ("--scaling.num_workers=[0,2]", "scaling.num_workers=[0, 2]", "fewest and the most of them, from 1 up", "[2, 8]"),
    (
        "--scaling.num_workers=[2,3,4]",
        "scaling.num_workers=[2, 3, 4]",
        "fewest and the most of them, from 1 up",
        "[2, 8]",
    ),
    ("--scaling.num_workers=[a,2]", "scaling.num_workers", "fewest and the most of them, from 1 up", "[2, 8]"),
    ("--training.global_batch_size=5 --scaling.num_workers=[1,3]", "training.global_batch_size=5", "3 w", "least 6"),
    (
        "--scaling.num_workers=[2,4] --mining.scope=global --mining.pool=separate --mining.pool_size=128",
        "mining.pool_size=128",
        "not divisible by 3 workers",
        "use a multiple of 12, or give scaling.num_workers a narrower range",
    ),
    ("--scaling.num_workers=[1,2] --scaling.gpus_per_worker=0.4", "scaling.gpus_per_worker=0.4", "each GPU", "use 1,"),
    (
        "--scaling.async_validation --scaling.num_workers=[1,2]",
        "scaling.async_validation=True",
        "takes all the room",
        "one number of workers",
    ),
    (
        "--scaling.async_validation --attack.kind=n_fgsm",
        "scaling.async_validation=True",
        "attack.on_collapse acts on",
        "attack.on_collapse to ignore",
    ),
    ("--loss.triplet_weight=0", "loss.triplet_weight=0", "method tla trains a triplet term", "method at"),
    ("--method=alp --loss.logit_pairing_weight=0", "loss.logit_pairing_weight=0", "alp pairs logits", "method at"),
    ("--loss.view_weight=0.5", "loss.view_weight=0.5", "no augmentation of its own", "data.augment or data.cutmix"),
    ("--loss.view_weight=0.5 --data.cutmix", "training.batchnorm_roles=together", "statistics of its own", "use apart"),
    (
        "--loss.view_weight=0.5 --data.cutmix --training.batchnorm_roles=apart --attack.kind=free",
        "loss.view_weight=0.5",
        "one backward pass",
        "attack.kind pgd",
    ),
    ("--data.cutmix", "data.cutmix=True", "CutMix makes images of two", "set loss.view_weight"),
    ("--data.cutmix --method=mart", "data.cutmix=True", "MART's term needs images of one class", "loss.robust_term"),
    (
        "--data.cutmix --method=at --data.balance=class_weights",
        "data.balance=class_weights",
        "needs images of one class",
        "use sampling",
    ),
    ("--data.cutmix --method=at --speed.cuda_graphs", "speed.cuda_graphs=True", "one class per image", "leave it out"),
    ("--data.cutmix --method=at --attack.kind=a:b", "data.cutmix=True", "your own attack", "leave one of them out"),
    ("--data.augment=augmix", "data.augment=augmix", "not one of", "autoaugment"),
    ("--training.global_batch_size=5 --scaling.num_workers=3", "training.global_batch_size=5", "3 workers", "least 6"),
    (
        "--scaling.num_workers=3 --mining.scope=global --mining.pool=separate --mining.pool_size=500",
        "mining.pool_size=500",
        "not divisible by 3 workers",
        "use 498 or 501",
    ),
    (
        "--method=trades --loss.robust_term=mart",
        "loss.robust_term=mart",
        "trades has its own classification term",
        "method mart",
    ),
    ("--method=alp --loss.robust_term=trades", "loss.robust_term=trades", "alp has its own", "trades or tla"),
    ("--method=natural --loss.robust_term=mart", "loss.robust_term=mart", "natural has its own", "mart or tla"),
    (
        "--method=alp --loss.robust_term=cross_entropy --loss.robust_weight=1",
        "loss.robust_weight=1",
        "no divergence",
        "",
    ),
    ("--loss.robust_weight=3", "loss.robust_weight=3", "method tla has no divergence", "loss.robust_term to trades"),
    ("--method=mart --loss.clean_weight=0.5", "loss.clean_weight=0.5", "mart term has its own share", "robust_weight"),
    (
        "--method=tla --model.embedding=a --loss.triplet_layer=lower",
        "loss.triplet_layer=lower",
        "another layer",
        "one of",
    ),
    ("--attack.kind=n_fgsm --no-attack.random_start", "attack.random_start=False", "starts at noise", "leave it out"),
    ("--method=trades --no-attack.random_start", "attack.random_start=False", "no gradient", "set it to true"),
    ("--method=trades --attack.kind=n_fgsm --attack.noise=0", "attack.noise=0", "no gradient", "above 0"),
    (
        "--attack.kind=free --mining.pool=separate --mining.queries=last_step",
        "mining.queries=last_step",
        "no attack steps before mining",
        "use final",
    ),
    ("--attack.kind=n_fgsm --attack.norm=l2", "attack.kind=n_fgsm", "for linf only", "use pgd"),
    ("--attack.kind=free --attack.awp", "attack.awp=True", "one backward pass", "pgd or n_fgsm"),
    ("--method=natural --attack.awp", "attack.awp=True", "has no attack", "method at"),
    ("--preset=finetune_digits", "optimizer.body_rate=0.5", "starts from random weights", "set model.pretrained"),
    ("--model.head=new", "model.head=new", "starts from random weights", "leave it out"),
    ("--training.freeze_batchnorm", "training.freeze_batchnorm=True", "random weights", "set model.pretrained"),
    (
        "--model.pretrained=w --training.freeze_batchnorm --attack.batchnorm=train",
        "attack.batchnorm=train",
        "keeps BatchNorm in eval mode",
        "leave one of them out",
    ),
    ("--model.head=fresh --model.pretrained=w", "model.head=fresh", "not one of keep, new", "choose from keep, new"),
    ("--model.pretrained=", "model.pretrained=", "at least 1 character", "weights to start from"),
    ("--optimizer.body_rate=0 --model.pretrained=w", "optimizer.body_rate=0", "greater than 0", "factor"),
    ("--attack.free_replays=1", "attack.free_replays=1", "greater than or equal to 2", "updates per batch"),
    ("--attack.kind=fgsm", "attack.kind=fgsm", "not one of", "did you mean n_fgsm?"),
    (
        "--optimizer.nesterov --optimizer.momentum=0",
        "optimizer.nesterov=True",
        "no momentum",
        "optimizer.momentum above 0",
    ),
    ("--preset=digits --attack.norm=L2", "attack.norm=L2", "not one of linf, l2", "did you mean l2?"),
    ("--training.ema_decay=1", "training.ema_decay=1", "less than 1", "decay"),
    ("--seed=-1", "seed=-1", "greater than or equal to 0", "seed of the split"),
    ("--seed=2147483648", "seed=2147483648", "less than 2147483648", "seed of the split"),
    ("--name=a/b", "name=a/b", "pattern", "run name"),
    ("--tracking.experiment=", "tracking.experiment=", "not a printable name", "MLflow experiment"),
    ("--print_config=yml", "print_config=yml", "not one of", "did you mean yaml?"),
    ("--preset=digit", "preset=digit", "no such preset", "did you mean digits?"),
    ("--preset=zzzzzz", "preset=zzzzzz", "no such preset", "choose from"),
    ("--config=/no/such/file.yaml", "config=/no/such/file.yaml", "no such file", "path of a YAML file"),
    ("--config=/", "config=/", "is a directory", "path of a YAML file"),
    ("--attack.epslon=0.1", "--attack.epslon", "no such flag", "did you mean --attack.epsilon?"),
    ("--atack.epsilon 0.1", "--atack.epsilon", "no such flag", "did you mean --attack.epsilon?"),
    ("--attack.eps=0.1", "--attack.eps", "no such flag", "did you mean --attack.epsilon?"),
    ("--xyzzy", "--xyzzy", "no such flag", "see --help"),
    ("digits", "digits", "no such flag", "--"),
    ("--data.flip true", "data.flip=true", "takes no value", "write --data.flip or --no-data.flip"),
    ("--data.flip=true", "data.flip=true", "takes no value", "write --data.flip or --no-data.flip"),
    ("--speed.cuda_graphs true", "speed.cuda_graphs=true", "takes no value", "write --speed.cuda_graphs or"),
    ("--schedule.milestones 3 5", "schedule.milestones", "separated by commas", "write 3,5"),
    ("--schedule.milestones=3 5", "schedule.milestones", "separated by commas", "write 3,5"),
    ("--seed 1 2", "2", "no such flag", "see --help"),
    ("--evaluation.test cw", "evaluation.test", "not of the form name=value", "write name=value, or JSON"),
    ("--tracking.tags note=a,b", "tracking.tags", "not of the form name=value", "write name=value, or JSON"),
    ("--data.root=", "data.root=", "at least 1 character", "folder, zip file"),
    ("--data.cache_dir=", "data.cache_dir=", "at least 1 character", "cache of"),
    ("--model.code=", "model.code=", "at least 1 character", "folder"),
    ("--scaling.storage=", "scaling.storage=", "at least 1 character", "a shared folder"),
    ("--output=", "output=", "an empty path", "output folder"),
    ("--attack.epsilon", "command line", "--attack.epsilon: expected one argument", "--help"),
]


@pytest.mark.parametrize(("flags", "head", "reason", "remedy"), WRONG_FLAGS, ids=[row[0] for row in WRONG_FLAGS])
def test_wrong_flag(flags: str, head: str, reason: str, remedy: str) -> None:
    arguments = [flags] if "{" in flags else flags.split()
    error = refusal(arguments)
    assert str(error).startswith((f"{head}: ", f"{head}=", f"{head}."))
    assert reason.lower() in error.reason.lower()
    assert remedy in f"{error.reason}; {error.remedy}"
    assert error.exit_code == 2


WRONG_FILES = [
    ("attack: {epslon: 8}", "attack.epslon=8", "no such setting", "did you mean epsilon?"),
    ("atack: {epsilon: 8}", "atack={'epsilon': 8}", "no such setting", "did you mean attack?"),
    ("attack: {epsilon: 8}", "attack.epsilon=8", "outside (0, 1]", "write 8/255"),
    ("evaluation: {validaton: {}}", "evaluation.validaton={}", "no such setting", "did you mean validation?"),
    ("evaluation: {test: {a: {kind: mimm}}}", "evaluation.test.a.kind=mimm", "not one of", "did you mean mim?"),
    ("preset: digits\nattack: {norm: [l2]}", "attack.norm=['l2']", "not one of linf, l2", "did you mean l2?"),
    ("preset: digits\nattack: {norm: l2}\ndata: {name: [mnist]}", "attack.norm=l2", "given in linf", "give attack.eps"),
    ("data: {root: 3}", "data.root=3", "valid string", "folder"),
    ("debug: perhaps", "debug=perhaps", "valid boolean", "tracebacks"),
    ("seed: 2020-01-01", "seed=2020-01-01", "valid integer", "seed of the split"),
    ("schedule: {milestones: 3}", "schedule.milestones=3", "valid tuple", "multiply by factor"),
    ("preset: false", "preset=False", "no such preset", "choose from"),
    ("preset: [digits]", "preset=['digits']", "no such preset", ""),
    ("preset: digitz", "preset=digitz", "no such preset", "did you mean digits?"),
    ("evaluation: {test: [pgd]}", "evaluation.test=['pgd']", "valid dictionary", "attacks on the test set"),
    ("attack.epsilon: 4/255", "attack.epsilon=4/255", "no such setting", "nest it, as in attack: {epsilon: ...}"),
    ("attack: {num_steps: yes}", "attack.num_steps=True", "true and false are not valid here", "gradient steps"),
    ("attack: {epsilon: true}", "attack.epsilon=True", "true and false are not valid here", "radius"),
    ("scaling: {num_workers: on}", "scaling.num_workers=True", "true and false", "DDP processes; auto"),
    ("training: {max_steps: no}", "training.max_steps=False", "true and false", "stop after this many"),
    ("tracking: {tags: {a: true}}", "tracking.tags.a=True", "valid string", "tags"),
]


@pytest.mark.parametrize(("text", "head", "reason", "remedy"), WRONG_FILES, ids=[row[0] for row in WRONG_FILES])
def test_wrong_file(tmp_path: Path, text: str, head: str, reason: str, remedy: str) -> None:
    error = refusal(file_of(tmp_path, text))
    assert str(error).startswith(f"{head}: ")
    assert reason in error.reason
    assert remedy in error.remedy


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "\x00",
        "- attack\n- loss",
        "attack",
        "3",
        "a: 1\n---\nb: 2",
        "? [1]\n: 2",
        "a: *nowhere",
        "!!python/name:os.system x",
        "seed: 2020-99-99",
        "seed: !!int x",
        "seed: !!bool x",
        "seed: !!timestamp x",
        "seed: !!float ''",
        "seed: 0x_",
        "seed: " + "9" * 5000,
        "a: " + "[" * 3000 + "]" * 3000,
        "{1: 2}",
        "{~: 2}",
        "{true: 2}",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_file_that_holds_no_settings(tmp_path: Path, text: str) -> None:
    arguments = file_of(tmp_path, text)
    error = refusal(arguments)
    assert str(error).startswith(f"config={arguments[1]}: ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x80", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    error = refusal(["--config", str(tmp_path / "run.yaml")])
    assert error.subject == "config"
    assert "not a UTF-8 text file" in error.reason


WRONG_VARIABLES = [
    ({"TLA_ATTACK__EPSILON": "8"}, "attack.epsilon=8", "8/255"),
    ({"TLA_ATTACK__EPSLON": "8"}, "attack.epslon=8", "did you mean epsilon?"),
    ({"TLA_METHOD": "tlaa"}, "method=tlaa", "did you mean tla?"),
    ({"TLA_PRESET": "digitz"}, "preset=digitz", "did you mean digits?"),
    ({"TLA_CONFIG": "/no/such"}, "config=/no/such", "path of a YAML file"),
    ({"TLA_ATACK__EPSILON": "8"}, "TLA_ATACK__EPSILON=8", "TLA_LOSS__MARGIN"),
    ({"TLA_ATTACK_EPSILON": "8"}, "TLA_ATTACK_EPSILON=8", "two underscores"),
    ({"TLA_EVALUATION__VALIDATION__KIND": "pgdd"}, "evaluation.validation.kind=pgdd", "did you mean pgd?"),
    ({"TLA_EVALUATION__TEST": '{"a": {"kind": "pgdd"}}'}, "evaluation.test.a.kind=pgdd", "did you mean pgd?"),
    ({"TLA_DATA__FLIP": "maybe"}, "data.flip=maybe", "horizontal flip"),
    ({"TLA_ATTACK": '{"epsilon": 0.1, "epsilon": 0.2}'}, 'TLA_ATTACK={"epsilon": 0.1, "epsilon": 0.2}', "one of them"),
]


@pytest.mark.parametrize(
    ("variables", "head", "remedy"), WRONG_VARIABLES, ids=[next(iter(r[0])) for r in WRONG_VARIABLES]
)
def test_wrong_variable(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], head: str, remedy: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = refusal([])
    assert str(error).startswith(f"{head}: ")
    assert remedy in error.remedy


@pytest.mark.parametrize("name", ["TLA_SEED__X", "TLA_ATTACK__EPSILON__X", "TLA_METHOD__TLA"])
def test_variable_below_a_plain_field_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "3")
    refusal([])


@pytest.mark.parametrize(
    "name", ["TLA_ATTACK", "TLA_EVALUATION__VALIDATION", "TLA_SCHEDULE__MILESTONES", "TLA_TRACKING__TAGS"]
)
def test_variable_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "{3")
    error = refusal([])
    field = name.removeprefix("TLA_").lower().replace("__", ".")
    assert error.subject in (name, field)
    assert error.value == "{3"


@pytest.mark.parametrize("text", ["seed: 0x" + "f" * 5000, "tracking: {tags: {a: 0x" + "f" * 5000 + "}}"])
def test_number_that_python_does_not_print_is_refused_in_words(tmp_path: Path, text: str) -> None:
    assert refusal(file_of(tmp_path, text)).subject in ("seed", "tracking.tags.a")


def test_several_errors_come_together() -> None:
    found = refusals(["--attack.epsilon=8", "--seed=x", "--method=tlaa", "--loss.margin=2"])
    assert sorted(error.subject for error in found) == ["attack.epsilon", "loss.margin", "method", "seed"]


def test_wrong_entries_of_one_dictionary_are_each_named(tmp_path: Path) -> None:
    found = refusals(file_of(tmp_path, "tracking: {tags: {a: 1, b: [2]}}"))
    assert [str(error).partition(":")[0] for error in found] == ["tracking.tags.a=1", "tracking.tags.b=[2]"]


@pytest.mark.parametrize("given_epsilon", ["8", "1.5", "255", "2.25"])
def test_advised_fraction_is_accepted(given_epsilon: str) -> None:
    advice = refusal([f"--attack.epsilon={given_epsilon}"]).remedy.removeprefix("write ")
    assert load_settings([f"--attack.epsilon={advice}"]).attack.epsilon == pytest.approx(float(given_epsilon) / 255)


@pytest.mark.parametrize("value", ["two", "2.5", "[1, 2, 3]", "None"])
def test_wrong_number_of_workers_is_told_that_a_number_will_do(value: str) -> None:
    error = refusal([f"--scaling.num_workers={value}"])
    assert error.subject == "scaling.num_workers"
    assert "auto" in str(error)
    assert re.search("integer|number|processes", f"{error.reason}; {error.remedy}")


@pytest.mark.parametrize("section", ["attack", "evaluation", "scaling"])
@pytest.mark.parametrize("value", ["3", "[1]", "~", "text"])
def test_section_that_is_no_section_is_told_what_to_write(tmp_path: Path, section: str, value: str) -> None:
    error = refusal(file_of(tmp_path, f"{section}: {value}"))
    assert error.subject == section
    assert error.remedy != "expected: see --help"


def test_inherited_epsilon_is_checked_under_the_attack_s_own_norm() -> None:
    l2 = ["--attack.norm=l2", "--attack.epsilon=3", "--attack.step_size=1"]
    assert refusals(l2) == []
    # In another norm the radius is the documented one, never the training attack's.
    assert refusals([*l2, "--evaluation.validation.norm=linf"]) == []
    given = [*l2, "--evaluation.validation.norm=linf", "--evaluation.validation.epsilon=3"]
    assert refusal(given).subject == "evaluation.validation.epsilon"


def test_test_attack_named_validation_does_not_hide_the_validation_attack() -> None:
    found = refusal(['--evaluation.test={"validation": {}}', "--evaluation.validation.epsilon=8"])
    assert found.subject == "evaluation.validation.epsilon"
    found = refusal(['--evaluation.test={"validation": {"epsilon": 8}}'])
    assert found.subject == "evaluation.test.validation.epsilon"


@pytest.mark.parametrize("name", ["function", "function-x", "lax", "literal[", "", "a.b", "int"])
@pytest.mark.parametrize("above", ["{%s: 3}", "attack: {%s: 3}", "evaluation: {test: {%s: {kindd: x}}}"])
def test_unknown_name_is_shown_whatever_it_looks_like(tmp_path: Path, name: str, above: str) -> None:
    found = {error.subject: error.reason for error in refusals(file_of(tmp_path, above % json.dumps(name)))}
    expected = {"{": name, "a": f"attack.{name}", "e": f"evaluation.test.{name}.kindd"}[above[0]]
    assert found.pop(expected) == "no such setting"
    assert found.keys() <= {"evaluation.test"}  # which MLflow takes no such name of
