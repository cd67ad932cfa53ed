"""Labels of Parquet files, whatever their type, to class numbers."""

from dataclasses import dataclass

import torch

from tla_service.data.parquet_files import Shard, class_names, label_kind, read_column, unlike_first
from tla_service.data.trees import notice
from tla_service.errors import ConfigError, UnavailableError

_BATCH = 2**16
_MOSTLY = 0.9  # share of distinct labels above which they identify images, not classes
_FIX = "correct the labels, or leave these rows out"

Value = int | str | bool | None


@dataclass(frozen=True)
class Labels:
    """Labels of a split: distinct ``values``, sorted, ``None`` last, and each row's position in them (N,), int64."""

    column: str
    shards: list[Shard]
    values: list[Value]
    codes: torch.Tensor

    @property
    def kind(self) -> str | None:
        """As ``label_kind``; the same in all files."""
        return label_kind(self.shards[0].schema.field(self.column).type)

    @property
    def all_missing(self) -> bool:
        """Whether no row has a label."""
        return not any(map(_is_label, self.values))

    def first_row(self, code: int) -> str:
        """File and number of the first row with a value, for messages."""
        row = int((self.codes == code).nonzero()[0])
        for shard in self.shards:
            if row < shard.rows:
                return f"{shard.path}, row {row}"
            row -= shard.rows
        raise IndexError(row)


def _is_label(value: Value) -> bool:
    """Null, negative numbers and empty text mark images without a label."""
    return value not in (None, "") and not (isinstance(value, int) and value < 0)


def read_labels(shards: list[Shard], column: str) -> Labels:
    """Read the labels of a split; UnavailableError if files are damaged, or hold labels of different types."""
    kind = label_kind(shards[0].schema.field(column).type)
    for shard in shards:
        if column not in shard.schema.names or label_kind(shard.schema.field(column).type) != kind:
            raise unlike_first(shard, shards[0], f"{column!r} of {kind}")

    found: list[Value] = []
    for shard in shards:
        for array in read_column(shard.path, column, _BATCH):
            found += array.to_pylist()
    values = sorted(set(found), key=lambda value: (value is None, value))
    codes = {value: code for code, value in enumerate(values)}
    return Labels(column, shards, values, torch.tensor([codes[value] for value in found], dtype=torch.int64))


def number_classes(train: Labels, *others: Labels, checked: bool = True) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Turn labels into class numbers, the same in all splits.

    Integers with class names in the metadata are positions in those names, whose order may differ between files.
    Other labels are classes by their distinct training values, sorted; the values become the class names. Returns the
    class names, and the classes of each split's images (N,), int64. Unless ``checked``, any values are classes.
    """
    for labels in (train, *others):
        for code, value in enumerate(labels.values):
            if not _is_label(value):
                raise UnavailableError("data.root", labels.first_row(code), f"has no label ({value!r})", _FIX)
        if labels.kind != train.kind:
            reason = f"labels are {labels.kind}, those of the training files {train.kind}"
            raise UnavailableError("data.root", labels.shards[0].path, reason, "write the labels of both in one type")
    names = next(filter(None, (_own_names(train, shard) for shard in train.shards)), ())
    if names:
        first = int(train.values == list(range(1, len(names) + 1)))
        if first:
            notice("%s: labels start at 1; 1 is taken for class %r", train.shards[0].path, names[0])
        return names, [_by_name(labels, names, first) for labels in (train, *others)]
    if checked:
        _check_values(train)
    return tuple(map(str, train.values)), [train.codes, *(_by_value(labels, train) for labels in others)]


def _own_names(labels: Labels, shard: Shard) -> tuple[str, ...]:
    return class_names(shard.schema, labels.column) if labels.kind == "integers" else ()


def _by_name(labels: Labels, names: tuple[str, ...], first: int) -> torch.Tensor:
    """Classes of labels that are positions in each file's own class names."""
    numbers = {name: number for number, name in enumerate(names)}
    parts = []
    for shard, codes in zip(labels.shards, labels.codes.split([shard.rows for shard in labels.shards]), strict=True):
        own = _own_names(labels, shard) or names
        # By position where the names are the same, since they need not be distinct.
        by_place = list(range(len(names))) if own == names else [numbers.get(name, -1) for name in own]
        places = [int(value or 0) - first for value in labels.values]
        found = torch.tensor([by_place[place] if 0 <= place < len(own) else -1 for place in places])[codes]
        if len(codes) and int(found.min()) < 0:
            row = int(found.argmin())
            value = int(labels.values[int(codes[row])] or 0)
            reason = f"label {value}, but only {len(own)} class names"
            if 0 <= value - first < len(own):
                reason = f"class {own[value - first]!r} is not among the classes of the training files"
            raise UnavailableError("data.root", f"{shard.path}, row {row}", reason, "use the same classes in all files")
        parts.append(found)
    return torch.cat(parts)


def _check_values(train: Labels) -> None:
    """Refuse labels that identify images rather than classes; warn of integers that are not 0 to K-1."""
    values, shown = train.values, train.shards[0].path
    if len(values) > _MOSTLY * len(train.codes):
        reason = f"has {len(values)} distinct values in {len(train.codes)} rows, so it identifies images, not classes"
        raise ConfigError("data.label_column", train.column, reason, "set it to the column of labels")
    if train.kind != "integers" or values == list(range(len(values))):
        return
    if values == list(range(1, len(values) + 1)):
        notice("%s: labels start at 1; classes keep their labels as names", shown)
    else:
        notice("%s: labels are %d numbers from %d to %d; each is a class", shown, len(values), values[0], values[-1])


def _by_value(test: Labels, train: Labels) -> torch.Tensor:
    """Classes of test labels: the positions of their values among the training values."""
    numbers = {value: number for number, value in enumerate(train.values)}
    for code, value in enumerate(test.values):
        if value not in numbers:
            reason = f"class {value!r} is not among the classes of the training files"
            raise UnavailableError("data.root", test.first_row(code), reason, "use the same classes in all files")
    return torch.tensor([numbers[value] for value in test.values])[test.codes]
