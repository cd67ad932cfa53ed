"""Run the Dockerfile's steps with chroot, on a machine without a container engine. Requires root and debootstrap.

    sudo python deploy/image/rehearse.py /var/tmp/rehearsal --arg VARIANT=cuda
    sudo chroot --userspec 1000:1000 /var/tmp/rehearsal/service /opt/tla/bin/python -c "import tla_service"

Every stage is a folder, created from a plain Debian with Python. FROM, ARG, ENV, WORKDIR, COPY, RUN and USER behave as
in a build; LABEL, HEALTHCHECK and CMD are ignored. Unlike in a build, Python is Debian's, and network and kernel are
the host's.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = "ca-certificates,python3,python3-venv,python3-pip,python-is-python3"
VARIABLE = re.compile(r"\$\{(\w+)\}")


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile: keyword and rest of the line, with continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for statement in "\n".join(lines).replace("\\\n", "\x00").splitlines():
        if statement.strip():
            keyword, _, rest = statement.replace("\x00", "\\\n").strip().partition(" ")
            yield keyword.upper(), rest.strip()


class Build:
    """The stages of a Dockerfile, as folders.

    Args:
        work: Their parent folder.
        context: Build context.
        given: Build arguments.
        shared: Host files that every step may read, such as certificates.
    """

    def __init__(self, work: Path, context: Path, given: dict[str, str], shared: list[Path]) -> None:
        self.work, self.context, self.given, self.shared = work, context, given, shared
        self.root, self.folder, self.user, self.variables = work, "/", "0", dict[str, str]()

    def begin(self, rest: str) -> None:
        """FROM: a copy of the named stage, else of the plain system."""
        origin, _, name = rest.partition(" AS ")
        source = self.work / origin if (self.work / origin).is_dir() else self.plain_system()
        self.root, self.folder, self.user = self.work / name, "/", "0"
        shutil.rmtree(self.root, ignore_errors=True)
        # Hard links: package managers and pip replace files instead of modifying them in place.
        subprocess.run(["cp", "--archive", "--link", source, self.root], check=True)
        state = self.work / f"{origin}.json"
        self.folder, self.variables = json.loads(state.read_text()) if state.exists() else ("/", {})

    def plain_system(self) -> Path:
        """Debian with Python, created once."""
        target = self.work / "base"
        if not (target / "usr/bin/python").exists():
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", target], check=True
            )
        return target

    def put(self, rest: str) -> None:
        """COPY, with --from and --chown."""
        *sources, target = [word for word in shlex.split(rest) if not word.startswith("--")]
        flags = dict(re.findall(r"--(\w+)=(\S+)", rest))
        origin = self.work / flags["from"] if "from" in flags else self.context
        destination = self.root / str(Path(self.folder, target)).lstrip("/")
        for found in [path for source in sources for path in sorted(origin.glob(source.lstrip("/")))]:
            into = destination / found.name if target.endswith("/") else destination
            into.parent.mkdir(parents=True, exist_ok=True)
            links = ["--link"] if "from" in flags else []
            subprocess.run(["cp", "--archive", *links, "--no-target-directory", found, into], check=True)
            subprocess.run(["chown", "--recursive", flags.get("chown", "0:0"), into], check=True)

    def run(self, rest: str) -> None:
        """RUN, as the stage's user, with bind mounts of other stages."""
        mounts = re.findall(r"^(?:--mount=(\S+)\s*(?:\\\n\s*)?)", rest)
        command = re.sub(r"^(--mount=\S+\s*(\\\n\s*)?)+", "", rest)
        options = [dict(part.split("=") for part in mount.split(",")) for mount in mounts]
        binds = [(self.work / option["from"] / option["source"].lstrip("/"), option["target"]) for option in options]
        self.chroot(command, binds)

    def chroot(self, command: str, binds: list[tuple[Path, str]]) -> None:
        """Run a shell command in the stage."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", **self.variables}
        binds = binds + [(path, str(path)) for path in self.shared]
        with mounted(self.root, binds):
            inside = ["/bin/sh", "-c", f"cd {self.folder} && {command}"]
            subprocess.run(["chroot", f"--userspec={self.user}", self.root, *inside], check=True, env=environment)

    def expand(self, text: str) -> str:
        """Substitute known ${variables}."""
        return VARIABLE.sub(lambda found: self.variables.get(found[1], self.given.get(found[1], "")), text)

    def step(self, keyword: str, rest: str) -> None:
        """Run one instruction."""
        if keyword == "FROM":
            self.begin(self.expand(rest))
        elif keyword == "ARG":
            name, _, default = rest.partition("=")
            self.variables[name] = self.given.setdefault(name, default)
        elif keyword == "ENV":
            path = self.variables.get("PATH", "/usr/local/bin:/usr/bin:/bin")
            text = rest.replace("\\\n", " ").replace("${PATH}", path)
            self.variables |= dict(pair.split("=", 1) for pair in shlex.split(self.expand(text)))
        elif keyword == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            self.user = rest
        elif keyword == "COPY":
            self.put(rest)
        elif keyword == "RUN":
            self.run(rest)
        if keyword in ("ENV", "WORKDIR"):
            (self.work / f"{self.root.name}.json").write_text(json.dumps([self.folder, self.variables]))


@contextmanager
def mounted(root: Path, binds: list[tuple[Path, str]]) -> Iterator[None]:
    """Mount kernel file systems, name resolution and folders of other stages during a step."""
    resolver = root / "etc/resolv.conf"
    resolver.unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", resolver)
    mounts = [(Path("/proc"), "/proc"), (Path("/dev"), "/dev"), (Path("/sys"), "/sys"), *binds]
    done: list[Path] = []
    try:
        for source, target in mounts:
            place = root / target.lstrip("/")
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            subprocess.run(["mount", "--bind", source, place], check=True)
            done.append(place)
        yield
    finally:
        for place in reversed(done):
            subprocess.run(["umount", place], check=True)


def main() -> None:
    """Build, and print the duration of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the stages; the final one is WORK/service")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="as docker's --build-arg")
    parser.add_argument("--share", action="append", default=[], type=Path, help="host file that steps can read")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    build = Build(options.work.resolve(), ROOT, dict(pair.split("=", 1) for pair in options.arg), options.share)
    for keyword, rest in instructions(ROOT / "Dockerfile"):
        began = time.monotonic()
        print(f"{keyword} {rest}", flush=True)
        build.step(keyword, rest)
        if keyword in ("RUN", "COPY"):
            print(f"  -> {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
