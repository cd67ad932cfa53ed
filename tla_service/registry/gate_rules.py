"""The rules of the gate, as configuration: read without torch or mlflow."""

from typing import Literal, Self

from pydantic import model_validator

from tla_service.config.bounds import length_trouble
from tla_service.config.fields import Pixels, Section, setting, wrong
from tla_service.report.schema import ThreatModel


class GateRules(Section):
    """What a version must show. Accuracies are shares of the test images set aside for the gate."""

    norm: Literal["linf", "l2"] | None = setting(
        None, "norm of the threat model it is judged under; none: the one that the version was trained for"
    )
    epsilon: Pixels | None = setting(
        None, "radius of that threat model; none: as for the norm", unit="pixels in [0, 1], or L2 length", gt=0
    )
    min_clean_accuracy: float = setting(0.5, "least accuracy on clean images", ge=0, le=1)
    min_autoattack_accuracy: float = setting(0.2, "least accuracy under AutoAttack", ge=0, le=1)
    min_images: int = setting(100, "fewest of these images that AutoAttack was run on", unit="images", ge=1)
    audit: bool = setting(True, "the audit for gradient masking must have passed")
    min_detection_auc: float = setting(0.6, "least area under the ROC curve of the detection of errors", ge=0, le=1)
    not_worse: bool = setting(True, "compare with the version that holds the alias, on the same images")
    significance: float = setting(
        0.05, "worse by McNemar's paired test at this level is refused, however small the difference", gt=0, lt=1
    )
    max_drop: float = setting(
        0.005, "accuracy that may be lost to the holder of the alias, significant or not", ge=0, le=1
    )

    @property
    def threat_model(self) -> ThreatModel | None:
        """The threat model that is asked for; None: the one that the version was trained for."""
        if self.norm is None or self.epsilon is None:
            return None
        return ThreatModel(norm=self.norm, epsilon=self.epsilon)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norm is None and self.epsilon is not None:
            raise wrong("rules.epsilon", self.epsilon, "a radius without its norm", "give rules.norm, too")
        if self.norm is not None and self.epsilon is None:
            raise wrong("rules.norm", self.norm, "a norm without its radius", "give rules.epsilon, too")
        threat = self.threat_model
        trouble = None if threat is None else length_trouble("rules", threat.norm, threat.epsilon)
        if trouble is not None:
            raise wrong(*trouble)
        return self
