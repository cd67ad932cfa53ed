"""Show what the service sees of a data set: classes, splits, sizes, files left out, duplicates, and a contact sheet.

python jobs/inspect_data.py --data.name image_folder --data.root /data/birds --output inspection
"""

import json
import sys
from pathlib import Path

from pydantic import Field

from tla_service.config import DataConfig
from tla_service.config.fields import setting
from tla_service.config.loading import JobSettings, read_settings
from tla_service.files import expanded, whole_file, write_whole
from tla_service.job import run_job


class InspectSettings(JobSettings):
    """Settings of an inspection."""

    data: DataConfig = DataConfig()
    seed: int = setting(0, "seed of the run, which chooses the validation images", ge=0, lt=2**31)
    output: Path | None = Field(None, description="folder for contact_sheet.png and inspection.json; none: print only")


def main() -> int:
    """Read the settings, inspect, print, write; the error of the first image that cannot be used ends the job."""
    settings = read_settings(InspectSettings)
    # Imported late, so that --help and invalid settings do not wait for torch.
    from tla_service.data.cache import disk_trouble
    from tla_service.data.inspection import inspect_dataset

    output = expanded("output", settings.output) if settings.output is not None else None
    if output is not None:
        with disk_trouble("output", output, "choose another --output"):
            output.mkdir(parents=True, exist_ok=True)
    found = inspect_dataset(settings.data, settings.seed)
    print(*found.lines(), sep="\n")
    if output is not None:
        sheet = output / "contact_sheet.png"
        with disk_trouble("output", output, "choose another --output"):
            with whole_file(sheet) as part:
                found.sheet.save(part, "PNG")
            write_whole(output / "inspection.json", json.dumps(found.facts, indent=1))
        print(f"contact sheet {sheet}")
    for error in found.errors:
        raise error
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
