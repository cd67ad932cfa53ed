"""What an evaluation found, as plain data: the content of `report.json`, which the promotion gate reads too."""

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema

from tla_service.errors import UnavailableError, one_line
from tla_service.evaluation import results as rs
from tla_service.evaluation.beyond import Calibration, Corruptions, NormRow
from tla_service.evaluation.certified import Certified
from tla_service.files import write_whole

FORMAT: Literal[1] = 1
REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE, PAGE_FILE = "report.json", "outcome.npz", "autoattack.npz", "report.html"
CERTIFIED_FILE, TRANSFER_FILE = "certified.npz", "transfer.npz"
IMAGES_FILE, ADVERSARIAL_FILE, SARIF_FILE = "images.parquet", "adversarial.npz", "audit.sarif"
FILES = (
    REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE, CERTIFIED_FILE, TRANSFER_FILE, PAGE_FILE, IMAGES_FILE,
    ADVERSARIAL_FILE, SARIF_FILE,
)  # fmt: skip
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


class Part(BaseModel):
    """A part of a report; figures that are undefined are None, as JSON has no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


def size(length: float) -> str:
    """A length as the command line takes it, to six digits: ``0.3``, or ``8/255`` where that says more."""
    short, levels = f"{length:.6g}", round(length * 255)
    is_rounded = not math.isclose(float(short), length, rel_tol=1e-9)
    return f"{levels}/255" if is_rounded and math.isclose(length * 255, levels, rel_tol=1e-6) else short


class ThreatModel(Part):
    """What the adversary may do: perturbations up to ``epsilon`` in ``norm``, pixels in [0, 1]."""

    norm: Literal["linf", "l2"]
    epsilon: float

    @property
    def radius(self) -> str:
        """The radius as the command line takes it: ``8/255``, ``0.3``."""
        return size(self.epsilon)

    @property
    def slug(self) -> str:
        """What tells it from other threat models, fit for file names and tags: ``linf-8_255``."""
        return f"{self.norm}-{self.radius.replace('/', '_')}"

    def __str__(self) -> str:
        return f"{self.norm} {self.radius}"


class ModelFacts(Part):
    """Which network was evaluated; `uri` is as asked for."""

    uri: str
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    weights_sha256: str
    architecture: str
    method: str
    seed: int | None = None
    trained_for: ThreatModel


class DataFacts(Part):
    """The test set, images set aside for the gate included; fingerprint of the training data where it is known."""

    name: str
    split: Literal["test"] = "test"
    images: int
    fingerprint: str
    class_names: tuple[str, ...]
    trained_on: str | None = None


class AttackFacts(Part):
    """How an attack was run; a transfer attack was crafted on the surrogate."""

    kind: str
    norm: str
    epsilon: float
    step_size: float
    num_steps: int
    num_restarts: int
    transfer: bool = False


class AutoAttackFacts(Part):
    """How AutoAttack was run, and what it says about the other attacks.

    `broken_by` counts the images that each stage was the first to break. `gap` is the accuracy under `strongest` of the
    other attacks minus that under AutoAttack, on the same images; `weak` tells whether it shows, beyond noise, that the
    other attacks are weak.
    """

    stages: tuple[str, ...]
    left_out: dict[str, str]
    broken_by: dict[str, int]
    strongest: str
    gap: rs.Difference
    weak: bool
    warnings: tuple[str, ...] = ()
    outcome: str = AUTOATTACK_FILE
    version: str


class AdversarialFacts(Part):
    """AutoAttack's images, written for others to check; without a file, `reason` says why.

    `clean` is the accuracy on the clean images in the file, gate images left out. Accuracy on the adversarial ones is
    that under ``autoattack``.
    """

    file: str | None = ADVERSARIAL_FILE
    sha256: str = ""
    images: int = 0
    clean: rs.Share | None = None
    reason: str = ""


class Compared(Part):
    """Another model measured on the same images; `difference` is the report's model minus this one, by attack."""

    model: ModelFacts
    accuracy: dict[str, rs.Accuracy]
    difference: dict[str, rs.Difference]
    detection: rs.Detection | None = None
    neighbours: rs.Neighbours | None = None
    shift: tuple[rs.Shift, ...] = ()
    warnings: tuple[str, ...] = ()


class GateFacts(Part):
    """What the promotion gate decides on: the test images set aside for it, which no other figure is of."""

    images: int
    accuracy: dict[str, rs.Accuracy]
    detection: rs.Detection | None = None


class Report(Part):
    """An evaluation of one model. Its figures are of the test images that are not set aside for the promotion gate.

    The audit alone, but for its checks of restarts and relatives, is of both: it asks whether the attacks work.
    `accuracy` is by attack, with ``clean``, ``autoattack`` and ``worst``, for images that no attack of the table and no
    example of `relatives` breaks. Files are beside the report. `seconds` is wall time without shards that an earlier
    start had measured.
    """

    format: Literal[1] = FORMAT
    model: ModelFacts
    data: DataFacts
    threat_model: ThreatModel
    accuracy: dict[str, rs.Accuracy]
    attacks: dict[str, AttackFacts]
    outcome: str = OUTCOME_FILE
    autoattack: AutoAttackFacts | None = None
    adversarial: AdversarialFacts | None = None
    curves: tuple[rs.Curve, ...] = ()
    sparse: tuple[rs.MinimumNorms, ...] = ()
    norms: tuple[NormRow, ...] = ()
    corruptions: Corruptions | None = None
    calibration: dict[Literal["clean", "attacked"], Calibration] = Field(default_factory=dict)
    audit: rs.Audit | None = None
    unit_tests: rs.UnitTests | None = None
    relatives: tuple[rs.Relative, ...] = ()
    certified: Certified | None = None
    detection: rs.Detection | None = None
    neighbours: rs.Neighbours | None = None
    shift: tuple[rs.Shift, ...] = ()
    compared: tuple[Compared, ...] = ()
    surrogate: ModelFacts | None = None
    code: dict[str, str] = Field(default_factory=dict)
    seed: int
    settings: str
    seconds: float
    hardware: str
    gate: GateFacts

    @property
    def is_as_trained(self) -> bool:
        """Whether the threat model is the one that the model was trained for."""
        return self.model.trained_for.slug == self.threat_model.slug


def evaluations_folder(weights_sha256: str) -> str:
    """Where the evaluations of these weights are among the artifacts of the run that trained them."""
    return f"evaluation/{weights_sha256[:12]}"


def artifact_folder(weights_sha256: str, threat_model: ThreatModel) -> str:
    """Where the evaluation of these weights under a threat model is among the artifacts of the run."""
    return f"{evaluations_folder(weights_sha256)}/{threat_model.slug}"


def read_report(path: Path) -> Report:
    """Read `report.json`; UnavailableError if there is none, or it is damaged or of another format."""
    try:
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({one_line(error)})"
        remedy = f"delete {path.parent} and give the same command again"
        raise UnavailableError("report", path, reason, remedy) from error


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`, whole or not at all."""
    write_whole(path, report.model_dump_json(indent=1))


def json_schema() -> str:
    """The JSON Schema of `report.json`, published as `SCHEMA_FILE`; its ``$id`` names the format."""
    schema = Report.model_json_schema(mode="validation")
    dialect = {"$schema": GenerateJsonSchema.schema_dialect, "$id": f"urn:tla-service:report:{FORMAT}"}
    return f"{json.dumps(dialect | schema, indent=1)}\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json_schema(), encoding="utf-8")
