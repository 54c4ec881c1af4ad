"""Run a program that a model wrote in Linux namespaces and behind a system-call filter; without them it does not run.

It is confined by the kernel, so an unknown fault of the kernel is not held.
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from var.evaluate.benchmarks.seccomp import AUDIT_ARCH, build_filter
from var.utils.errors import UserError

TOOLS = ("unshare", "mount", "chroot", "setpriv", "prlimit")  # util-linux ≥ 2.33 and coreutils
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PROCESSES = 16  # each may use `memory`, so a program and its children use at most 16 times as much
FILE_MIB, FOLDER_MIB = 16, 64
BUILD_SECONDS = 30.0  # to build the sandbox on a busy machine
NOBODY = 65519  # the last of systemd's dynamic user ids; no other process has it, so the program's can be counted

# The program runs in its own module, and its output is discarded. The token is written after its last line. The first
# words on standard error say that the sandbox is complete; the program has no descriptor of that file.
DRIVER = """
import ctypes, json, os, sys, types
channel, own = os.dup(1), os.getpid()
task = json.load(sys.stdin)
os.chdir("/tmp")
class Filter(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_ushort), ("code", ctypes.c_char_p)]
code = bytes.fromhex(task["filter"])
if ctypes.CDLL(None).prctl(22, 2, ctypes.byref(Filter(len(code) // 8, code)), 0, 0):  # PR_SET_SECCOMP
    sys.exit("the kernel does not filter system calls (seccomp)")
os.write(2, b"started")
for standard in (0, 1, 2):
    os.dup2(4, standard)  # /dev/null
sys.modules["__main__"] = main = types.ModuleType("__main__")
try:
    exec(compile(task["program"], "program", "exec"), main.__dict__)
    verdict = task["token"]
except BaseException as error:
    verdict = f"{type(error).__name__}: {error}"[:300]
if os.getpid() == own:
    os.write(channel, verdict.encode(errors="replace"))
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program."""

    passed: bool
    """Whether it ran to its last line without an exception."""
    reason: str
    """"passed", or why it did not."""


def run(program: str, seconds: float = 10.0, memory: int = 1024) -> Outcome:
    """Run Python source in its own sandbox.

    The program sees the interpreter's installation (the standard library, no virtual environment) and the system's
    libraries, read-only, and an empty temporary folder. It has no network, no other processes, none of our environment
    variables, no keys of the session, and no privileges. It is limited to `seconds` of wall time, the same CPU time per
    process, and `memory` MiB of address space per process, and all its children die with it. The token is in the
    program's process, so a program can fake its own verdict, but only on purpose. If the sandbox cannot be built,
    nothing runs and UserError is raised. Whatever the program does to its verdict, it fails alone.

    Not limited: the total memory and CPU time of its up to PROCESSES processes, and reading the system's libraries.
    """
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as root,
        tempfile.TemporaryFile() as task,
        tempfile.TemporaryFile() as out,  # files and not pipes, so that their size is limited
        tempfile.TemporaryFile() as log,
    ):
        code = build_filter(os.uname().machine).hex()
        task.write(json.dumps({"program": program, "token": token, "filter": code}).encode())
        task.seek(0)
        # in its own session: a signal to the process group 0 crosses PID namespaces
        process = subprocess.Popen(
            _command(root, seconds, memory), stdin=task, stdout=out, stderr=log, cwd="/", start_new_session=True,
            env={"PATH": PATH, "LANG": "C.UTF-8"},
        )  # fmt: skip
        late = False
        try:
            built_by = time.monotonic() + BUILD_SECONDS
            while os.fstat(log.fileno()).st_size == 0 and process.poll() is None and time.monotonic() < built_by:
                time.sleep(0.002)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            process.kill()  # the kernel kills everything inside
            process.wait()
        log.seek(0)
        out.seek(0)
        built, verdict = (file.read(2000).decode(errors="replace") for file in (log, out))
    if not built.startswith("started"):
        raise UserError(f"the sandbox for generated programs cannot be built here: {built.strip() or 'no output'}")
    if verdict == token:
        return Outcome(True, "passed")
    if late:
        return Outcome(False, f"ran longer than {seconds:g} s")
    return Outcome(False, verdict or "ended before its last line")


def check() -> None:
    """Raise a UserError if no sandbox can be built, before a model generates anything."""
    if sys.platform != "linux":
        raise UserError(
            "generated programs run in Linux namespaces only. Remove humaneval and humaneval_instruct from "
            "benchmarks.tasks."
        )
    if (machine := os.uname().machine) not in AUDIT_ARCH:
        raise UserError(
            f"generated programs run behind a system-call filter, which is written for {' and '.join(AUDIT_ARCH)} and "
            f"not for {machine}. Remove humaneval and humaneval_instruct from benchmarks.tasks."
        )
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        raise UserError(f"generated programs run in a sandbox that needs {', '.join(missing)} (package util-linux)")
    if not (outcome := run("pass", seconds=30.0)).passed:
        raise UserError(f"the sandbox for generated programs cannot be built here: {outcome.reason}")


def _command(root: str, seconds: float, memory: int) -> list[str]:
    """Return the command that starts the interpreter without privileges, in a small root folder in new namespaces.

    The user root becomes an unprivileged user id that nothing else uses. Any other user gets a user namespace, which
    gives the privileges to mount. The new root is entered by chroot, because in a chroot the kernel rejects further
    user namespaces.
    """
    is_root = os.geteuid() == 0
    namespaces = ["--mount", "--net", "--pid", "--ipc", "--uts", *([] if is_root else ["--user", "--map-root-user"])]
    python = os.path.realpath(sys.executable)
    installed = sorted({os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)})
    quoted = shlex.quote(root)
    lines = [f"mount -t tmpfs -o size=1m,mode=755,nosuid,nodev tmpfs {quoted}"]
    for folder in ["/usr", "/lib", "/lib64", "/bin", *installed]:
        inside = shlex.quote(root + folder)
        if os.path.islink(folder):  # /lib → usr/lib
            lines.append(f"ln -s {shlex.quote(os.readlink(folder))} {inside}")
        elif os.path.isdir(folder) and not (folder != "/usr" and Path(folder).is_relative_to("/usr")):
            lines += [
                f"mkdir -p {inside}",
                f"mount --bind {shlex.quote(folder)} {inside}",
                f"mount -o remount,bind,ro,nosuid {inside}",
            ]
    unprivileged = [
        "setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
        *(["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"] if is_root else []),
    ]  # fmt: skip
    limits = [
        "prlimit", f"--as={memory * 2**20}", f"--cpu={max(1, round(seconds))}", f"--nproc={PROCESSES}",
        f"--fsize={FILE_MIB * 2**20}", "--core=0", "--nofile=64",
    ]  # fmt: skip
    entered = shlex.join(["chroot", root, *unprivileged, *limits, python, "-I", "-B", "-c", DRIVER])
    lines += [
        f"mkdir {quoted}/tmp",
        f"mount -t tmpfs -o size={FOLDER_MIB}m,nr_inodes=4k,mode=1777,nosuid,nodev tmpfs {quoted}/tmp",
        f"mount -o remount,bind,ro {quoted}",
        "exec 4<>/dev/null",
        f"exec {entered}",
    ]
    script = "\n".join(["set -e", *lines])
    # --kill-child applies while the root folder is built; setpriv, which changes the user, requests the same again
    inner = ["unshare", *namespaces, "--fork", "--kill-child", "--", "sh", "-c", script]
    return ["setpriv", "--pdeathsig", "KILL", "--", *inner]  # if this process is killed, so is the sandbox
