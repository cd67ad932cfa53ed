"""What the job that remakes a table of the paper can be told."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tla_service.config import Method, ScalingConfig, TrackingConfig
from tla_service.config.fields import Section, setting, wrong
from tla_service.config.loading import JobSettings

TableName = Literal["mnist", "cifar10", "tiny_imagenet", "digits"]
RECIPE_METHODS: Mapping[str, tuple[Method, ...]] = {
    "paper": ("natural", "at", "alp", "tla_rn", "tla_sa", "tla"),
    "modern": ("at", "trades", "tla"),
}


class TableData(Section):
    """Where the images are."""

    root: str | None = setting(None, "folder, zip file or s3://bucket/prefix that holds the data set")


class TableTracking(TrackingConfig):
    """MLflow, with an experiment of its own for the runs of tables."""

    experiment: str = setting("tla-results", "MLflow experiment", min_length=1)


class ReproduceSettings(JobSettings):
    """A table to remake."""

    table: TableName = setting("mnist", "which table; digits is the same on embedded data, for trying things out")
    recipe: Literal["paper", "modern"] = setting(
        "paper", "the paper's settings, or the preset modern_<table>: the same recipe for every method"
    )
    budget: float | None = setting(
        None,
        "reduced settings that two CPU cores finish in about this long; none: the paper's settings",
        unit="minutes",
        gt=0,
        le=600,
    )
    seeds: int = setting(3, "runs of each method", ge=1, le=100)
    methods: tuple[Method, ...] = setting(
        (), "methods of the table; none: the paper's six, or with the modern recipe at, trades and tla"
    )
    pools: bool = setting(
        True, "with the paper's recipe also the study of pool sizes (1, 250, 500, 1000, 2000) with method tla"
    )
    minutes: float | None = setting(
        None, "stop after this long and keep everything; the same command goes on", unit="minutes", gt=0
    )
    side_by_side: int | None = setting(
        None, "runs at a time; none: one a core, or four on a GPU; on a cluster as many as fit", ge=1, le=256
    )
    state: Path | None = Field(None, description="folder of the runs; default runs/tables/<table>[-<budget>]")
    output: Path | None = Field(
        None, description="Markdown page to write; default docs/results/<table>.md, or <table>-modern.md"
    )
    log: bool = setting(True, "log every run's figures to MLflow, where it is installed")
    data: TableData = TableData()
    scaling: ScalingConfig = Field(
        ScalingConfig(),
        description="with scaling.address or RAY_ADDRESS runs go to that cluster, each to a worker of its own",
    )
    tracking: TableTracking = TableTracking()

    @property
    def budget_name(self) -> str:
        """What the settings are called: the recipe, the budget's minutes, or both."""
        parts = [self.recipe] if self.recipe != "paper" or self.budget is None else []
        return "-".join(parts + ([f"{self.budget:g}-minutes"] if self.budget is not None else []))

    @property
    def page_name(self) -> str:
        """What the page and its pictures are called."""
        return self.table if self.recipe == "paper" else f"{self.table}-{self.recipe}"

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """The table's methods."""
        return self.methods or RECIPE_METHODS[self.recipe]

    @property
    def state_folder(self) -> Path:
        """Where runs are kept, as an absolute path."""
        return (self.state or Path("runs/tables") / f"{self.table}-{self.budget_name}").expanduser().absolute()

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return (self.output or Path("docs/results") / f"{self.page_name}.md").expanduser()

    @property
    def on_cluster(self) -> bool:
        """Whether a Ray cluster is named."""
        return bool(self.scaling.address or os.environ.get("RAY_ADDRESS"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.root is None and self.table != "digits":
            raise wrong("data.root", None, f"{self.table} is not embedded", "give a folder, or s3://bucket/prefix")
        if self.recipe == "modern" and self.table == "digits":
            raise wrong("recipe", "modern", "there is no such preset for digits", "take recipe paper")
        if len(set(self.methods)) < len(self.methods):
            raise wrong("methods", ",".join(self.methods), "names a method twice", "name each once")
        return self
