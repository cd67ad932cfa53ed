"""A run's folder in its storage: its checkpoints, and what Ray has recorded of them."""

import json
from pathlib import Path

from ray.train import Checkpoint
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from tla_service.cluster.folder import Folder
from tla_service.config import RunConfig
from tla_service.config_loading import same_run
from tla_service.errors import UnavailableError


class RunFolder(Folder):
    """The folder of a run.

    Args:
        storage: Folder or s3:// prefix of all runs.
        name: The run's name.

    Raises:
        UnavailableError: It cannot be reached; so do all methods.
    """

    def __init__(self, storage: str, name: str) -> None:
        super().__init__(f"{storage if '://' in storage else Path(storage).expanduser().absolute()}/{name}")

    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, newest first, whole or not."""
        return [self.checkpoint(name) for name in reversed(self.folders()) if name.startswith("step-")]

    def checkpoint(self, name: str) -> Checkpoint:
        """One of them."""
        return Checkpoint(f"{self.path}/{name}", self.filesystem)

    def forget_record(self) -> str:
        """Remove Ray's record of the checkpoints, which say themselves what they are.

        Ray refuses to start from a record that is damaged, of another version of Ray, or names a folder that is gone.

        Returns:
            What was wrong with it; empty for nothing.

        Raises:
            UnavailableError: There is a record, but no checkpoint is left.
        """
        text = self.read(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
        if text is None:
            return ""
        there, wrong = [checkpoint.path for checkpoint in self.checkpoints()], ""
        try:
            latest = (json.loads(text)["latest_checkpoint_result"] or {}).get("checkpoint_dir_name")
            if latest is not None and f"{self.path}/{latest}" not in there:
                wrong = f"checkpoint {self.path}/{latest} is missing"
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong = f"Ray's record of checkpoints, {self.path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}, is damaged"
        if wrong and not there:
            remedy = f"restore its files, or delete {self.path} to start over"
            raise UnavailableError("scaling.storage", self.uri, f"{wrong}, and no other is left", remedy)
        self.delete(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
        return f"{wrong}; falling back to {there[0]}" if wrong else ""

    def unavailable(self, error: Exception) -> UnavailableError:
        """What to raise when it cannot be used."""
        remedy = "check bucket, credentials and AWS_ENDPOINT_URL_S3, or the folder's permissions"
        return UnavailableError("scaling.storage", self.uri, super().unavailable(error).reason, remedy)


def earlier_name(config: RunConfig, storage: str) -> RunConfig:
    """The run under the name that its folder in the storage has; see `tla_service.training.output.find_output`."""
    if config.name:
        return config
    names = [
        name
        for name in RunFolder(storage, "").folders()
        if name.startswith(f"{config.name_stem}-") and len(name) == len(config.run_name)
    ]
    if config.run_name in names:
        return config
    for name in names:
        folder = RunFolder(storage, name)
        for checkpoint in folder.folders():
            text = folder.read(f"{checkpoint}/config.yaml")
            if text is not None and same_run(text.decode(errors="replace"), config):
                return config.model_copy(update={"name": name})
    return config
