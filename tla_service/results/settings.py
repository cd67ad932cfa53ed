"""Settings of the job that remakes a table of the paper."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tla_service.config import Method, ScalingConfig, TrackingConfig
from tla_service.config.fields import Section, setting, wrong
from tla_service.config.loading import JobSettings
from tla_service.files import expanded

TableName = Literal["mnist", "cifar10", "tiny_imagenet", "digits"]
RECIPE_METHODS: Mapping[str, tuple[Method, ...]] = {
    "paper": ("natural", "at", "alp", "tla_rn", "tla_sa", "tla"),
    "modern": ("at", "trades", "tla"),
}


class TableData(Section):
    """The location of the images."""

    root: str | None = setting(None, "folder, zip file or s3://bucket/prefix that holds the data set")


class TableTracking(TrackingConfig):
    """MLflow, with a separate experiment for tables."""

    experiment: str = setting("tla-results", "MLflow experiment", min_length=1)


class ReproduceSettings(JobSettings):
    """A table to remake."""

    table: TableName = setting("mnist", "data set of the table; digits is embedded, for trying things out")
    recipe: Literal["paper", "modern", "tuned"] = setting(
        "paper",
        "the paper's settings; the preset modern_<table> for every method; or a search of the same length for every "
        "method, selected on validation images, and the winners over many seeds",
    )
    budget: float | None = setting(
        None,
        "reduced settings that take about this long on two CPU cores; none: the full settings",
        unit="minutes",
        gt=0,
        le=600,
    )
    seeds: int | None = setting(None, "seeds per method; none: 3, or 10 if tuned", ge=1, le=100)
    methods: tuple[Method, ...] = setting(
        (), "methods; none: the paper's six, or at, trades and tla with the modern recipe"
    )
    minutes: float | None = setting(None, "stop after this long; the same command resumes", unit="minutes", gt=0)
    side_by_side: int | None = setting(
        None, "runs in parallel; none: one per core, or four on a GPU; on a cluster as many as fit", ge=1, le=256
    )
    state: Path | None = Field(None, description="folder of the runs; default runs/tables/<table>-<settings>")
    output: Path | None = Field(
        None, description="Markdown page to write; default docs/results/<table>.md, or <table>-modern.md"
    )
    log: bool = setting(True, "log the results to MLflow, if it is installed")
    data: TableData = TableData()
    scaling: ScalingConfig = Field(
        ScalingConfig(), description="with scaling.address or RAY_ADDRESS the table is made on that cluster"
    )
    tracking: TableTracking = TableTracking()

    @property
    def num_seeds(self) -> int:
        """Seeds per method."""
        return self.seeds or (10 if self.recipe == "tuned" else 3)

    @property
    def budget_name(self) -> str:
        """Name of the settings: the recipe, the budget's minutes, or both."""
        if self.budget is None:
            return self.recipe
        return f"{'' if self.recipe == 'paper' else 'modern-'}{self.budget:g}-minutes"

    @property
    def page_name(self) -> str:
        """Name of the page and of its figures."""
        return self.table if self.recipe == "paper" else f"{self.table}-{self.recipe}"

    @property
    def state_folder(self) -> Path:
        """Folder of the runs, an absolute path."""
        return expanded("state", self.state or Path("runs/tables") / f"{self.table}-{self.budget_name}").absolute()

    @property
    def page(self) -> Path:
        """Path of the page."""
        return expanded("output", self.output or Path("docs/results") / f"{self.page_name}.md")

    @property
    def on_cluster(self) -> bool:
        """Whether a Ray cluster is given."""
        return bool(self.scaling.address or os.environ.get("RAY_ADDRESS"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.root is None and self.table != "digits":
            raise wrong("data.root", None, f"{self.table} is not embedded", "give a folder, or s3://bucket/prefix")
        if self.recipe == "modern" and self.table == "digits":
            raise wrong("recipe", "modern", "there is no such preset for digits", "use recipe paper")
        if self.recipe == "tuned":
            for name in ("budget", "methods"):
                if getattr(self, name):
                    reason = "the recipe tuned fixes methods and lengths"
                    raise wrong(name, getattr(self, name), reason, "leave it out, or use another recipe")
        if len(set(self.methods)) < len(self.methods):
            raise wrong("methods", ",".join(self.methods), "names a method twice", "name each once")
        if self.on_cluster and self.scaling.wait_seconds > 0 and self.side_by_side is None:
            reason = "with scaling.wait_seconds the cluster may grow, so its present size sets no limit"
            raise wrong("side_by_side", None, reason, "set it to the number of runs in parallel")
        return self
