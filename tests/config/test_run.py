"""What a run is: sections that refuse what is wrong, describe themselves, and come back from YAML as they were."""

import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tla_service.config import (
    AttackConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    MiningConfig,
    ModelConfig,
    RunConfig,
    ScalingConfig,
    TrackingConfig,
)
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.fields import Section
from tla_service.config.loading import load_settings, preset_names, to_yaml
from tla_service.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from tla_service.config.yaml_files import parse_yaml
from tla_service.errors import ConfigError
from tla_service.models import model_names

SECTIONS = Section.__subclasses__()


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of a run with its dotted name."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


LEAVES = dict(leaves())


def preset_settings(name: str) -> Any:
    """A preset as it is loaded, with the folder and the weights that it asks for."""
    root = [] if "digits" in name else ["--data.root", "/data"]
    weights = ["--model.pretrained", "w.pt"] if name.startswith("finetune") else []
    return load_settings(["--preset", name, *root, *weights])


def test_all_settings_are_found() -> None:
    assert {"seed", "attack.epsilon", "loss.margin", "evaluation.validation.kind", "tracking.tags"} <= set(LEAVES)
    assert len(SECTIONS) >= 13


@pytest.mark.parametrize("name", LEAVES)
def test_setting_is_described_with_its_range(name: str) -> None:
    field = LEAVES[name]
    assert field.description
    stated = re.findall(r"(>=|<=|>|<) ([\d.e+-]+)", field.description.rpartition("[")[2])
    found = {sign: float(number) for sign, number in stated}
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = {
        signs[key]: float(getattr(constraint, key))
        for constraint in field.metadata
        for key in signs
        if getattr(constraint, key, None) is not None
    }
    assert found == limits


@pytest.mark.parametrize("section", SECTIONS)
def test_section_is_frozen_documented_and_refuses_unknown_names(section: type[Section]) -> None:
    config = section()
    name = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))
    with pytest.raises(ValidationError, match="Extra inputs"):
        section.model_validate({"no_such_setting": 1})
    assert section.__doc__


def test_defaults_do_not_share_what_can_be_changed() -> None:
    first, second = EvaluationConfig(), EvaluationConfig()
    first.test["mine"] = EvaluationAttack()
    assert "mine" not in second.test
    assert "mine" not in EvaluationConfig().test


# ----------------------------------------------------------------------------------------------- identity


def test_digest_changes_with_what_shapes_the_weights() -> None:
    plain = RunConfig()
    others = [
        RunConfig(loss=LossConfig(margin=0.06)),
        RunConfig(seed=1),
        RunConfig(method="tla_sa"),
        RunConfig(attack=AttackConfig(num_steps=8)),
        RunConfig(training=TrainingConfig(global_batch_size=64)),
        RunConfig(mining=MiningConfig(similarity="cosine")),
        RunConfig(data=DataConfig(validation_fraction=0.2)),
        RunConfig(optimizer=OptimizerConfig(weight_decay=1e-4)),
        RunConfig(schedule=ScheduleConfig(name="cosine")),
    ]
    digests = [config.digest for config in (plain, *others)]
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{8}", digest) for digest in digests)


def test_digest_changes_with_the_columns() -> None:
    columns = [DataConfig(label_column="a"), DataConfig(image_column="a"), DataConfig(label_column="b"), DataConfig()]
    assert len({RunConfig(data=data).digest for data in columns}) == 4


def test_digest_ignores_name_scaling_and_tracking() -> None:
    other = RunConfig(
        name="mine",
        scaling=ScalingConfig(num_workers=4, use_gpu=False, storage="/shared", max_failures=0),
        tracking=TrackingConfig(uri="http://server", experiment="other", registered_model="x", tags={"a": "b"}),
    )
    assert other.digest == RunConfig().digest


def test_digest_ignores_how_a_number_or_a_dictionary_is_written() -> None:
    written = [{"epsilon": "8/255"}, {"epsilon": 8 / 255}, {"epsilon": " 16 / 510 "}]
    assert len({RunConfig.model_validate({"attack": attack}).digest for attack in written}) == 1
    a, b = EvaluationAttack(kind="bim"), EvaluationAttack(kind="cw")
    orders = [EvaluationConfig(test={"a": a, "b": b}), EvaluationConfig(test={"b": b, "a": a})]
    assert len({RunConfig(evaluation=evaluation).digest for evaluation in orders}) == 1


def test_run_name() -> None:
    config = RunConfig(method="tla_rn", seed=7)
    assert config.run_name == f"digits-tla_rn-s7-{config.digest}"
    assert RunConfig(name="my-run_2.b").run_name == "my-run_2.b"
    # It can be given back as a name, and is a folder name without surprises.
    assert RunConfig(name=config.run_name).name == config.run_name
    assert re.fullmatch(r"[a-z0-9_]+-[a-z_]+-s\d+-[0-9a-f]{8}", config.run_name)


@pytest.mark.parametrize("name", ["a b", "a/b", "../up", "a\\b", "a\n", "a:b", "..", "."])
def test_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig(name=name)


def test_registered_model_name() -> None:
    assert RunConfig().registered_model == "tla-digits"
    config = RunConfig(data=DataConfig(name="tiny_imagenet", root="/data"))
    assert config.registered_model == "tla-tiny-imagenet"
    assert RunConfig(tracking=TrackingConfig(registered_model="mine")).registered_model == "mine"
    assert RunConfig(tracking=TrackingConfig(registered_model="")).registered_model is None


def test_methods_with_triplets() -> None:
    methods = ("natural", "at", "alp", "tla", "tla_rn", "tla_sa")
    assert [m for m in methods if RunConfig(method=m).mines_triplets] == ["tla", "tla_rn", "tla_sa"]  # type: ignore[arg-type]


@given(st.integers(1, 600), st.integers(1, 40))
def test_a_shared_pool_is_refused_with_the_nearest_sizes_that_can_be_shared(size: int, workers: int) -> None:
    training = TrainingConfig(global_batch_size=128)

    def run(size: int) -> RunConfig:
        return RunConfig(training=training, mining=MiningConfig(pool="separate", scope="global", pool_size=size))

    nearest = [near for near in range(1, 700) if near % workers == 0]
    if size % workers == 0:
        run(size).check_workers(workers)
        return
    with pytest.raises(ConfigError, match=f"mining.pool_size={size}: not divisible by {workers} workers") as raised:
        run(size).check_workers(workers)
    offered = [int(word) for word in raised.value.remedy.split() if word.isdecimal()]
    assert offered == [near for near in nearest if abs(near - size) < workers]
    for near in offered:
        run(near).check_workers(workers)
    for kept in (
        RunConfig(method="at", training=training, mining=run(size).mining),  # mines nothing
        RunConfig(training=training, mining=MiningConfig(pool="separate", pool_size=size)),  # a pool for each worker
        RunConfig(training=training, mining=MiningConfig(scope="global", pool_size=size)),  # the batch is the pool
    ):
        kept.check_workers(workers)


def test_a_batch_gives_each_worker_two_images() -> None:
    run = RunConfig(training=TrainingConfig(global_batch_size=7))
    run.check_workers(3)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=7: .* each of 4 workers; use at least 8"):
        run.check_workers(4)


# ------------------------------------------------------------------------------------------------- YAML


configs = st.builds(
    lambda method, seed, epsilon, margin, milestones, workers, tags, tests, cut: RunConfig(
        method=method,
        seed=seed,
        attack=AttackConfig(epsilon=epsilon, step_size=epsilon / 3),
        loss=LossConfig(margin=margin, clean_weight=margin),
        schedule=ScheduleConfig(milestones=tuple(sorted(milestones))),
        scaling=ScalingConfig(num_workers=workers),
        tracking=TrackingConfig(tags=tags),
        evaluation=EvaluationConfig(test={name: EvaluationAttack(epsilon=epsilon) for name in tests}),
        training=TrainingConfig(max_steps=cut),
    ),
    st.sampled_from(["natural", "at", "alp", "tla", "tla_rn", "tla_sa"]),
    st.integers(0, 2**31 - 1),
    st.floats(1e-6, 1),
    st.floats(0, 1),
    st.sets(st.integers(0, 10**6), max_size=4),
    st.integers(1, 64) | st.just("auto"),
    st.dictionaries(st.from_regex(r"[a-z ]+", fullmatch=True), st.text(), max_size=3),
    st.sets(st.text("abcdefgh0123456789_", min_size=1), min_size=1, max_size=3),
    st.none() | st.integers(1, 10**9),
)


@settings(max_examples=40)
@given(configs)
def test_yaml_round_trip(config: RunConfig) -> None:
    found = RunConfig.model_validate(yaml.safe_load(to_yaml(config)))
    assert found == config
    assert found.digest == config.digest


@pytest.mark.parametrize("text", ["1.5e3", "-.5", "+.5", "010", "1e-3", "1:30", "yes", "0x1f"])
def test_text_like_a_number_stays_text(text: str) -> None:
    config = RunConfig(tracking=TrackingConfig(tags={"version": text}))
    assert RunConfig.model_validate(parse_yaml(to_yaml(config), "config", "config.yaml")) == config


def test_yaml_is_complete() -> None:
    written = yaml.safe_load(to_yaml(RunConfig()))
    for name in LEAVES:
        section: Any = written
        for part in name.split("."):
            assert part in section, name
            section = section[part]


# ---------------------------------------------------------------------------------------- presets, schema


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_and_holds(name: str) -> None:
    config = preset_settings(name).run_config
    assert config.model.name in model_names()
    assert RunConfig.model_validate(yaml.safe_load(to_yaml(config))) == config


def attacks_given(name: str) -> dict[str, Any] | None:
    """The attacks on the test set that a preset's file names."""
    text = (resources.files("tla_service.config") / "presets" / f"{name}.yaml").read_text()
    found: dict[str, Any] | None = yaml.safe_load(text).get("evaluation", {}).get("test")
    return found


@pytest.mark.parametrize("name", [name for name in preset_names() if attacks_given(name) is not None])
def test_preset_decides_which_attacks_test(name: str) -> None:
    assert preset_settings(name).evaluation.test.keys() == (attacks_given(name) or {}).keys()


def test_json_schema_describes_every_setting_and_refuses_others() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    for name in LEAVES:
        node = schema
        for part in name.split("."):
            assert node["additionalProperties"] is False
            node = resolve(node["properties"][part])
        assert node["description"], name
    margin = resolve(schema["properties"]["loss"])["properties"]["margin"]
    assert (margin["minimum"], margin["maximum"], margin["default"]) == (0, 1, 0.05)
    assert resolve(schema["properties"]["attack"])["properties"]["norm"]["enum"] == ["linf", "l2"]


def test_json_schema_allows_fractions() -> None:
    """Editors check files against it, and files say 8/255."""
    attack = RunConfig.model_json_schema()["$defs"]["AttackConfig"]["properties"]
    for name in ("epsilon", "step_size"):
        allowed = {option.get("type") for option in attack[name].get("anyOf", [attack[name]])}
        assert {"number", "string"} <= allowed


def test_the_schema_beside_the_presets_is_the_present_one() -> None:
    path = resources.files("tla_service.config") / "presets" / "run.schema.json"
    remedy = "run: python jobs/train_tla.py --print_config schema > tla_service/config/presets/run.schema.json"
    assert json.loads(path.read_text()) == RunConfig.model_json_schema(), remedy


def test_the_help_names_every_network() -> None:
    from tla_service.models import model_names

    described = ModelConfig.model_fields["name"].description or ""
    assert [name for name in model_names() if name not in described] == []
