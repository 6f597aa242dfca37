"""The command line that isolates one Python program with bubblewrap. No torch.

Mounted read-only: the interpreter, its library folder and the system's library folders, with installed packages hidden.
There is no shell, no home, no device (not even /dev/null), no /etc except the linker's cache, and no access to our
working directory. Only /tmp can be written.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from aletheia.errors import SandboxError

_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64")
_PACKAGES = ("python*/site-packages", "python*/dist-packages")

# Isolated mode (-I) would ignore the hash seed; its parts do not: no user packages, no site, no script folder on the
# path. The environment holds nothing else.
PYTHON_OPTIONS = ("-s", "-S", "-P", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def interpreter() -> str:
    """Path of the real interpreter, not of the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def find_bubblewrap() -> str:
    """Path of ``bwrap``.

    Raises:
        SandboxError: it is not installed, or this is not Linux.
    """
    found = shutil.which("bwrap")
    if found is None or sys.platform != "linux":
        raise SandboxError(
            f"found no bubblewrap (bwrap) on this {platform.system()} machine, which isolates code that a model wrote; "
            "install the package 'bubblewrap' (Linux), or run the code without a sandbox with `unsafe_exec`"
        )
    return found


def _folders() -> Iterator[Path]:
    """Folders to mount: the standard library's parent (``lib``), then the system's, none inside another."""
    own = Path(os.__file__).resolve().parent.parent
    system = [Path(name) for name in _SYSTEM_LIBRARIES if os.path.isdir(name) and not os.path.islink(name)]
    if not any(own.is_relative_to(folder) for folder in system):
        yield own
    yield from system


def _mounts() -> Iterator[str]:
    folders = list(_folders())
    for folder in folders:
        yield from ("--ro-bind", str(folder), str(folder))
    for name in _SYSTEM_LIBRARIES:
        if os.path.islink(name):
            yield from ("--symlink", os.readlink(name), name)
    for folder in folders:
        for pattern in _PACKAGES:
            for packages in sorted(folder.glob(pattern)):
                if packages.is_dir() and not packages.is_symlink():
                    yield from ("--tmpfs", str(packages), "--remount-ro", str(packages))
    yield from ("--ro-bind", interpreter(), interpreter())
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")


def command(program: str, *, tmp_bytes: int, program_fd: int, filter_fd: int, status_fd: int) -> list[str]:
    """``bwrap`` and its options up to ``--``; ``program`` is the path of the program's text inside the sandbox.

    Raises:
        SandboxError: there is no bubblewrap.
    """
    options = [find_bubblewrap(), "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    options += ["--unshare-uts", "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    options += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--clearenv", "--chdir", "/tmp"]
    for name, value in ENVIRONMENT.items():
        options += ["--setenv", name, value]
    options += _mounts()
    # If root starts it, the program is still root for the kernel and owns /proc/sys, so /proc is mounted read-only. It
    # would also own the host's device nodes (chmod 000 /dev/null), so there are none; Python needs none.
    options += [
        "--proc",
        "/proc",
        "--remount-ro",
        "/proc",
        "--dir",
        "/dev",
        "--size",
        str(tmp_bytes),
        "--tmpfs",
        "/tmp",
    ]
    options += ["--ro-bind-data", str(program_fd), program, "--remount-ro", "/"]
    return [*options, "--seccomp", str(filter_fd), "--json-status-fd", str(status_fd), "--"]
