"""Log lines for machines: one JSON object each, with the run and the rank they are about."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tla_service.errors import without_credentials


def json_line(level: str, fields: Mapping[str, Any]) -> str:
    """A record as one line: `time` (seconds since 1970), `level`, and the fields; what is no JSON becomes text."""
    line = json.dumps({"time": round(time.time(), 3), "level": level, **fields}, default=str)
    return without_credentials(line)


class JsonFormatter(logging.Formatter):
    """Formats log records so.

    Args:
        labels: Fields of every line, such as `run`, `run_id` and `rank`.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        super().__init__()
        self.labels = labels

    def format(self, record: logging.LogRecord) -> str:
        """One record, its traceback within it."""
        fields = {"logger": record.name, "message": record.getMessage(), **self.labels}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), fields)


def log_as_json(labels: Mapping[str, Any], level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Let this process log JSON lines and nothing else, to standard error unless told otherwise.

    Args:
        labels: Fields of every line. What is put into the mapping later is in the lines from then on.
        level: Of this project's loggers; others tell from warnings upwards.
        stream: Where to.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(labels))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tla_service").setLevel(level)
