"""Attacks of a run: the one it trains against, and those it is evaluated with."""

from typing import Literal, Self

from pydantic import model_validator

from tla_service.config.fields import Function, Pixels, Section, refuse, setting, wrong
from tla_service.config.radii import Norm, documented_radius, length_trouble

_LENGTH = "pixels in [0, 1], or L2 length"


class AttackConfig(Section):
    """The training attack: images stay within epsilon of the original and in [0, 1]."""

    norm: Norm = setting("linf", "norm of the perturbation; l2 requires epsilon and step_size")
    epsilon: Pixels = setting(8 / 255, "radius of the perturbation", unit=_LENGTH, gt=0)
    step_size: Pixels = setting(2 / 255, "step size", unit="as epsilon", gt=0)
    num_steps: int = setting(7, "gradient steps", ge=1, le=10_000)
    warmup: float = setting(
        0.0,
        "share of the run over which epsilon and step_size grow linearly to their full length; with a large radius a "
        "freshly initialized network may not learn without it",
        ge=0,
        le=1,
    )
    random_start: bool = setting(True, "start at a random point of the ball")
    kind: Function | Literal["pgd", "n_fgsm", "free"] = setting(
        "pgd",
        "pgd; n_fgsm: a single step of epsilon from large noise, not projected (fast); free: replays each batch and "
        "updates images and weights with the same backward pass; or your own attack as module:function",
    )
    noise: float = setting(2.0, "n_fgsm: uniform noise before the step, the paper's k", unit="epsilons", ge=0, le=10)
    free_replays: int = setting(8, "free: updates per batch, the paper's m; divide the epochs by it", ge=2, le=100)
    on_collapse: Literal["stop", "pgd", "ignore"] = setting(
        "stop",
        "on catastrophic overfitting of single-step training (n_fgsm, free, pgd with one step): stop with the best "
        "weights, continue from them with pgd (num_steps, at least 2), or ignore it",
    )
    collapse_drop: float = setting(
        0.5, "relative drop of the validation robust accuracy from its best that counts as such", gt=0, lt=1
    )
    objective: Literal["auto", "cross_entropy", "kl"] = setting(
        "auto", "loss it maximizes; auto: for trades the KL divergence from the clean prediction, else cross-entropy"
    )
    awp: bool = setting(False, "adversarial weight perturbation before each update")
    awp_gamma: float = setting(0.005, "size of the weight perturbation relative to each kernel's norm", gt=0, le=1)
    batchnorm: Literal["eval", "train"] = setting(
        "eval", "BatchNorm during the attack: running or batch statistics; running statistics are never updated"
    )
    label_smoothing: bool = setting(True, "attack the label-smoothed loss that training minimizes (authors' code)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norm == "l2" and self.kind in ("n_fgsm", "free"):
            raise wrong("attack.kind", self.kind, "is defined for linf only", "use pgd with attack.norm=l2")
        if self.norm != "linf" and not {"epsilon", "step_size"} <= self.model_fields_set:
            remedy = "give attack.epsilon and attack.step_size; docs/evaluation.md lists the radius of each data set"
            raise wrong("attack.norm", self.norm, "radius and step size have no default in this norm", remedy)
        refuse(length_trouble("attack", self.norm, self.epsilon, self.step_size))
        if self.on_collapse == "pgd" and self.num_steps == 1:
            reason = "attack.num_steps=1 is a single step too and would collapse again"
            raise wrong("attack.on_collapse", "pgd", reason, "set attack.num_steps to 2 or more, or use stop or ignore")
        if self.awp and self.kind == "free":
            reason = "free training has one backward pass for images and weights, weight perturbation needs another"
            raise wrong("attack.awp", "True", reason, "use attack.kind pgd or n_fgsm")
        return self


class EvaluationAttack(Section):
    """An evaluation attack; what is not given is taken from the training attack.

    In another norm than the training attack's, the default radius is the one documented for the data set in that norm.
    """

    kind: Function | Literal["fgsm", "bim", "pgd", "mim", "cw"] = setting(
        "pgd", "attack; cw is PGD on the logit margin; or your own as module:function"
    )
    norm: Norm | None = setting(None, "norm of the perturbation; none: as in training")
    epsilon: Pixels | None = setting(
        None, "radius; none: as in training, or the data set's documented radius in another norm", unit=_LENGTH, gt=0
    )
    step_size: Pixels | None = setting(
        None, "step size; none: the training attack's, relative to the radius", unit="as epsilon", gt=0
    )
    num_steps: int = setting(20, "gradient steps", ge=1, le=10_000)
    num_restarts: int = setting(1, "random restarts; an image counts as broken if any of them breaks it", ge=1, le=1000)

    def lengths(self, training: AttackConfig, data_name: str) -> tuple[Norm, float | None, float | None]:
        """Norm, radius and step size, by default the training attack's or data set's; None where the norm has none."""
        norm = self.norm or training.norm
        inherited = training.epsilon if norm == training.norm else documented_radius(data_name, norm)
        epsilon = self.epsilon if self.epsilon is not None else inherited
        step_size = self.step_size
        if step_size is None and epsilon is not None:
            same = norm == training.norm and epsilon == training.epsilon
            # Not through a division where the radius is the same, so that the step stays exactly what it is.
            step_size = training.step_size if same else training.step_size / training.epsilon * epsilon
        return norm, epsilon, step_size
