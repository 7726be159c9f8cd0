"""Runs a program that sees its own folder and the system, and nothing else of this machine.

Linux can give a process its own view of the file system and of the network without any right of an
administrator (user and mount namespaces, `unshare`). `enclosed` wraps a command so: whatever call
it makes, files elsewhere are not there. Where that cannot be done, `reason_not_to` says why, and
the command runs as it is.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Bound into the new root, as far as they are there.
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt")
DEVICE_FOLDERS = ("/proc", "/sys", "/dev")
# $1: the new root. $2: the program's folder. $3: the folders to keep, one a line.
SCRIPT = """
set -e
root=$1 folder=$2 kept=$3
shift 3
mount -t tmpfs tmpfs "$root"
printf '%s\\n' "$kept" | while IFS= read -r one; do
  mkdir -p "$root$one"
  mount --rbind "$one" "$root$one"
done
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""


def kept_folders(folder: Path) -> list[str]:
    """What the program may see: the system, the interpreter's folders and its own."""
    kept = [name for name in (*SYSTEM_FOLDERS, *DEVICE_FOLDERS) if Path(name).is_dir()]
    for prefix in (sys.prefix, sys.base_prefix):
        path = str(Path(prefix).resolve())
        if not any(Path(path).is_relative_to(one) for one in kept):
            kept.append(path)
    return [*kept, str(folder)]


def interpreter() -> str:
    """This interpreter by a path that exists within, links to its environment followed."""
    return str(Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name)


def wrapped(command: list[str], folder: Path, root: Path, has_network: bool) -> list[str]:
    """The command within its enclosure. root: an empty folder outside `folder`."""
    options = ["--user", "--map-root-user", "--mount"]
    if not has_network:
        options.append("--net")
    kept = "\n".join(kept_folders(folder))
    shell = ["/bin/sh", "-c", SCRIPT, "enclosure", str(root), str(folder), kept]
    return ["unshare", *options, *shell, *command]


@functools.cache
def reason_not_to() -> str:
    """Why no program can be enclosed here; "" if it can. Tried once, with an empty program."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        return "this system has no unshare"
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as root:
        command = [interpreter(), "-S", "-c", "pass"]
        line = wrapped(command, Path(name).resolve(), Path(root).resolve(), False)
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        return f"this system does not allow it ({said[-1]})"
    return ""


def run(
    command: list[str], folder: Path, environ: dict[str, str], has_network: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command, given without the interpreter, in `folder`; enclosed if possible."""
    with tempfile.TemporaryDirectory() as root:
        line = [sys.executable, *command]
        if not reason_not_to():
            line = wrapped([interpreter(), *command], folder, Path(root).resolve(), has_network)
        return subprocess.run(
            line, cwd=folder, env=environ, capture_output=True, text=True, check=False
        )
