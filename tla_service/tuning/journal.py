"""The record of a sweep: a small file a trial, in a local folder or on S3, from which everything resumes."""

import json

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from tla_service.errors import UnavailableError
from tla_service.tuning.trial import Trial

SWEEP_FILE = "sweep.yaml"
OWNER_FILE = "driver.json"


class Journal:
    """Reads and writes a sweep's files.

    Args:
        storage: Folder or s3:// prefix of the sweep.

    Raises:
        UnavailableError: It cannot be reached.
    """

    def __init__(self, storage: str) -> None:
        self.storage = storage
        try:
            self._files, self._root = FileSystem.from_uri(storage)
        except (OSError, ArrowInvalid) as error:
            raise self._trouble(error) from error
        self._is_local = isinstance(self._files, LocalFileSystem)

    def trials(self) -> list[Trial]:
        """All trials, by number.

        Raises:
            UnavailableError: A file cannot be read, or one is missing.
        """
        try:
            found = self._files.get_file_info(FileSelector(f"{self._root}/trials", allow_not_found=True))
            paths = sorted(info.path for info in found if info.base_name[0] != ".")
            trials = [Trial.from_dict(json.loads(self._read(path))) for path in paths]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._trouble(error) from error
        if [trial.number for trial in trials] != list(range(len(trials))):
            raise self._trouble(FileNotFoundError(f"of {len(trials)} trials not all are there: {', '.join(paths)}"))
        return trials

    def save(self, trial: Trial) -> None:
        """Write a trial, whole or not at all.

        Raises:
            UnavailableError: The storage cannot be written.
        """
        self.write(f"trials/{trial.number:05d}.json", json.dumps(trial.as_dict()))

    def read(self, name: str) -> str | None:
        """A file's text; None if it is not there."""
        path = f"{self._root}/{name}"
        try:
            if self._files.get_file_info(path).type == FileType.NotFound:
                return None
            return self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._trouble(error) from error

    def write(self, name: str, text: str) -> None:
        """Write a file, whole or not at all: readers see the text before or after.

        Raises:
            UnavailableError: The storage cannot be written.
        """
        path = f"{self._root}/{name}"
        try:
            if not self._is_local:
                self._put(path, text)
                return
            folder, _, base = path.rpartition("/")
            self._files.create_dir(folder, recursive=True)
            self._put(f"{folder}/.{base}", text)
            self._files.move(f"{folder}/.{base}", path)
        except OSError as error:
            raise self._trouble(error) from error

    def _put(self, path: str, text: str) -> None:
        with self._files.open_output_stream(path) as file:
            file.write(text.encode())

    def _read(self, path: str) -> str:
        with self._files.open_input_stream(path) as file:
            return bytes(file.read()).decode()

    def _trouble(self, error: Exception) -> UnavailableError:
        reason = f"cannot be read or written ({' '.join(str(error).split())[:300]})"
        return UnavailableError("scaling.storage", self.storage, reason, "mend it and give the command with --resume")
