"""Files that are written whole or not at all, and files that are read with limits.

Every output of every command goes through `atomic_write`: what is written goes to an unfinished
file in the same folder, is forced to the disk, and takes the place of the old file by one rename. A
full disk, a killed process or an exception leaves the old file as it was. `hdf5_for_writing` does
the same for HDF5, whose library ends the process with a segmentation fault when the disk is full
while a file is being closed. `atomic_folder` does it for formats whose file is a folder.

This module knows nothing about what is in the files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from avl_analysis.errors import InputError

_UNFINISHED = ".unfinished"
_counter = itertools.count()


def user_path(name: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ expanded.

    Raises:
        InputError: a home folder of nobody, a name longer than the system takes, a NUL in it.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        shown = str(name) if len(str(name)) <= 80 else f"{str(name)[:77]}..."
        raise InputError(f"{shown!r} cannot be opened ({_reason(error)}): check it") from error
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Try what `atomic_write` needs, before anything is computed.

    A new file of one block beside `path`.

    Raises:
        InputError: no such folder, a folder or a special file in place of the file, no permission,
            a full disk, a name that is too long.
    """
    target = _target(Path(path))
    with _said(path):
        _remove_leftovers(target)
        unfinished = _new_name(target)
        try:
            with open(unfinished, "xb") as file:
                # Written and forced to the disk, because a full disk may show only then.
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            unfinished.unlink(missing_ok=True)


def check_folder_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder if it is not there, and try to write a file in it.

    Raises:
        InputError: a file in its place, no permission, a full disk.
    """
    with _said(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    check_writable(Path(folder) / "index.html")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to, in the folder of `path` and with its suffix.

    What is there when the block ends becomes `path` at once. If the block raises, `path` stays as
    it was.

    A symbolic link is followed: the file it names is replaced, and the link stays.

    Raises:
        InputError: a folder or a special file in place of the file, no permission, a full disk.
    """
    target = _target(Path(path))
    with _said(path):
        _remove_leftovers(target)
        unfinished = _new_name(target)
        try:
            yield unfinished
            # The content must be on the disk before the name is, or a loss of power leaves an empty
            # file.
            with open(unfinished, "rb") as written:
                os.fsync(written.fileno())
            if target.exists():
                # The new file has the rights of a new file; those of the old one are kept.
                os.chmod(unfinished, stat.S_IMODE(target.stat().st_mode))
            os.replace(unfinished, target)
            _sync(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], is_replaceable: Callable[[Path], bool]
) -> Iterator[Path]:
    """An empty folder beside `path`, which becomes `path` when the block ends.

    If the block raises, `path` stays as it was. On Linux the new folder and an old one change
    places in one step. Elsewhere the old one is first renamed; a process that is killed before the
    second rename leaves it under its name with `.replaced` behind it.

    Args:
        path: the folder.
        is_replaceable: whether an existing folder may be replaced; asked before anything is made.

    Raises:
        InputError: a file, or a folder that is not to be replaced, in its place; no permission; a
            full disk.
    """
    with _said(path):
        target = Path(path).resolve()
        if target.exists() and not (target.is_dir() and is_replaceable(target)):
            kind = "a folder of something else" if target.is_dir() else "a file"
            raise InputError(f"{_short(path)} is {kind}, which is not replaced: name another")
        if not target.parent.is_dir():
            raise InputError(f"cannot write {_short(path)}: no such folder: {target.parent}")
        _remove_leftovers(target)
        unfinished = _new_name(target)
        try:
            unfinished.mkdir()
            yield unfinished
            for path_inside in unfinished.rglob("*"):
                if path_inside.is_file():
                    with open(path_inside, "rb") as written:
                        os.fsync(written.fileno())
                else:
                    _sync(path_inside)
            _sync(unfinished)
            _take_place(unfinished, target)
            _sync(target.parent)
        finally:
            # after an exchange, this is what was there before
            shutil.rmtree(unfinished, ignore_errors=True)


def _take_place(new: Path, target: Path) -> None:
    """Put a folder in the place of another one, or of none."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        aside = target.with_name(f"{target.name}.replaced")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            # Interruptions included: the old folder gets its name back whatever went wrong.
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h, see renameat2(2)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system has no such call."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0  # not every file system can


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text whole or not at all; line ends are written as they are.

    Raises:
        InputError: as `atomic_write`.
    """
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return Path(path)


def write_whole(file: BinaryIO, content: bytes) -> None:
    """Write all bytes to a file object, also to one that takes a part at a time.

    Raises:
        InputError: an object that takes no bytes, such as a file opened for text.
    """
    if not callable(getattr(file, "write", None)):
        raise InputError(
            f"cannot write to {type(file).__name__}: pass a path, or a file opened for writing"
            " bytes, for example open(..., 'wb')"
        )
    rest = memoryview(content)
    while rest:
        try:
            done = file.write(rest)
        except TypeError as error:
            raise InputError(
                f"the {type(file).__name__} given takes no bytes ({error}): open the file in binary"
                " mode, for example open(..., 'wb')"
            ) from error
        # None: all of it, as writers do that are not of the module io
        rest = rest[len(rest) if done is None else done :]


def digest_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def hdf5_for_writing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """An open file object for h5py and h5netcdf; what is in it when the block ends becomes `path`.

    A write that fails is remembered and kept in memory, so that the HDF5 library can close its file
    in order; the failure is raised when the block ends, and `path` stays as it was.

    Raises:
        InputError: as `atomic_write`.
    """
    with atomic_write(path) as unfinished, open(unfinished, "w+b", buffering=0) as raw:
        file = _Forgiving(raw)
        try:
            yield file
        except Exception:  # whatever HDF5 makes of the failed write: the reason is clearer
            if file.failure is not None:
                raise file.failure from None
            raise
        if file.failure is not None:
            raise file.failure


class _Forgiving(io.RawIOBase):
    """A file whose writes never fail.

    What could not be written is kept in memory and read back from there.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self.raw = raw
        self.failure: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []
        self._end = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.raw.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self.raw.seek(max(self._end, os.fstat(self.raw.fileno()).st_size) + offset)
        return self.raw.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        try:
            return self.raw.truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            self._end = size
            return size

    def write(self, data: Any) -> int:
        content, start, done = memoryview(data).cast("B"), self.tell(), 0
        try:
            while self.failure is None and done < len(content):
                done += self.raw.write(content[done:]) or 0
        except OSError as error:
            self.failure = error
        if done < len(content):
            # The rest of this write; `readinto` lays it over what the disk holds.
            self._kept.append((start + done, bytes(content[done:])))
            self._end = max(self._end, start + len(content))
            self.raw.seek(start + len(content))
        return len(content)

    def readinto(self, buffer: Any) -> int:
        into, start = memoryview(buffer).cast("B"), self.tell()
        got = self.raw.readinto(into) or 0
        if self._kept:
            # Behind the end of the real file, zeros stand where nothing was kept.
            into[got:] = bytes(len(into) - got)
            got = len(into)
            for place, content in self._kept:
                first, last = max(place, start), min(place + len(content), start + len(into))
                if first < last:
                    into[first - start : last - start] = content[first - place : last - place]
            self.raw.seek(start + got)
        return got

    def flush(self) -> None:
        """Nothing is buffered here; `atomic_write` forces the file to the disk."""


def _target(path: Path) -> Path:
    """Where `path` is written: the file a link names; refuses what must not be replaced."""
    with _said(path):
        target = path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(target)  # unlike Path.exists, this tells a name that is too long
        if target.is_dir():
            raise InputError(f"{path} is a folder: name a file in it")
        if target.exists() and not target.is_file():
            raise InputError(
                f"{path} is a special file, which is not replaced: name an ordinary file"
            )
        if not target.parent.is_dir():
            raise InputError(
                f"cannot write {_short(path)}: no such folder: {_short(path.parent)}; make it"
                " first, or choose another"
            )
    return target


def _new_name(target: Path) -> Path:
    """A name for an unfinished file of this process.

    It ends in the suffix of `target`, since some libraries choose the format by it.
    """
    return target.with_name(f".{_mark(target)}-{os.getpid()}-{next(_counter)}{_ending(target)}")


def _ending(target: Path) -> str:
    return f"{_UNFINISHED}{target.suffix if len(target.suffix) <= 16 else ''}"


def _mark(target: Path) -> str:
    """The same for all unfinished files of one target on one machine."""
    host = os.uname().nodename if hasattr(os, "uname") else ""
    return hashlib.sha256(f"{host} {target.name}".encode("utf-8", "surrogateescape")).hexdigest()[
        :16
    ]


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left of the same file."""
    if os.name != "posix":  # there, asking whether a process runs would end it
        return
    for path in target.parent.glob(f".{_mark(target)}-*{_UNFINISHED}*"):
        process = path.name.split("-")[1]
        if not process.isdecimal() or _runs(int(process)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        # Signal 0 is not delivered; it only asks whether there is such a process.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a loss of power, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


@contextmanager
def _said(path: str | os.PathLike[str]) -> Iterator[None]:
    """OSError as one line that names the file that was asked for."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "Symlink loop" not in str(error):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose another place"
        raise InputError(
            f"cannot write {_short(path)} ({_reason(error)}); what was there before is unchanged:"
            f" {remedy}"
        ) from error


def _short(path: str | os.PathLike[str]) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
