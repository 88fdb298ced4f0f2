"""Files are written whole or not at all: on a full disk, when killed, in folders that cannot be
written.
"""

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import h5netcdf
import numpy as np
import pytest
import xarray as xr

from avl_analysis import files
from avl_analysis.errors import InputError
from avl_analysis.files import (
    atomic_folder,
    atomic_write,
    check_writable,
    hdf5_for_writing,
    write_text,
)
from avl_analysis.recordings.netcdf import check_hdf5, write_netcdf


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that takes `room[0]` more bytes of HDF5 files, then none."""
    room = [0]
    original = io.FileIO

    class Small(original):  # type: ignore[misc, valid-type]
        def write(self, data: object) -> int:
            content = memoryview(data).cast("B")  # type: ignore[arg-type]
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = super().write(content[: room[0]])
            room[0] -= done
            return done

        def truncate(self, size: int | None = None) -> int:
            return super().truncate(size)

    def small_open(path: Path, mode: str, **options: object) -> io.IOBase:
        if "+" in mode:
            return Small(os.fspath(path), mode.replace("b", ""))
        return open(path, mode, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(files, "open", small_open, raising=False)
    return room


def _dataset(seed: int = 0, size: int = 20_000) -> xr.Dataset:
    values = np.random.default_rng(seed).random((2, size))
    return xr.Dataset(
        {"values": (("row", "column"), values), "names": ("row", np.array(["a", "b"], object))}
    )


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_write(target) as unfinished:
            unfinished.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert target.read_text() == "old"
    assert _entries(tmp_path) == ["a.txt"]


def test_a_finished_write_replaces_the_file_and_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(0o640)
    write_text(target, "new\n")
    assert target.read_bytes() == b"new\n"
    assert target.stat().st_mode & 0o777 == 0o640
    assert _entries(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link_and_the_file_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_special_files_folders_and_impossible_names_are_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "pipe", "special file"),
        (Path("/dev/null"), "special file"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "a.txt", "no such folder"),
        (tmp_path / "file" / "a.txt", "no such folder"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / ("a/" * 3000), "File name too long"),
        (loop, "cannot write"),
    ):
        for write in (check_writable, lambda path: write_text(path, "x")):
            with pytest.raises(InputError, match=message) as error:
                write(path)
            assert len(str(error.value)) < 600
    assert _entries(tmp_path) == ["file", "loop", "pipe"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    """In a process without the superuser's rights, which ignore permissions."""
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "a.nc").write_text("old")
    folder.chmod(0o555)
    tmp_path.chmod(0o755)
    program = f"""
        import os
        from avl_analysis.errors import InputError
        from avl_analysis.files import check_writable
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            check_writable({str(folder / "a.nc")!r})
        except InputError as error:
            print(error)
    """
    for parent in tmp_path.parents:  # pytest's own folders are closed to others
        if os.getuid() == 0 and parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert "Permission denied" in done.stdout, done.stderr
    assert (folder / "a.nc").read_text() == "old"


@pytest.mark.parametrize("room", [0, 1, 96, 600, 4096, 10_000, 40_000, 100_000, 320_000])
def test_a_full_disk_is_one_clear_error_and_the_old_netcdf_file_stays(
    tmp_path: Path, full_after: list[int], room: int
) -> None:
    target = tmp_path / "a.nc"
    full_after[0] = 10**9
    write_netcdf(target, {"/": _dataset(0)})
    before = target.read_bytes()
    full_after[0] = room
    with pytest.raises(InputError, match="No space left on device"):
        write_netcdf(target, {"/": _dataset(1), "group": _dataset(2)})
    assert target.read_bytes() == before
    assert _entries(tmp_path) == ["a.nc"]


def test_what_a_full_disk_did_not_take_is_read_back_from_memory(
    tmp_path: Path, full_after: list[int]
) -> None:
    full_after[0] = 100

    def write() -> None:
        with hdf5_for_writing(tmp_path / "a") as file:
            file.write(bytes(range(250)))
            file.seek(120)
            file.write(b"xyz")
            file.seek(90)
            into = bytearray(50)
            assert file.readinto(into) == 50
            wanted = bytearray(range(90, 140))
            wanted[30:33] = b"xyz"
            assert into == wanted
            assert file.seek(0, os.SEEK_END) == 250

    with pytest.raises(InputError, match="No space left"):
        write()


def test_a_netcdf_file_can_be_added_to_while_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "a.nc"
    with hdf5_for_writing(target) as file:
        with h5netcdf.File(file, "w") as netcdf:
            netcdf.dimensions["x"] = 3
            netcdf.create_variable("x", ("x",), "f8")[...] = [1.0, 2.0, 3.0]
        with h5netcdf.File(file, "r+") as netcdf:
            netcdf["x"][1] = 5.0
    with xr.open_dataset(target, engine="h5netcdf") as opened:
        assert opened["x"].values.tolist() == [1.0, 5.0, 3.0]


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounting needs the superuser")
@pytest.mark.parametrize("room", [16, 64, 200])
def test_a_small_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, room: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={400 + room}k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        write_netcdf(disk / "a.nc", {"/": _dataset(0)})  # about 320 kB
        before = (disk / "a.nc").read_bytes()
        with pytest.raises(InputError, match="No space left on device"):
            write_netcdf(disk / "a.nc", {"/": _dataset(1)})
        assert (disk / "a.nc").read_bytes() == before
        assert _entries(disk) == ["a.nc"]
        (disk / "filler").write_bytes(b"")
        with suppress(OSError), open(disk / "filler", "r+b", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(InputError, match="free some space"):
            check_writable(disk / "b.nc")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("moment", ["writing", "fsync", "replace", "after"])
def test_a_process_killed_while_writing_leaves_the_old_or_the_new_file_and_the_next_write_tidies_up(
    tmp_path: Path, moment: str
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    program = f"""
        import os, signal
        from avl_analysis.files import atomic_write
        def die(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} in ("fsync", "replace"):
            setattr(os, {moment!r}, die)
        with atomic_write({str(target)!r}) as unfinished:
            unfinished.write_text("new")
            if {moment!r} == "writing":
                die()
        die()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == ("new" if moment == "after" else "old")
    assert len(_entries(tmp_path)) == (1 if moment == "after" else 2)
    write_text(target, "done")
    assert _entries(tmp_path) == ["a.txt"]


def test_hdf5_files_that_declare_too_much_or_hold_themselves_are_refused(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "large.nc", "w") as file:
        file.create_dataset("x", shape=(10**11,), dtype="f8", chunks=(10**6,))
    with h5py.File(tmp_path / "loop.nc", "w") as file:
        file.create_group("a")["a"] = file["/"]
    with h5py.File(tmp_path / "link.nc", "w") as file:
        file["x"] = h5py.ExternalLink("other.nc", "/x")
    for name, message in (
        ("large.nc", "unpacks to 762,939 MB; at most 1 MB"),
        ("loop.nc", "groups within groups"),
        ("link.nc", "from another place"),
    ):
        with pytest.raises(InputError, match=message):
            check_hdf5(tmp_path / name, 2**20)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a system without renameat2
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "a.zarr"
    for content in ("old", "new"):
        with atomic_folder(target, lambda folder: (folder / "mark").exists()) as folder:
            (folder / "mark").write_text(content)
    assert (target / "mark").read_text() == "new"

    def fail() -> None:
        with atomic_folder(target, lambda folder: True) as folder:
            (folder / "mark").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (target / "mark").read_text() == "new"
    assert _entries(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize("moment", ["writing", "fsync", "_exchange", "after"])
def test_a_process_killed_while_writing_a_folder_leaves_the_old_or_the_new_one(
    tmp_path: Path, moment: str
) -> None:
    target = tmp_path / "a.zarr"
    target.mkdir()
    (target / "mark").write_text("old")
    program = f"""
        import os, signal
        from avl_analysis import files
        def die(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "fsync":
            os.fsync = die
        if {moment!r} == "_exchange":
            files._exchange = die
        with files.atomic_folder({str(target)!r}, lambda folder: True) as folder:
            (folder / "mark").write_text("new")
            if {moment!r} == "writing":
                die()
        die()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert (target / "mark").read_text() == ("new" if moment == "after" else "old")
    with atomic_folder(target, lambda folder: True) as folder:
        (folder / "mark").write_text("next")
    assert (target / "mark").read_text() == "next"
    assert _entries(tmp_path) == ["a.zarr"]
