"""C sources compiled once at run time with the system's compiler, and loaded with ctypes.

The library lands in the user's cache folder under a name made from the source, the compiler and the CPU, and appears
there in one step, so that several processes may start at once. Whatever goes wrong (no compiler, no folder to write
to, a library that does not load) gives None and a line in the log: every kernel has a plain form to fall back on.

`INLAY_KERNELS=off` in the environment switches all compiled kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger("inlay.kernels")

_COMMON = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")
# From the best to the plainest. OpenMP is linked by its usual name, which torch has loaded already, so that its
# threads are shared.
_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())


def enabled() -> bool:
    """Whether compiled kernels may be used."""
    return os.environ.get("INLAY_KERNELS", "on").lower() not in ("off", "0", "false", "no")


@cache
def load(source: str) -> ctypes.CDLL | None:
    """Compile (or find) and load the C file `source` of this folder; None where that is not possible."""
    try:
        return _load(Path(__file__).with_name(source))
    except Exception as error:
        log.info("no compiled %s: %s", source, error)
        return None


def _load(source: Path) -> ctypes.CDLL:
    text = source.read_bytes()
    compiler = _compiler()
    key = hashlib.sha256(b"\0".join([text, " ".join(compiler).encode(), _cpu().encode()])).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / name
        if library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError as error:
                log.info("%s is damaged and compiled anew: %s", library, error)
        _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        log.info("cannot use %s: %s", folder, error)
    with tempfile.TemporaryDirectory(prefix="inlay-") as private:  # a loaded library outlives its file
        library = Path(private) / name
        _compile(compiler, source, library)
        return ctypes.CDLL(str(library))


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    handle, partial = tempfile.mkstemp(dir=library.parent, suffix=".partial")
    os.close(handle)
    reason = ""
    try:
        for flags in _FLAGS:
            command = [*compiler, *_COMMON, *flags, str(source), "-o", partial]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                log.info("compiled %s", shlex.join(command))
                os.replace(partial, library)
                return
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode)
    finally:
        Path(partial).unlink(missing_ok=True)
    raise RuntimeError(f"{compiler[0]} failed: {reason}")


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/inlay/kernels`, or `~/.cache/inlay/kernels`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "inlay" / "kernels"


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    raise RuntimeError("no C compiler (cc, gcc, clang, or $CC)")


def _cpu() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of different kinds."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.system()} {platform.machine()} {flags}"
