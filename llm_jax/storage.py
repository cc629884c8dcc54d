"""Paths, wherever files lie: `as_path` makes pathlib's of a local name, and of a `gs://` or `s3://` URL one with the same methods.

All that opens a file that a user named makes its path here; what an object store does otherwise than a disk is said here once. Credentials,
regions and endpoints are the libraries' own (GOOGLE_APPLICATION_CREDENTIALS, AWS_*).
"""

import contextlib
import functools
import glob as local_glob
import importlib.util
import io
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

# Orbax and TFDS make paths of the same library, which would take TensorFlow's files where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils.epath.gpath import PosixGPath

from llm_jax.errors import UserError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""The package that reads and writes each scheme; the extra of the same name as the scheme's store installs it"""

EXTRAS = {"gs": "gcs", "s3": "s3"}

Path = pathlib.Path
"""What `as_path` is said to return: a remote path has the methods of it that are used here."""


class StorageError(UserError):
    """A bucket that is not there, or that cannot be reached, read or written; or a disk that refuses."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a name is the URL of something in a bucket.

    >>> is_remote("s3://bucket/corpus/*.txt"), is_remote("runs/first")
    (True, False)
    """
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def as_path(path: str | os.PathLike) -> Path:
    """The path of a file or folder, local or in a bucket.

    Raises:
        StorageError: a URL of another kind, or one whose package is not installed.

    >>> as_path("runs/first"), as_path("s3://bucket/runs") / "first"  # doctest: +SKIP
    (PosixPath('runs/first'), RemotePath('s3://bucket/runs/first'))
    """
    text = os.fspath(path)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text)
    if scheme is None:
        return path if isinstance(path, Path) else Path(text)
    if scheme[1] not in PACKAGES:
        raise StorageError(f"{text}: {scheme[0]} is not read: name a local path, or one of gs:// and s3://")
    return path if isinstance(path, RemotePath) else RemotePath(text)


def top(path: Path) -> Path:
    """Where the folders of a path begin: its bucket, the root, or the current folder."""
    if isinstance(path, RemotePath):
        return RemotePath(*path.parts[:3])
    return Path(path.anchor)


def absolute(path: str | os.PathLike) -> str:
    """The whole name of a file: a URL as it is."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


@functools.lru_cache
def file_system(scheme: str) -> Any:
    """fsspec's file system of a scheme. It keeps no listings: others write into the same bucket, Orbax among them."""
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise StorageError(f"{scheme}:// needs the package {PACKAGES[scheme]}: pip install 'llm_jax[{EXTRAS[scheme]}]'")
    import fsspec

    for name in ("gs", "gcs") if scheme == "gs" else (scheme,):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    with _told(f"{scheme}://"):
        return fsspec.filesystem(scheme)


_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests", "urllib3", "fsspec")
_THROUGH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, UserError)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """What the libraries raise of a bucket that cannot be reached or used, as one line; a file that is not there stays FileNotFoundError."""
    try:
        yield
    except _THROUGH:
        raise
    except Exception as e:
        if isinstance(e, (OSError, TimeoutError)) or type(e).__module__.split(".")[0] in _LIBRARIES:
            reason = (str(e).splitlines() or [""])[0][:200] or type(e).__name__
            raise StorageError(f"{url}: {reason}") from e
        raise


def _no_bucket(url: str, error: Exception) -> NoReturn:
    raise StorageError(f"{url}: no such bucket, or it may not be written to ({error})") from error


class RemotePath(PosixGPath):
    """A file or a folder in a bucket, with the methods of `pathlib.Path`; a folder is there when a file lies in it."""

    @property
    def _fs(self) -> Any:
        return file_system(self.parts[1])

    def _do(self, name: str, *arguments: Any, **options: Any) -> Any:
        with _told(str(self)):
            return getattr(self._fs, name)(str(self), *arguments, **options)

    def absolute(self) -> "RemotePath":
        return self

    def expanduser(self) -> "RemotePath":
        return self

    def resolve(self, strict: bool = False) -> "RemotePath":
        return self

    def _kind(self) -> str:
        """file, directory or nothing. (fsspec's own tests take each failure, such as a connection lost, for a no.)"""
        try:
            return self._do("info")["type"]
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def stat(self) -> Any:
        return SimpleNamespace(st_size=self._do("info")["size"])

    def iterdir(self) -> Iterator["RemotePath"]:
        here = str(self).rstrip("/")
        names = {name.rstrip("/").rpartition("/")[2] for name in self._do("ls", detail=False)}
        for name in sorted(names - {"", here.rpartition("/")[2]}):  # a folder may be an object of its own
            yield self / name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        for name in glob(f"{local_glob.escape(str(self))}/{pattern}", files=False):
            yield RemotePath(name)

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing is made, since a bucket has no folders. Raises StorageError where the bucket itself is not there."""
        if not exist_ok and self.exists():
            raise FileExistsError(str(self))
        if not (bucket := top(self)).exists():
            raise StorageError(f"{self}: there is no bucket {bucket}: make it first, or mend its name")

    def open(self, mode: str = "r", *, encoding: str | None = None, **_: Any) -> Any:
        """A file to be read from its begin to its end, or to be written at once; what is written is there when it is closed."""
        if mode.strip("bt") not in ("r", "w"):
            raise io.UnsupportedOperation(
                f"{self}: what lies in a bucket is read or written whole, not by mode {mode!r}"
            )
        opened = self._do("open", mode.strip("bt") + "b")
        return opened if "b" in mode else io.TextIOWrapper(opened, encoding or "utf-8")

    def read_bytes(self) -> bytes:
        return self._do("cat_file")

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """The whole file at once: what is there is the old one or the new."""
        try:
            self._do("pipe_file", bytes(data))
        except FileNotFoundError as e:
            _no_bucket(str(self), e)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._do("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            self._do("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | os.PathLike) -> "RemotePath":
        """Copied by the store file by file, then removed: not at once, as on a disk."""
        there, names = RemotePath(os.fspath(target)), self._do("find")
        if not names:
            raise FileNotFoundError(str(self))
        start = len(self._fs._strip_protocol(str(self)))
        with _told(str(self)):
            self._fs.copy(names, [f"{there}{name[start:]}" for name in names], on_error="raise")
            self._fs.rm(names)
        return there

    replace = rename


def remove_tree(path: Path) -> None:
    """Remove a folder with all in it, as far as that goes."""
    if isinstance(path, RemotePath):
        path.rmtree(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that what is there is the old one or the new."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    fresh = path.with_name(f"{path.name}.part")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # what came first is told
            fresh.unlink()
        raise


@contextlib.contextmanager
def in_one_line(path: str | os.PathLike) -> Iterator[None]:
    """What the system refuses while this lasts is the user's error, by the name of its file; where it tells none, of `path`.

    Raises:
        StorageError: instead of OSError.
    """
    try:
        yield
    except OSError as e:
        raise StorageError(f"{e.filename2 or e.filename or os.fspath(path)}: {e.strerror or e}") from e


def upload(folder: str, target: Path) -> None:
    """Copy a local folder with all in it to one in a bucket."""
    for source in sorted(Path(folder).rglob("*")):
        if source.is_file():
            (target / source.relative_to(folder).as_posix()).write_bytes(source.read_bytes())


# --- reading data: of many files little at a time, or one from begin to end


Stamp = tuple[str, int, int | str]
"""The whole name of a file, its size, and what changes with its content: the modification time in nanoseconds, or the store's tag"""

_listed: dict[str, Stamp] = {}  # what the last listing told, so that not every file of a large one is asked for anew


def _stamp_of(url: str, info: dict[str, Any]) -> Stamp:
    tag = next((info[name] for name in ("ETag", "etag", "md5Hash", "generation") if info.get(name)), "")
    return url, int(info["size"] or 0), str(tag).strip('"')


def stamp(path: str) -> Stamp:
    """What tells whether a file is still the same, without reading it."""
    if not is_remote(path):
        status = os.stat(path)
        return os.path.abspath(path), status.st_size, status.st_mtime_ns
    if path not in _listed:
        with _told(path):
            _listed[path] = _stamp_of(path, file_system(path.partition(":")[0]).info(path))
    return _listed[path]


def glob(pattern: str, files: bool = True) -> list[str]:
    """The names that a pattern matches, sorted, only those of files if asked; `**` matches folders at any depth.

    A name that holds [ or ] itself is taken literally when nothing else matches.
    """
    if not is_remote(pattern):
        named = [p for p in local_glob.glob(pattern, recursive=True) if not files or os.path.isfile(p)]
        return sorted(named) or ([pattern] if os.path.isfile(pattern) else [])
    fs, found = file_system(pattern.partition(":")[0]), {}
    with _told(pattern), contextlib.suppress(FileNotFoundError):  # no such bucket: it holds no file
        found = fs.glob(pattern, detail=True)
        if not found and local_glob.has_magic(pattern):
            found = {pattern: fs.info(pattern)}
    named = []
    for name, info in found.items():
        url = fs.unstrip_protocol(name).rstrip("/")
        if info["type"] == "file" and not name.endswith("/"):
            _listed[url] = _stamp_of(url, info)
        elif files:
            continue
        named.append(url)
    return sorted(named)


def open_to_read(path: str) -> io.BufferedReader:
    """A file to be read from begin to end; of one in a bucket some megabytes are held at a time."""
    if not is_remote(path):
        return open(path, "rb")
    with _told(path):
        file = file_system(path.partition(":")[0]).open(path, "rb", block_size=2**23, cache_type="readahead")
    return io.BufferedReader(file, 2**20)


@contextlib.contextmanager
def at_hand(path: str | os.PathLike) -> Iterator[str]:
    """The name of a local file with this content, to be opened or mapped while this lasts: of a file in a bucket one in memory, whole."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with contextlib.ExitStack() as stack:
        content = stack.enter_context(open_to_read(os.fspath(path)))
        if hasattr(os, "memfd_create"):
            file = stack.enter_context(os.fdopen(os.memfd_create("remote"), "w+b"))
        else:  # one on disk, without a name
            file = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(content, file, 2**23)
        file.flush()
        yield f"/dev/fd/{file.fileno()}"


class Ranges:
    """The bytes of a file in a bucket, a slice by a request; like a mapped file, nothing of it is held."""

    def __init__(self, path: str):
        self.path, self._size = path, stamp(path)[1]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        if start >= stop:
            return b""
        with _told(self.path):
            return file_system(self.path.partition(":")[0]).cat_file(self.path, start=start, end=stop)


def for_arrow(path: str) -> tuple[str, Any]:
    """(name, file system) as pyarrow takes them; no file system for a local file."""
    if not is_remote(path):
        return path, None
    return path.partition("://")[2], file_system(path.partition(":")[0])


# --- files that grow


class Growing:
    """A file that is appended to, from what `held` says it has already.

    On a disk each flush writes what is new. In a bucket nothing can be appended: a flush puts the whole file again, but only half a minute after the
    last one, and so seldom that it takes a fiftieth of the time; `sync` puts it now.
    """

    LEAST = 30.0
    """seconds between two flushes of a file in a bucket"""

    def __init__(self, path: str | os.PathLike, held: bytes = b""):
        self.path = as_path(path)
        self._whole = bytearray(held)
        self._new, self._due = False, time.monotonic() + self.LEAST
        self._file = None if is_remote(path) else self.path.open("ab")

    def write(self, data: bytes) -> int:
        if self._file is not None:
            return self._file.write(data)
        self._whole += data
        self._new = True
        return len(data)

    def flush(self) -> None:
        """All that was written is in the file, or will be soon if it lies in a bucket."""
        if self._file is not None:
            self._file.flush()
        elif time.monotonic() >= self._due:
            self.sync()

    def sync(self) -> None:
        """All that was written is in the file."""
        if self._file is not None:
            self._file.flush()
        elif self._new:
            begin = time.monotonic()
            self.path.write_bytes(self._whole)
            self._new = False
            self._due = time.monotonic() + max(self.LEAST, 50 * (time.monotonic() - begin))

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()
