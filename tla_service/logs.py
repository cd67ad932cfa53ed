"""JSON log lines with labels such as run and rank."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tla_service.errors import without_credentials


def json_line(level: str, fields: Mapping[str, Any]) -> str:
    """One line with `time` (seconds since 1970), `level` and the fields; values that are not JSON become text."""
    line = json.dumps({"time": round(time.time(), 3), "level": level, **fields}, default=str)
    return without_credentials(line)


class JsonFormatter(logging.Formatter):
    """Formats log records as JSON lines; `labels` are fields of every line."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        super().__init__()
        self.labels = labels

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, including its traceback."""
        fields = {"logger": record.name, "message": record.getMessage(), **self.labels}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), fields)


def log_as_json(labels: Mapping[str, Any], level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Make this process log JSON lines only, each with the labels: those that the mapping has at the time.

    The level is that of this project's loggers; others log warnings.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(labels))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tla_service").setLevel(level)
