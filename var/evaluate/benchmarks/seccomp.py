"""The system calls that a generated program may not make, as a filter that the Linux kernel applies (seccomp).

The sandbox's namespaces and limits do not cover these calls: memory outside the program's address space, the keys of
the session, sockets that belong to no network namespace, and calls that act without calls of their own (io_uring).
"""

import struct

# The kernel's number of the architecture, and of each call; they never change.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REJECTED = {
    "shmget": {"x86_64": 29, "aarch64": 194},
    "semget": {"x86_64": 64, "aarch64": 190},
    "msgget": {"x86_64": 68, "aarch64": 186},
    "mq_open": {"x86_64": 240, "aarch64": 180},
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "add_key": {"x86_64": 248, "aarch64": 217},
    "request_key": {"x86_64": 249, "aarch64": 218},
    "keyctl": {"x86_64": 250, "aarch64": 219},
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "process_vm_readv": {"x86_64": 310, "aarch64": 270},
    "process_vm_writev": {"x86_64": 311, "aarch64": 271},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
}
SOCKETS = {"socket": {"x86_64": 41, "aarch64": 198}, "socketpair": {"x86_64": 53, "aarch64": 199}}
FAMILIES = (1, 2, 10)  # UNIX, INET and INET6, which the network namespace confines
LAST = 441  # epoll_pwait2 of Linux 5.11; later calls do not exist for the program, and C libraries do without them

EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# Classic BPF: load a word of the call's data, jump by a comparison, return what the kernel does.
LOAD, JUMP_EQUAL, JUMP_GREATER, RETURN = 0x20, 0x15, 0x25, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # bytes in struct seccomp_data; the argument's low half
ALLOW, REJECT = 0x7FFF0000, 0x00050000


def build_filter(machine: str) -> bytes:
    """Return the filter for a machine of AUDIT_ARCH, as an array of struct sock_filter. Raise a KeyError for others.

    A rejected call returns EPERM, a later one than LAST ENOSYS, and another socket EAFNOSUPPORT.
    """
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),  # jumps: steps to skip if true, and if false
        (RETURN, 0, 0, REJECT | EPERM),  # a call of another architecture, whose numbers differ
        (LOAD, 0, 0, NUMBER),
        (JUMP_GREATER, 0, 1, LAST),
        (RETURN, 0, 0, REJECT | ENOSYS),
    ]
    for call in REJECTED.values():
        steps += [(JUMP_EQUAL, 0, 1, call[machine]), (RETURN, 0, 0, REJECT | EPERM)]
    family = [(LOAD, 0, 0, FIRST_ARGUMENT)]
    for number in FAMILIES:
        family += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    family.append((RETURN, 0, 0, REJECT | EAFNOSUPPORT))
    steps += [
        (JUMP_EQUAL, 1, 0, SOCKETS["socket"][machine]),
        (JUMP_EQUAL, 0, len(family), SOCKETS["socketpair"][machine]),
        *family,
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
