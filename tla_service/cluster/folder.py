"""Small files beside what Ray keeps, in a local folder or on S3."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from tla_service.errors import UnavailableError
from tla_service.files import write_whole


class Folder:
    """A folder or prefix; what cannot be read or written raises UnavailableError.

    Args:
        uri: Absolute path, or s3:// prefix.

    Raises:
        UnavailableError: It is neither.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._available():
            self.filesystem, path = FileSystem.from_uri(uri)
        self.path = path.rstrip("/")

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted."""
        with self._available():
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        path = f"{self.path}/{name}"
        with self._available():
            if self.filesystem.get_file_info(path).type == FileType.NotFound:
                return None
            with self.filesystem.open_input_stream(path) as file:
                return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; S3 shows an object once it is complete."""
        path = f"{self.path}/{name}"
        with self._available():
            if isinstance(self.filesystem, LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_whole(Path(path), content)
                return
            with self.filesystem.open_output_stream(path) as file:
                file.write(content)

    def delete(self, name: str) -> None:
        """Delete a file."""
        with self._available():
            self.filesystem.delete_file(f"{self.path}/{name}")

    def unavailable(self, error: Exception) -> UnavailableError:
        """What to raise when it cannot be used."""
        reason = f"cannot be read or written ({' '.join(str(error).split())[:300]})"
        return UnavailableError("scaling.storage", self.uri, reason, "repair it, then give the command with --resume")

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowInvalid) as error:
            raise self.unavailable(error) from error
