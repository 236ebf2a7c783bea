"""Runs one program under limits; sandbox.py starts it. It is a script: it imports nothing of the package.

Standard input has the limits, the program and a secret as JSON. Standard output gets the secret if the
program runs to its end. The exit code 3 says that the kernel has no Landlock, or no seccomp.
"""

import ctypes
import json
import os
import resource
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all architectures
VERSION_FLAG, PATH_BENEATH, NO_NEW_PRIVILEGES = 1, 1, 38
READ = (1 << 2) | (1 << 3)  # files, directories
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # rights on files that came with a version
TCP = 3  # bind and connect, since version 4
SCOPES = 3  # signals and abstract sockets of processes outside, since version 6
REFUSED = ("os.", "subprocess.", "socket.", "ctypes.", "pty.", "signal.", "shutil.", "resource.", "fcntl.")
# numpy sets variables of the environment when it is imported
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.chdir", "os.putenv", "os.unsetenv"}

# by machine, its number in <linux/audit.h>, and those that it has of clone, clone3, fork, vfork, socket,
# socketpair, io_uring_setup
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (56, 435, 57, 58, 41, 53, 425)),
    "aarch64": (0xC00000B7, (220, 435, 198, 199, 425)),
}
X32 = 1 << 30  # system calls from here on are the same ones again, on x86_64
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of the kernel's packet filters
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # what a filter returns; refused calls get EPERM
SET_SECCOMP, BY_FILTER = 22, 2


class Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


class Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),  # instructions to leave out
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


def leave_python_alone_readable(libc: ctypes.CDLL) -> bool:
    """Takes all other files, and TCP, from this process for good; False where the kernel cannot."""
    call = libc.syscall
    version = call(CREATE_RULESET, None, 0, VERSION_FLAG)
    if version < 1:
        return False
    files = sum(rights for since, rights in RIGHTS.items() if since <= version)
    rules = Ruleset(files, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(CREATE_RULESET, ctypes.byref(rules), size, 0)
    for path in {sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64"}:
        if os.path.isdir(path):
            beneath = PathBeneath(READ, os.open(path, os.O_PATH))
            if call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(beneath), 0):
                return False
            os.close(beneath.folder)
    return libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and call(RESTRICT_SELF, ruleset, 0) == 0


def refuse_processes_and_sockets(libc: ctypes.CDLL) -> bool:
    """Takes the system calls from this process for good, those that start threads too; False where the kernel
    cannot. On other machines than the two of SYSTEM_CALLS the hook alone refuses them."""
    if os.uname().machine not in SYSTEM_CALLS:
        return True
    machine, calls = SYSTEM_CALLS[os.uname().machine]
    last = len(calls) + 5  # the instruction that refuses
    program = [(LOAD, 0, 0, 4), (EQUAL, 0, last - 2, machine), (LOAD, 0, 0, 0), (AT_LEAST, last - 4, 0, X32)]
    program += [(EQUAL, last - 5 - i, 0, number) for i, number in enumerate(calls)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    instructions = (Instruction * len(program))(*program)
    return libc.prctl(SET_SECCOMP, BY_FILTER, ctypes.byref(Filter(len(program), instructions)), 0, 0) == 0


def refuse(event: str, arguments) -> None:
    if event.startswith(REFUSED) and event not in HARMLESS:
        raise PermissionError(f"{event} is not allowed")


def main() -> None:
    settings = json.load(sys.stdin)
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    libc = ctypes.CDLL(None)
    if not (leave_python_alone_readable(libc) and refuse_processes_and_sockets(libc)):
        os._exit(3)
    seconds, memory = settings["cpu_seconds"], settings["memory"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # a signal, and a second later the end
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    secret = settings["secret"].encode()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(secret), len(secret)))  # of the verdict, the only file
    sys.addaudithook(refuse)
    exec(compile(settings["program"], "<program>", "exec"), {"__name__": "__main__"})
    os.write(verdict, secret)


main()
