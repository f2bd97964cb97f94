"""Everything one does with minivlp, with nothing but Python 3.10 or newer:

    python tasks.py run 01       make the environment, run lesson 01, leave it as an HTML page in build/
    python tasks.py lab          open JupyterLab on the lessons
    python tasks.py check        what is on this machine: device, dtype, memory, missing packages
    python tasks.py test         every test, and every lesson run again with its outputs compared
    python tasks.py style        ruff
    python tasks.py notebooks    rebuild the notebooks from notebooks/src
    python tasks.py bench        every benchmark (or: bench NAME)

What stands after the job's name is passed on: `python tasks.py test tests/test_scenes.py -x`.
The first call makes .venv and installs into it (some minutes, several GB: torch is large); later calls start at once.
MINIVLP_VENV puts the environment elsewhere; MINIVLP_PROFILE=quick|laptop|gpu sizes the lessons.
"""

import hashlib
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

OLDEST = (3, 10)
ROOT = Path(__file__).resolve().parent
ENV = Path(os.environ.get("MINIVLP_VENV") or ROOT / ".venv").resolve()
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = ENV / "minivlp-installed"


def wanted():
    """What an up-to-date environment is stamped with."""
    parts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    parts += [str(ROOT), sys.version, platform.machine()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def serves_already():
    """True if the Python that runs this is an environment of the reader's own (conda, uv, …) holding this checkout."""
    from importlib.metadata import distributions

    if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"):
        return False
    urls = (found.read_text("direct_url.json") or "" for found in distributions(name="minivlp"))
    return Path(sys.prefix).resolve() != ENV and any(ROOT.as_uri() + '"' in url for url in urls)


def works(*command):
    """Whether the environment's Python carries this out."""
    quiet = subprocess.DEVNULL
    return PYTHON.exists() and subprocess.call([str(PYTHON), *command], stdout=quiet, stderr=quiet) == 0


def make_environment():
    """A virtual environment with a working pip at ENV; a broken or half-made one is made anew."""
    if works("-m", "pip", "--version"):
        return
    if ENV.exists() and any(ENV.iterdir()) and not (ENV / "pyvenv.cfg").exists():
        sys.exit(f"{ENV} is no virtual environment and will not be overwritten. Set MINIVLP_VENV to another folder.")
    try:
        venv.create(ENV, clear=True, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        remedy = "On Debian or Ubuntu: apt install python3-venv. " if sys.platform == "linux" else ""
        sys.exit(f"No virtual environment can be made in {ENV}: {error}\n{remedy}Or set MINIVLP_VENV to another place.")


def install():
    """Bring the environment up to date, return its Python. The stamp is written last: a stopped install is redone."""
    if serves_already():
        return sys.executable
    if not (STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted() and PYTHON.exists()):
        print(f"Preparing {ENV}: once, some minutes.", flush=True)
        make_environment()
        STAMP.unlink(missing_ok=True)
        pip = [str(PYTHON), "-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"]
        if subprocess.call(pip, cwd=ROOT):
            sys.exit("\nNot installed: pip's last lines say why. The same command again goes on from here.")
        STAMP.write_text(wanted(), encoding="utf-8")
    return str(PYTHON)


def benchmarks(names):
    """The benchmarks asked for by name, or all of them, as modules to run."""
    there = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if not path.stem.startswith("_")]
    unknown = [name for name in names if name not in there]
    if unknown or not there:
        sys.exit(f"No benchmark called {', '.join(unknown) or 'so'}. There are: {', '.join(there) or 'none yet'}.")
    return [["-m", f"benchmarks.{name}"] for name in names or there]


def commands(job, rest):
    """The lists of arguments for Python that carry a job out, one after the other; None if there is no such job."""
    if job == "run":
        if len(rest) != 1:
            sys.exit("Which lesson? For example: python tasks.py run 01")
        return [["tools/build_notebooks.py", "--html", "--only", rest[0]]]
    if job == "bench":
        return benchmarks(rest)
    fixed = {
        "lab": ["-m", "jupyterlab", "notebooks"],
        "check": ["-m", "minivlp.device"],
        "test": ["-m", "pytest"],
        "style": ["-m", "ruff", "check", "."],
        "notebooks": ["tools/build_notebooks.py"],
    }
    return [fixed[job] + rest] if job in fixed else None


def main(arguments):
    """Carry out one job; the exit status is that of the first step that failed, else 0."""
    if sys.version_info < OLDEST:
        sys.exit(
            f"minivlp needs Python 3.10 or newer; this is {platform.python_version()}, at {sys.executable}.\n"
            "Start tasks.py with a newer one, for example: python3.11 tasks.py run 01"
        )
    job, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    steps = commands(job, rest)
    if steps is None:
        print(__doc__)
        return 0 if job in ("help", "-h", "--help") else 2
    python = install()
    for step in steps:
        status = subprocess.call([python, *step], cwd=ROOT)
        if status:
            return status
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
