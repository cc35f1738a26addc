"""A disk that fills, turns read-only, takes no more writes from this user or dies, while a run prepares, steps, saves.

Each fault comes while the process stands at a moment that it has reached by itself, and is a real one: a tmpfs without
a free page, a read-only mount over the workdir, folders without the bit to write, and an ext4 file system that is shut
down without its journal, as the kernel does with one whose device fails: from then on every call there is an I/O error,
and what had not been synced is lost. The run ends with exit code 2 and one line that names the cause; the last good
step is whole, and can be read under the fault where anything can; when the cause is gone the same command goes on to
the bits of a run that nothing happened to.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.processes import EVERY_STEPS, RECIPE, go_on, held, newest_digests, run

from tale_jax.runs.verify import verify
from tale_jax.training.checkpoint import BEGUN, check_checkpoint, read_manifests

# JAX warns of every fork of a process that has threads; between fork and exec only a capability is dropped here.
pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")]

DISK_BYTES = 16 << 20
EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2  # of Linux, fs/ext4/ext4.h: at once, with what the journal holds lost
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def drop_override():
    """In a new process: root, too, must obey the permission bits of files from its next exec on."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) if os.geteuid() == 0 else ():
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def unmount(path):
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def full(workdir):
    """Not one free page on the disk of the workdir."""
    filler = workdir.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    free = os.statvfs(workdir).f_bavail
    try:
        assert free == 0
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(workdir):
    """What is opened by a path below the workdir from now on lies on a read-only mount."""
    mount("--bind", workdir, workdir)
    try:
        mount("-o", "remount,bind,ro", workdir)
        yield
    finally:
        unmount(workdir)


@contextmanager
def forbidden(workdir):
    """Nobody may write to the folders and files of the workdir."""
    paths = [workdir, *workdir.rglob("*")]
    modes = {path: path.stat().st_mode & 0o777 for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


@contextmanager
def dead(workdir):
    """The disk of the workdir answers everything with an I/O error; at the end it is plugged in again."""
    disk = workdir.parent
    folder = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(folder)
    try:
        yield
    finally:
        unmount(disk)
        mount("-o", "loop", disk.parent / "image", disk)


@dataclass(frozen=True)
class Fault:
    begin: object
    number: int  # errno
    cause: str  # in the words of a save that failed
    is_readable: bool = True


FAULTS = {
    "full": Fault(full, errno.ENOSPC, "the disk is full"),
    "read-only": Fault(read_only, errno.EROFS, "the file system is read-only"),
    "forbidden": Fault(forbidden, errno.EACCES, "no permission to write"),
    "dead": Fault(dead, errno.EIO, "the disk has an I/O error", is_readable=False),
}


@pytest.fixture
def workdir(tmp_path):
    """Not yet there, on a small disk of its own where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk / "run"


@pytest.fixture
def small_disk(workdir):
    if sys.platform != "linux":
        pytest.skip("needs a tmpfs")
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", workdir.parent)
    yield
    unmount(workdir.parent)


@pytest.fixture
def ext4_disk(workdir):
    make = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not make:
        pytest.skip("needs mkfs.ext4")
    image = workdir.parent.parent / "image"
    with image.open("wb") as file:
        file.truncate(2 * DISK_BYTES)
    subprocess.run([make, "-q", str(image)], check=True)
    mount("-o", "loop", image, workdir.parent)
    yield
    unmount(workdir.parent)


@pytest.fixture
def obeying(tmp_path):
    """Skips where a new process may write whatever the bits say."""
    (folder := tmp_path / "closed").mkdir(mode=0o555)
    try:
        done = subprocess.run(["test", "-w", str(folder)], preexec_fn=drop_override)
    except subprocess.SubprocessError:
        pytest.skip("needs the right to drop the override of permissions")
    if done.returncode == 0:
        pytest.skip("permission bits bind no process of this user")


def whole_steps(workdir: Path) -> list[int]:
    """Steps whose checkpoint has a manifest, and every file of it as it was written."""
    folder, whole = workdir / "checkpoints", []
    for step in sorted(read_manifests(folder)):
        with contextlib.suppress(ValueError):
            check_checkpoint(folder, step)
            whole.append(step)
    return whole


def saved_steps(workdir: Path) -> list[int]:
    """Whole steps that the run counts: one that it is still saving may not be synced yet."""
    with contextlib.suppress(OSError):
        begun = int((workdir / "checkpoints" / BEGUN).read_text())
        return [step for step in whole_steps(workdir) if step != begun]
    return whole_steps(workdir)


def check_told(code, stderr, fault, what):
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in stderr, f"{what}: {code}, {stderr}"
    assert stderr.splitlines()[-1] == errors[0], f"{what}: {stderr}"
    assert fault.cause in errors[0] or os.strerror(fault.number) in errors[0], f"{what}: {errors[0]}"


def check_read(workdir, fault, before):
    """A reader under the fault takes the newest whole step, or says why nothing can be read."""
    read = run("evaluate", f"--workdir={workdir}", "--num_samples=0", "--json", before=before)
    if fault.is_readable:
        assert read.returncode == 0 and "Traceback" not in read.stderr, read.stderr
        assert json.loads(read.stdout.splitlines()[-1])["step"] in whole_steps(workdir)
    else:
        check_told(read.returncode, read.stderr, fault, "evaluate")


@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_takes_no_more_loses_no_step_and_is_named(request, counted, workdir, tell, name):
    whole, moments = counted
    fault, saves, before = FAULTS[name], 40 // EVERY_STEPS, None
    if name == "full":
        request.getfixturevalue("small_disk")
    elif name == "dead":
        request.getfixturevalue("ext4_disk")
    elif name == "forbidden":
        request.getfixturevalue("obeying")
        before = drop_override
    numbers = {
        "preparing": moments["preparing"] // 2,
        "stepping": round(moments["stepping"] * 7 / 40),  # about the seventh step, after two saves at least
        "saving": round(moments["saving"] * 2.5 / saves),  # in the middle of the third save
    }
    for part, number in numbers.items():
        with held(f"{part}:{number}", "train", *RECIPE, f"--workdir={workdir}", before=before) as process:
            good = saved_steps(workdir)
            assert bool(good) == (part != "preparing")
            with fault.begin(workdir):
                code, _, stderr = go_on(process)
                check_told(code, stderr, fault, f"{name} while {part}")
                if fault.is_readable:  # a disk that is nearly full may take steps more, which older ones make room for
                    assert whole_steps(workdir)[-1:] >= good[-1:], f"{name} while {part}: {good} was saved before"
                if part == "saving":
                    check_read(workdir, fault, before)
        assert whole_steps(workdir)[-1:] >= good[-1:], f"{name} while {part}: {good} was saved before"
    done = run("train", *RECIPE, f"--workdir={workdir}", before=before)
    assert done.returncode == 0, done.stderr
    assert newest_digests(workdir) == newest_digests(whole) and not verify(workdir).bad
    tell(f"{name} while {', '.join(numbers)}: told, nothing lost, equal to the bit afterwards")
