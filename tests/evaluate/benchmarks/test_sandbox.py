"""Programs that a model wrote: what they may do, and real attempts at what they may not."""

import contextlib
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.runs import ROOT
from var.evaluate.benchmarks import sandbox, seccomp
from var.evaluate.benchmarks.sandbox import Outcome, check, run
from var.utils.errors import UserError

PASSED = Outcome(True, "passed")

AS_USER = ["setpriv", "--reuid", "64000", "--regid", "64000", "--clear-groups"]


def namespaces(*before: str, user: bool) -> bool:
    """Return whether this machine allows namespaces to its user, or to the user that `before` changes to."""
    words = [*before, "unshare", "--mount", "--net", "--pid", "--fork", *(["--user", "--map-root-user"] * user), "true"]
    try:
        return subprocess.run(words, capture_output=True, env={"PATH": sandbox.PATH}).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not namespaces(user=os.geteuid() != 0), reason="this machine does not allow namespaces")


def alive(name: str) -> int:
    """Count the processes of this machine, in any namespace, that set this name (15 characters at most)."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += path.read_text().strip() == name
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1\nassert x == 1", "passed"),
        ("assert False", "AssertionError: "),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax (program, line 1)"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os; os._exit(0)\nassert False", "ended before its last line"),
        ("raise Exception('x' * 10**6)", "Exception: " + "x" * 289),
        ("print('passed')\nraise SystemExit", "SystemExit: "),
        ("print = exit = str = None", "passed"),  # a program may change its own names
        ("import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A", "passed"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "passed"),
        (
            "import os\nif os.fork() == 0: assert False\nos.wait()",
            "passed",
        ),  # a child's failure does not count
        ("import os\nos.fork()", "passed"),
    ],
)
def test_only_a_program_that_reaches_its_last_line_passes(program: str, reason: str) -> None:
    began = time.monotonic()
    assert run(program) == Outcome(reason == "passed", reason)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("channel", range(6))
def test_output_of_a_program_is_not_its_verdict(channel: int) -> None:
    assert not run(f"import os\nos.write({channel}, b'passed')\nassert False").passed


def test_there_is_no_network() -> None:
    """A real server on this machine is reached by the test and not by the sandbox."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed below
                while True:
                    connection, _ = server.accept()
                    heard.append(connection.recv(10))
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3).send(b'program')"
        assert run(program).reason == "OSError: [Errno 101] Network is unreachable"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.send(b"test")
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [b"test"]


def test_files_outside_cannot_be_read_written_or_deleted(tmp_path: Path) -> None:
    target = tmp_path / "here.txt"
    target.write_text("ours")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    for program in (f"open({str(target)!r}).read()", f"import os\nos.remove({str(target)!r})", "open('/etc/passwd')"):
        assert run(program).reason.startswith("FileNotFoundError")
    for place in ("/x", "/usr/x", os.path.realpath(sys.base_prefix) + "/x", "/dev/shm/x", "/proc/x", "/sys/x"):
        reason = run(f"open({place!r}, 'w')").reason
        assert reason.startswith(("OSError: [Errno 30] Read-only", "PermissionError", "FileNotFoundError")), place
        assert not Path(place).exists()
    assert target.read_text() == "ours"


def test_working_folder_is_writable_and_temporary() -> None:
    assert run("import os\nassert os.getcwd() == '/tmp' and not os.listdir()\nopen('x', 'w').write('y')") == PASSED
    assert run("import os\nassert not os.listdir()") == PASSED


def test_privileges_cannot_be_gained() -> None:
    """Mounting, another root, another user and a further user namespace are rejected (EPERM, 1)."""
    calls = [
        "mount(b'none', b'/tmp', b'tmpfs', 0, None)", "chroot(b'/tmp')", "setuid(0 if os.getuid() else 1)",
        "unshare(0x10000000)", "sethostname(b'x', 1)",
    ]  # fmt: skip
    for call in calls:
        program = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{call} == -1\n"
        assert run(program + "assert ctypes.get_errno() in (1, 22), ctypes.get_errno()") == PASSED, call
    if os.geteuid() == 0:
        assert run(f"import os\nassert os.getresuid() == os.getresgid() == ({sandbox.NOBODY},) * 3") == PASSED
        assert run("import os\nassert os.getgroups() == []") == PASSED


def test_linked_system_folder_is_linked_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that /bin is a link to usr/bin, which is not so on every system."""
    islink, readlink = os.path.islink, os.readlink
    monkeypatch.setattr(os.path, "islink", lambda path: path == "/bin" or islink(path))
    monkeypatch.setattr(os, "readlink", lambda path: "usr/bin" if path == "/bin" else readlink(path))
    assert run("import os\nassert os.readlink('/bin') == 'usr/bin' and os.path.exists('/bin/setpriv')") == PASSED


def test_environment_and_processes_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "secret")
    program = (
        "import os\nassert os.getpid() == 1 and set(os.environ) <= {'PATH', 'LANG', 'PWD'}, dict(os.environ)\n"
        "assert os.environ.get('PWD', '/') == '/'\n"
        f"try:\n    os.kill({os.getpid()}, 0)\nexcept ProcessLookupError:\n    pass\nelse:\n    assert False"
    )
    assert run(program) == PASSED


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", ("ran longer", "ended before")),
        ("import time\ntime.sleep(60)", ("ran longer",)),
        ("import signal\nfor s in (15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", ("ran l", "ended b")),
        ("x = bytearray(2**30)", ("MemoryError",)),
        ("x = []\nwhile True: x.append(' ' * 2**20 + str(len(x)))", ("MemoryError", "ended before")),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ("ran longer", "ended before")),
        ("import os\nwhile True:\n    if os.fork() == 0: os.setsid()", ("BlockingIOError",)),
        ("while True: print('x' * 2**20)", ("ran longer", "ended before")),
        ("import os\nwhile True: os.write(3, bytes(2**20))", ("OSError: [Errno 27]", "\0")),
        ("open('x', 'wb').write(bytes(17 * 2**20))", ("OSError: [Errno 27]",)),
        ("for i in range(10): open(f'x{i}', 'wb').write(bytes(15 * 2**20))", ("OSError: [Errno 28]",)),
        ("for i in range(5000): open(f'x{i}', 'w').close()", ("OSError: [Errno 28]",)),
        ("f = [open(f'x{i}', 'w') for i in range(100)]", ("OSError: [Errno 24]",)),
    ],
)  # fmt: skip
def test_time_memory_processes_and_output_are_limited(program: str, reason: tuple[str, ...]) -> None:
    began = time.monotonic()
    endless = any(one.startswith("ran") for one in reason)
    outcome = run(program, seconds=0.4 if endless else 20.0, memory=256)  # a busy machine starts Python slowly
    assert time.monotonic() - began < (5 if endless else 30)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) <= 2000


SYSCALL = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def number(name: str) -> int:
    return seccomp.REJECTED[name].get(os.uname().machine, 0)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nos.memfd_create('x')", "PermissionError: [Errno 1]"),
        (
            SYSCALL + f"if libc.syscall({number('shmget')}, 0, 2**30, 0o1600) < 0: raise OSError(ctypes.get_errno())",
            "OSError: 1",
        ),
        (
            SYSCALL + f"if libc.syscall({number('keyctl')}, 0, -3, 0) < 0: raise OSError(ctypes.get_errno())",
            "OSError: 1",
        ),
        (
            SYSCALL + f"if libc.syscall({number('add_key')}, b'user', b'a', b'b', 1, -3) < 0: "
            "raise OSError(ctypes.get_errno())",
            "OSError: 1",
        ),
        (
            SYSCALL + f"if libc.syscall({number('request_key')}, b'user', b'a', None, -3) < 0: "
            "raise OSError(ctypes.get_errno())",
            "OSError: 1",
        ),
        (
            SYSCALL
            + f"if libc.syscall({number('io_uring_setup')}, 8, bytes(200)) < 0: raise OSError(ctypes.get_errno())",
            "OSError: 1",
        ),
        (SYSCALL + "if libc.syscall(447, 0) < 0: raise OSError(ctypes.get_errno())", "OSError: 38"),  # memfd_secret
        ("import socket\nsocket.socket(40, socket.SOCK_STREAM)", "OSError: [Errno 97]"),  # AF_VSOCK: the host of a VM
        ("import socket\nsocket.socket(38, socket.SOCK_SEQPACKET)", "OSError: [Errno 97]"),  # AF_ALG
        ("import socket\nsocket.socketpair()\nsocket.socket()", "passed"),
        ("import concurrent.futures as c\nwith c.ThreadPoolExecutor(2) as p: list(p.map(abs, [1]))", "passed"),
    ],
    ids=[
        "memfd", "System V memory", "keyring", "new key", "requested key", "io_uring", "later call", "vsock", "crypto",
        "sockets", "threads",
    ],
)  # fmt: skip
def test_calls_that_escape_limits_are_rejected(program: str, reason: str) -> None:
    """Memory outside the address space, the keys of the session, and sockets that no network namespace confines."""
    assert run(program).reason.startswith(reason)


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_rejected_calls_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("needs the kernel's headers")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    for name, call in {**seccomp.REJECTED, **seccomp.SOCKETS}.items():
        assert call[machine] == int(numbers[name]), name


@pytest.mark.parametrize("act", ["os.ftruncate(fd, 0)", "os.lseek(fd, 0, 0), os.write(fd, b'x' * 40)", "os.close(fd)"])
def test_damaged_channel_is_a_failed_program(act: str) -> None:
    program = f"import os\nfor fd in range(3, 64):\n    try: {act}\n    except OSError: pass\nassert False"
    outcome = run(program)
    assert not outcome.passed
    assert "cannot be built" not in outcome.reason


@pytest.mark.parametrize("ending", ["", "while True: pass"])
def test_children_are_killed(ending: str) -> None:
    """A sleeping grandchild with its own session and name, after a program that passes and one that is stopped."""
    mark = f"left{os.getpid() % 10**6}x{len(ending)}"
    program = (
        "import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        f"    ctypes.CDLL(None).prctl(15, b'{mark}')\n    time.sleep(60)\n{ending}"
    )
    assert run(program, seconds=0.4).passed == (not ending)
    deadline = time.monotonic() + 2
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(mark) == 0


@pytest.mark.parametrize("sign", [9, 15, 19])
def test_signal_to_the_process_group_stays_inside(sign: int) -> None:
    """The process group crosses PID namespaces. The evaluation is another process here, which must not end or stop."""
    program = f"import os, time\nos.kill(0, {sign})\nos.killpg(0, {sign})\ntime.sleep(60)"
    code = f"from var.evaluate.benchmarks.sandbox import run\nprint(run({program!r}, seconds=0.4).passed)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_killed_evaluation_kills_its_programs() -> None:
    mark = f"orphan{os.getpid() % 10**6}"
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\ntime.sleep(60)"
    code = f"from var.evaluate.benchmarks.sandbox import run\nrun({program!r}, seconds=60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not alive(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(mark)
    parent.kill()
    parent.wait()
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(mark)


def test_ordinary_user_is_confined_too() -> None:
    """If these tests run as root, run programs as another user in a user namespace with the system's Python."""
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists() or not namespaces(*AS_USER, user=True):
        pytest.skip("needs root, a Python that others may run and namespaces for them")
    programs = [
        "pass", "open('/usr/x', 'w')", "open('/x', 'w')", "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.mkdir('x'); os.chroot('x')", "import os\nwhile True: os.fork()", "while True: pass",
        "import os, time\nos.kill(0, 9)\ntime.sleep(60)", "import os, time\nos.kill(0, 19)\ntime.sleep(60)", "pass",
    ]  # fmt: skip
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom var.evaluate.benchmarks.sandbox import run\n"
        f"for program in {programs!r}: print(run(program, seconds=0.4).reason[:40])"
    )
    words = [*AS_USER, str(python), "-B", "-c", code]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd="/", env={"PATH": sandbox.PATH}, start_new_session=True, timeout=60
    )  # a program that signals its process group must not reach the tests
    if "No module" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"another user cannot read this checkout: {done.stderr[-200:]}")
    assert done.stdout.splitlines() == [
        "passed", "OSError: [Errno 30] Read-only file syste", "OSError: [Errno 30] Read-only file syste",
        "OSError: [Errno 101] Network is unreacha",
        "PermissionError: [Errno 1] Operation not", "BlockingIOError: [Errno 11] Resource tem", "ran longer than 0.4 s",
        "ended before its last line", "ran longer than 0.4 s", "passed",
    ]  # fmt: skip


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace `unshare` by a script that fails, as on a kernel that rejects namespaces."""
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setattr(sandbox, "PATH", f"{tmp_path}:{sandbox.PATH}")
    for ask in (check, lambda: run("pass")):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == (
            "the sandbox for generated programs cannot be built here: unshare failed: Operation not permitted"
        )


def test_missing_tool_and_other_systems_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", (*sandbox.TOOLS, "no-such-tool"))
    with pytest.raises(UserError) as error:
        check()
    assert str(error.value) == "generated programs run in a sandbox that needs no-such-tool (package util-linux)"
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
    with pytest.raises(UserError, match=r"written for x86_64 and aarch64 and not for riscv64\. Remove humaneval"):
        check()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match=r"Linux namespaces only\. Remove humaneval"):
        check()


def test_canonical_solutions_pass_and_stubs_fail(real_data: Path) -> None:
    with gzip.open(real_data / "humaneval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line, _ in zip(file, range(20), strict=False)]
    for problem in problems:
        tests = f"\n{problem['test']}\ncheck({problem['entry_point']})"
        assert run(problem["prompt"] + problem["canonical_solution"] + tests) == PASSED, problem["task_id"]
        assert not run(problem["prompt"] + "    pass\n" + tests).passed, problem["task_id"]


def test_tools_of_the_command_are_installed() -> None:
    assert all(shutil.which(tool, path=sandbox.PATH) for tool in sandbox.TOOLS)
