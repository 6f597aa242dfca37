"""The system calls that a sandboxed program is refused, as a seccomp filter in classic BPF. No torch.

A namespace hides resources; it does not limit them. As the program cannot create a second process or thread, the limits
of one process hold for the whole sandbox: there are no fork bombs, and no child takes memory a second time. This holds
for root as well, whom the kernel exempts from RLIMIT_NPROC. The rest of the list is memory that no process limit counts
(System V segments, memfd), sockets, and entries to kernel code that Python never needs.
"""

import errno
import platform
import struct

from aletheia.errors import SandboxError

# Name -> number on x86_64 and on aarch64 (None: absent there); from the kernel's unistd_64.h and asm-generic/unistd.h.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # tasks
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    # memory that no process limit counts
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # network; the network namespace is empty as well
    "socket": (41, 198),
    # namespaces, mounts, device nodes
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # kernel code with a history of holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "vmsplice": (278, 75),
    "fanotify_init": (300, 262),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # the machine itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "iopl": (172, None),
    "ioperm": (173, None),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
_CLONE3 = 435  # a filter cannot read its flags in memory; "unknown" makes the C library use clone
_LAST_KNOWN = 450  # newer calls, and those of the x32 variant (from 2^30), are unknown in the sandbox

# machine -> (AUDIT_ARCH of linux/audit.h, column above)
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# linux/bpf_common.h and linux/seccomp.h
_LOAD_WORD, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET = 0, 4
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def filter_bytes(machine: str | None = None) -> bytes:
    """The filter as an array of ``struct sock_filter``, for ``bwrap --seccomp``.

    Refused calls fail with EPERM, so that Python reports an ordinary exception; another instruction set's calls
    (32-bit calls on x86_64) kill the process.

    Raises:
        SandboxError: the call numbers of this machine are unknown.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise SandboxError(
            f"there is no sandbox for {machine} machines; expected one of {', '.join(_MACHINES)}; use such a machine, "
            "or run the code without a sandbox with `unsafe_exec`"
        )
    audit_arch, column = _MACHINES[machine]
    parts = [
        _instruction(_LOAD_WORD, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, audit_arch, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD_WORD, _NUMBER_OFFSET),
        _instruction(_JUMP_GREATER, _LAST_KNOWN, if_false=1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _instruction(_JUMP_EQUAL, _CLONE3, if_false=1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            parts += [_instruction(_JUMP_EQUAL, number, if_false=1), _instruction(_RETURN, _ERRNO | errno.EPERM)]
    return b"".join([*parts, _instruction(_RETURN, _ALLOW)])
