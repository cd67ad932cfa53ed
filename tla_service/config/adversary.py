"""The adversaries of a run: the one that training meets, and those of the evaluation."""

from typing import Literal, NamedTuple, Self

from pydantic import model_validator

from tla_service.config.bounds import Norm, length_trouble
from tla_service.config.fields import Pixels, Section, setting, wrong
from tla_service.config.radii import documented_radius


class AttackConfig(Section):
    """The adversary that training meets: images stay within epsilon of the original and in [0, 1]."""

    norm: Norm = setting("linf", "norm of the perturbation; l2 needs epsilon and step_size")
    epsilon: Pixels = setting(8 / 255, "radius of the perturbation", unit="pixels in [0, 1], or L2 length", gt=0)
    step_size: Pixels = setting(2 / 255, "length of one attack step", unit="as epsilon", gt=0)
    num_steps: int = setting(7, "gradient steps", ge=1, le=10_000)
    warmup: float = setting(
        0.0,
        "share of the run over which epsilon and step_size grow to their full length; under a large radius a fresh "
        "network may learn nothing",
        ge=0,
        le=1,
    )
    random_start: bool = setting(True, "start at a random point of the ball")
    kind: Literal["pgd", "n_fgsm", "free"] = setting(
        "pgd",
        "pgd; n_fgsm: one step of epsilon from large noise, not projected (fast); free: replays each batch, images and "
        "weights move by the same backward pass",
    )
    noise: float = setting(2.0, "n_fgsm: uniform noise before the step, the paper's k", unit="epsilons", ge=0, le=10)
    free_replays: int = setting(
        8, "free: updates from each batch, the paper's m; divide the epochs by it", ge=2, le=100
    )
    on_collapse: Literal["stop", "pgd", "ignore"] = setting(
        "stop",
        "when single-step training (n_fgsm, free, one step of pgd) breaks down under the validation attack: end with "
        "the best weights, go on from them with num_steps (at least 2) of pgd, or do nothing",
    )
    collapse_drop: float = setting(
        0.5, "what counts as that: robust accuracy lower than the best so far by this share of it", gt=0, lt=1
    )
    objective: Literal["auto", "cross_entropy", "kl"] = setting(
        "auto", "what it ascends; auto: TRADES' divergence from the clean prediction for trades, else cross-entropy"
    )
    awp: bool = setting(False, "also move the weights against the loss before each update (adversarial weights)")
    awp_gamma: float = setting(0.005, "how far, as a share of each kernel's norm", gt=0, le=1)
    batchnorm: Literal["eval", "train"] = setting(
        "eval", "BatchNorm while crafting: running or batch statistics; running statistics never change either way"
    )
    label_smoothing: bool = setting(True, "craft against the smoothed loss that training minimises (the authors' code)")

    @property
    def is_single_step(self) -> bool:
        """Whether catastrophic overfitting is to be watched for."""
        return self.kind != "pgd" or self.num_steps == 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norm == "l2" and self.kind != "pgd":
            raise wrong("attack.kind", self.kind, "is defined for linf only", "use pgd with attack.norm=l2")
        if self.norm != "linf" and not {"epsilon", "step_size"} <= self.model_fields_set:
            remedy = "give attack.epsilon and attack.step_size; docs/evaluation.md lists the radius of each data set"
            raise wrong("attack.norm", self.norm, "radius and step size have no default in this norm", remedy)
        trouble = length_trouble("attack", self.norm, self.epsilon, self.step_size)
        if trouble is not None:
            raise wrong(*trouble)
        if self.on_collapse == "pgd" and self.num_steps == 1:
            reason = "attack.num_steps=1 makes that a single step too, which would collapse again"
            raise wrong(
                "attack.on_collapse", "pgd", reason, "set attack.num_steps to 2 or more, or take stop or ignore"
            )
        if self.awp and self.kind == "free":
            reason = "free training moves weights and images by one backward pass, adversarial weights need another"
            raise wrong("attack.awp", "True", reason, "use attack.kind pgd or n_fgsm")
        return self


class Lengths(NamedTuple):
    """Norm, radius and step size of an attack; the radius is None where the norm has none."""

    norm: Norm
    epsilon: float | None
    step_size: float | None


class EvaluationAttack(Section):
    """An adversary of the evaluation; what is not given is taken from the training attack.

    In another norm than the training attack's, the radius is the one documented for the data set in that norm.
    """

    kind: Literal["fgsm", "bim", "pgd", "mim", "cw"] = setting("pgd", "attack; cw is PGD on the logit margin")
    norm: Norm | None = setting(None, "norm of the perturbation; none: as in training")
    epsilon: Pixels | None = setting(
        None,
        "radius; none: as in training, or in another norm the one documented for the data set",
        unit="pixels in [0, 1], or L2 length",
        gt=0,
    )
    step_size: Pixels | None = setting(
        None, "length of one step; none: the training attack's share of the radius", unit="as epsilon", gt=0
    )
    num_steps: int = setting(20, "gradient steps", ge=1, le=10_000)
    num_restarts: int = setting(1, "random restarts; an image counts as broken if any of them breaks it", ge=1, le=1000)

    def lengths(self, training: AttackConfig, data_name: str) -> Lengths:
        """Norm, radius and step size, with what is not given filled in.

        Args:
            training: The attack that they are taken from. Its radius counts in its own norm only; its step size as a
                share of its radius.
            data_name: Data set whose documented radius another norm takes.
        """
        norm = self.norm or training.norm
        inherited = training.epsilon if norm == training.norm else documented_radius(data_name, norm)
        epsilon = self.epsilon if self.epsilon is not None else inherited
        step_size = self.step_size
        if step_size is None and epsilon is not None:
            same = norm == training.norm and epsilon == training.epsilon
            # The training attack's own step must not pass through a division, so that it stays what it is.
            step_size = training.step_size if same else training.step_size / training.epsilon * epsilon
        return Lengths(norm, epsilon, step_size)
