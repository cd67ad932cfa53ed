"""Configuration of a sweep. Nothing here imports torch: an invalid space is refused within a second."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tla_service.config import RunConfig
from tla_service.config.fields import Pixels, Section, setting, wrong
from tla_service.config.loading import RunSettings, preset_names
from tla_service.config.yaml_files import dump_yaml

Objective = Literal["robust_accuracy", "clean_accuracy"]


class Dimension(Section):
    """One searched setting: a range, a list of values, or named variants that set several fields together."""

    low: Pixels | None = setting(None, "lower bound of a range")
    high: Pixels | None = setting(None, "upper bound of a range")
    log: bool = setting(False, "sample on a log scale")
    values: tuple[Any, ...] | None = setting(None, "choices; a plain list means the same")
    variants: dict[str, dict[str, Any]] | None = setting(None, "name -> fields and their values")

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return {"values": given} if isinstance(given, list | tuple) else given


class SweepConfig(Section):
    """The search: space, searcher, scheduler, budget."""

    # What may change when a sweep is resumed.
    NOT_IDENTITY: ClassVar[set[str]] = {
        "name", "num_samples", "max_hours", "max_gpu_hours", "max_concurrent", "failures_in_a_row",
    }  # fmt: skip

    name: str = setting("", "name; default: data set, method and a digest of the sweep", pattern=r"^([\w-][\w.-]*)?$")
    space: dict[str, Dimension] = setting(
        {},
        "field of the run -> [values], {low, high, log} or {variants}; none: the paper's weights and margin, batch and "
        "pool size around the run's own",
    )
    constraints: tuple[str, ...] = setting(
        (), 'what a point must satisfy, such as "mining.pool_size >= 2 * training.global_batch_size"'
    )
    learning_rate_rule: Literal["linear", "sqrt", "none"] = setting(
        "linear", "how the learning rate scales with the batch size"
    )
    searcher: Literal["tpe", "random", "grid"] = setting("tpe", "search algorithm; tpe and random are Optuna's")
    startup_trials: int = setting(10, "tpe: random trials before the model is used", unit="trials", ge=1)
    own_first: bool = setting(True, "start with the run's own settings, if they lie in the space; not for a grid")
    objectives: tuple[Objective, ...] = setting(
        (),
        "validation accuracies to maximize, of which the first ranks trials and is used by asha; none: the one that "
        "selects the run's best weights",
    )
    scheduler: Literal["asha", "none"] = setting("asha", "early stopping: asha, or none")
    grace_epochs: int | None = setting(
        None, "asha: no trial is stopped before this; none: a ninth of a trial", unit="epochs", ge=1
    )
    reduction_factor: float = setting(3, "asha: one in this many trials is promoted to the next rung", gt=1)
    trial_epochs: int | None = setting(None, "length of a trial; none: that of the run", unit="epochs", ge=1)
    num_samples: int | None = setting(None, "trials; none: 16, or all points of a grid", unit="trials", ge=1)
    max_hours: float | None = setting(None, "stop after this much wall time, over all attempts", unit="h", gt=0)
    max_gpu_hours: float | None = setting(
        None, "stop when workers have used this many GPU hours (worker hours, without GPUs)", unit="h", gt=0
    )
    max_concurrent: int | None = setting(
        None, "trials in parallel; none: as many as fit, plus one that waits", unit="trials", ge=1
    )
    failures_in_a_row: int = setting(5, "give up after this many consecutive failures", unit="trials", ge=1)
    measure_test: bool = setting(False, "evaluate each trial on the test set; for studies on a grid, never to select")
    picture: Literal["", "pool_size", "triplet_weight", "margin", "layer"] = setting(
        "", "plot the trials beside the paper's figures on this; the first axis is the x axis"
    )
    seed: int = setting(0, "seed of the search", ge=0, lt=2**31)


class TuneSettings(RunSettings):
    """Configuration of a sweep job: the run that is varied, the search, and options of the job."""

    sweep: SweepConfig = SweepConfig()
    study: str | None = Field(None, description="start from this sweep: " + ", ".join(preset_names("study")))
    resume: bool = Field(False, description="resume the sweep if it exists")
    then_train: int = Field(0, ge=0, description="train the winner at full length with this many seeds [>= 0]")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """Refuse what a training job has, and a sweep does not."""
        if self.log_format == "json":
            raise wrong("log_format", "json", "sweeps print text", "use text; log.jsonl in the output folder is JSON")
        if self.print_config == "schema":
            remedy = "use it with jobs/train_tla.py, or print yaml"
            raise wrong("print_config", "schema", "there is one of runs, not of sweeps", remedy)
        return self


def sweep_yaml(run: RunConfig, sweep: SweepConfig) -> str:
    """All settings of a sweep, without credentials in URLs, as a file that the job takes with `--config`."""
    fields = run.model_dump(mode="json") | {"sweep": sweep.model_dump(mode="json", exclude_defaults=True)}
    return dump_yaml(fields)
