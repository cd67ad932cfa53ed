"""Small files beside what Ray keeps, in a local folder or on S3."""

from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from tla_service.errors import UnavailableError
from tla_service.files import write_whole


class Folder:
    """A folder or prefix.

    Args:
        uri: Absolute path, or s3:// prefix.

    Raises:
        UnavailableError: It is neither.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.filesystem, path = FileSystem.from_uri(uri)
        except (OSError, ArrowInvalid) as error:
            raise self.unavailable(error) from error
        self.path = path.rstrip("/")

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted.

        Raises:
            UnavailableError: It cannot be read.
        """
        try:
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        except OSError as error:
            raise self.unavailable(error) from error
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it is not there.

        Raises:
            UnavailableError: It cannot be read.
        """
        path = f"{self.path}/{name}"
        try:
            if self.filesystem.get_file_info(path).type == FileType.NotFound:
                return None
            with self.filesystem.open_input_stream(path) as file:
                return bytes(file.read())
        except OSError as error:
            raise self.unavailable(error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; S3 shows an object once it is complete.

        Raises:
            UnavailableError: It cannot be written.
        """
        path = f"{self.path}/{name}"
        try:
            if isinstance(self.filesystem, LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_whole(Path(path), content)
                return
            with self.filesystem.open_output_stream(path) as file:
                file.write(content)
        except OSError as error:
            raise self.unavailable(error) from error

    def delete(self, name: str) -> None:
        """Delete a file.

        Raises:
            UnavailableError: It is not there, or the folder cannot be written.
        """
        try:
            self.filesystem.delete_file(f"{self.path}/{name}")
        except OSError as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> UnavailableError:
        """What to raise when it cannot be used."""
        reason = f"cannot be read or written ({' '.join(str(error).split())[:300]})"
        return UnavailableError("scaling.storage", self.uri, reason, "repair it, then give the command with --resume")
