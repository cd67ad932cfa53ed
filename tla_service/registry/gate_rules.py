"""The rules of the gate, as configuration: read without torch or mlflow."""

from tla_service.config_fields import Section, setting


class GateRules(Section):
    """What a version must show. Accuracies are shares of the test images of its evaluation."""

    min_clean_accuracy: float = setting(0.5, "least accuracy on clean test images", ge=0, le=1)
    min_autoattack_accuracy: float = setting(0.2, "least accuracy under AutoAttack", ge=0, le=1)
    min_images: int = setting(100, "fewest test images that AutoAttack was run on", unit="images", ge=1)
    audit: bool = setting(True, "the audit for gradient masking must have passed")
    min_detection_auc: float = setting(0.6, "least area under the ROC curve of the detection of errors", ge=0, le=1)
    not_worse: bool = setting(True, "compare with the version that holds the alias, on the same images")
    significance: float = setting(
        0.05, "worse by McNemar's paired test at this level is refused, however small the difference", gt=0, lt=1
    )
    max_drop: float = setting(
        0.005, "accuracy that may be lost to the holder of the alias, significant or not", ge=0, le=1
    )
