"""Generate the tables of settings in configuration.md, sweeps.md and evaluation.md from the settings classes.

python docs/make_configuration.py
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tla_service.config import RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.fields import AttackName, Function, TagName, TagValue, parse_fraction
from tla_service.config.loading import RunSettings, load_settings
from tla_service.config.radii import RADII
from tla_service.models.catalog import model_names
from tla_service.report.settings import EvaluateSettings
from tla_service.tuning.settings import Dimension, Objective, SweepConfig, TuneSettings

PAGE = Path(__file__).with_name("configuration.md")
SWEEPS, EVALUATION = PAGE.with_name("sweeps.md"), PAGE.with_name("evaluation.md")
BEGIN = "<!-- settings: written by docs/make_configuration.py -->"
END = "<!-- end of settings -->"
EXAMPLE = re.compile(r"digits-tla-s0-[0-9a-f]{8}")
_HEAD = ("| setting | type or choices | default | range, unit | meaning |", "|---|---|---|---|---|")
_RADII_HEAD = ("| data set | L-infinity | L2 |", "|---|---|---|")
_NETWORKS_HEAD = ("| network | description |", "|---|---|")
_NETWORKS = {
    "digits_cnn": "two convolutions without BatchNorm for the 8x8 digits; embedding 128",
    "small_cnn": "two strided convolutions without BatchNorm for 28x28 or 32x32 on a CPU; embedding 128",
    "cifar_cnn": "three strided convolutions without BatchNorm for 32x32 on a CPU; embedding 128",
    "cifar_cnn_bn": "the same with BatchNorm after each convolution; embedding 128",
    "mnist_cnn": "the paper's MNIST network (Mao et al. 2019, Table 5); embedding 1024",
    "mnist_mlp": "the authors' MNIST multilayer perceptron; embedding 1024",
    "wrn_32_10": "the paper's CIFAR-10 network, Madry et al.'s wide ResNet (Table 6); embedding 640",
    "wrn_28_10": "wide ResNet 28-10 as in TRADES and RobustBench; embedding 640",
    "wrn_34_10": "wide ResNet 34-10 as in TRADES and RobustBench; embedding 640",
    "preact_resnet_18": "pre-activation ResNet-18 as in Rice et al. 2020; embedding 512",
    "tiny_resnet50_stride2": "the paper's main Tiny ImageNet network; embedding 2048",
    "tiny_resnet50_stride1": "the same with a stride-1 stem (Table 7), about 16 times the work; embedding 2048",
    "tiny_resnet20_stride1": "the paper's small Tiny ImageNet network (Table 7); embedding 512",
}
_TYPES = {
    bool: "`true`, `false`",
    int: "integer",
    float: "number",
    str: "string",
    Path: "path",
    tuple[int, ...]: "list of integers",
    dict[TagName, TagValue]: "mapping of strings",
    dict[Function, float]: "mapping of `module:function` to numbers",
    dict[AttackName, EvaluationAttack]: "mapping of names to attacks",
    dict[str, Dimension]: "mapping of fields to dimensions",
    dict[str, dict[str, typing.Any]]: "mapping of names to fields",
    tuple[int, int]: "two integers",
    tuple[str, ...]: "list of strings",
    tuple[typing.Any, ...]: "list",
    tuple[Objective, ...]: "list of `robust_accuracy`, `clean_accuracy`",
}


def page_with_tables(page: str) -> str:
    """The page with its generated tables and the current run name in its examples."""
    example = load_settings(["--preset", "digits"]).run_config.run_name
    return _between_markers(EXAMPLE.sub(example, page), tables())


def sweeps_with_tables(page: str) -> str:
    """The page on sweeps with its generated tables."""
    text = f"{Dimension.__doc__} Fields of each entry of `sweep.space`."
    beside = [name for name in TuneSettings.model_fields if name not in RunSettings.model_fields and name != "sweep"]
    blocks = [
        _block("`sweep`", SweepConfig.__doc__ or "", _rows(SweepConfig, list(SweepConfig.model_fields), "sweep.")),
        _block("Search dimensions", text, _rows(Dimension, list(Dimension.model_fields))),
        _block("Job options", "In addition to those of a run.", _rows(TuneSettings, beside)),
    ]
    return _between_markers(page, "\n".join(blocks))


def evaluation_with_tables(page: str) -> str:
    """The page on evaluation with its generated tables."""
    shared = {"scaling", "tracking"}
    fields = {name: field for name, field in EvaluateSettings.model_fields.items() if name not in shared}
    sections = {name: kind for name, field in fields.items() if (kind := _section(field)) is not None}
    own = [name for name in fields if name not in sections]
    text = "`scaling` and `tracking` are as for a run."
    blocks = [_radii(), _block("The evaluation", text, _rows(EvaluateSettings, own))]
    for name, kind in sections.items():
        blocks.append(_block(f"`{name}`", kind.__doc__ or "", _rows(kind, list(kind.model_fields), f"{name}.")))
    return _between_markers(page, "\n".join(blocks))


def _radii() -> str:
    """The documented radii, one row per data set."""
    names = list(dict.fromkeys(name for name, _ in RADII))
    rows = [_row(f"`{name}`", *(_radius(RADII.get((name, norm))) for norm in ("linf", "l2"))) for name in names]
    text = "Default radii for a norm other than the training norm."
    return "\n".join(["### Documented radii", "", text, "", *_RADII_HEAD, *rows, ""])


def _radius(radius: tuple[float, str] | None) -> str:
    if radius is None:
        return "none; set one"
    epsilon, source = radius
    fraction = Fraction(epsilon).limit_denominator(255)
    shown = str(fraction) if fraction.denominator == 255 else f"{epsilon:g}"
    return f"{shown} ({source})"


def _between_markers(page: str, text: str) -> str:
    before, found_begin, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def tables() -> str:
    """All settings as Markdown: the run, its sections, evaluation attacks, networks, job options."""
    sections = {name: kind for name, field in RunConfig.model_fields.items() if (kind := _section(field)) is not None}
    own = [name for name in RunConfig.model_fields if name not in sections]
    beside = [name for name in RunSettings.model_fields if name not in RunConfig.model_fields]
    blocks = [_block("The run", "Name, method and seed.", _rows(RunConfig, own))]
    for name, kind in sections.items():
        blocks.append(_block(f"`{name}`", kind.__doc__ or "", _rows(kind, list(kind.model_fields), f"{name}.")))
    attack = list(EvaluationAttack.model_fields)
    text = f"{inspect.getdoc(EvaluationAttack)} Fields of `evaluation.validation` and each entry of `evaluation.test`."
    blocks.append(_block("Evaluation attacks", text, _rows(EvaluationAttack, attack)))
    networks = [_row(f"`{name}`", _plain(_NETWORKS[name])) for name in model_names()]
    networks.append(_row("`torchvision:NAME`", "a classifier of torchvision, such as `torchvision:resnet18`"))
    networks.append(_row("`timm:NAME`", "a network of timm, such as `timm:vit_tiny_patch16_224` (`tla-service[timm]`)"))
    networks.append(_row("`package.module:factory`", "[your own network](networks.md)"))
    blocks.append("\n".join(["### Networks", "", "Values of `model.name`.", "", *_NETWORKS_HEAD, *networks, ""]))
    text = "Not part of the run: neither in `config.yaml` nor among the MLflow parameters."
    blocks.append(_block("Job options", text, _rows(RunSettings, beside)))
    return "\n".join(blocks)


def _block(title: str, text: str, rows: Iterator[str]) -> str:
    return "\n".join([f"### {title}", "", text, "", *_HEAD, *rows, ""])


def _rows(section: type[BaseModel], names: list[str], prefix: str = "") -> Iterator[str]:
    for name in names:
        field = section.model_fields[name]
        meaning, facts = _split_facts(field.description or "fields are below")
        yield _row(f"`{prefix}{name}`", _type(field), _default(field), _plain(facts), _plain(meaning))
        nested = _section(field)
        if nested is not None and field.description is None:
            yield from _rows(nested, list(nested.model_fields), f"{prefix}{name}.")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text with escaped angle brackets."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _split_facts(description: str) -> tuple[str, str]:
    """Split a description `text [facts]`; facts may contain brackets."""
    if not description.endswith("]"):
        return description, ""
    depth = 0
    for place in range(len(description) - 1, -1, -1):
        depth += {"]": 1, "[": -1}.get(description[place], 0)
        if depth == 0:
            return description[:place].rstrip(), description[place + 1 : -1]
    return description, ""


def _takes_fractions(field: FieldInfo) -> bool:
    members = (field.annotation, *typing.get_args(field.annotation))
    metadata = [*field.metadata, *(data for member in members for data in getattr(member, "__metadata__", ()))]
    return any(getattr(data, "func", None) is parse_fraction for data in metadata)


def _type(field: FieldInfo) -> str:
    if _section(field) is not None:
        return "section"
    members = [field.annotation]
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        members = list(typing.get_args(field.annotation))
    return " or ".join(_member(member, fraction=_takes_fractions(field)) for member in members)


def _member(kind: object, *, fraction: bool) -> str:
    if kind == Function:
        return "`module:function`"
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in typing.get_args(kind))
    if kind is types.NoneType:
        return "none"
    return "number or fraction" if fraction and kind is float else _TYPES[kind]  # type: ignore[index]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, dict) and value:
        return ", ".join(f"`{name}`" for name in value)
    if isinstance(value, BaseModel):
        shown = "{" + ", ".join(f"{name}: {item}" for name, item in value.model_dump(exclude_none=True).items()) + "}"
    elif isinstance(value, bool):
        shown = str(value).lower()
    elif isinstance(value, float) and _takes_fractions(field) and value and (value * 255).is_integer():
        shown = f"{value * 255:g}/255"
    else:
        shown = f"{value:g}" if isinstance(value, float) else ("" if value in ((), {}) else str(value))
    return f"`{shown}`" if shown else "empty"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SWEEPS.write_text(sweeps_with_tables(SWEEPS.read_text(encoding="utf-8")), encoding="utf-8")
    EVALUATION.write_text(evaluation_with_tables(EVALUATION.read_text(encoding="utf-8")), encoding="utf-8")
