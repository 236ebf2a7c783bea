"""Runs one program under limits; sandbox.py starts it. It is a script: it imports nothing of the package.

Standard input has the limits and the program as JSON. Standard output gets "passed" if the program runs to
its end. The exit code 3 says that the kernel has no Landlock.
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
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.chdir"}


class Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def leave_python_alone_readable() -> bool:
    """Takes all other files, and the network, from this process for good; False where the kernel cannot."""
    libc = ctypes.CDLL(None)
    call = libc.syscall
    version = call(CREATE_RULESET, None, 0, VERSION_FLAG)
    if version < 1:
        return False
    files = sum(rights for since, rights in RIGHTS.items() if since <= version)
    rules = Ruleset(files, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(CREATE_RULESET, ctypes.byref(rules), size, 0)
    for path in {sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64", *sys.path}:
        if os.path.isdir(path):
            beneath = PathBeneath(READ, os.open(path, os.O_PATH))
            if call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(beneath), 0):
                return False
            os.close(beneath.folder)
    return libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and call(RESTRICT_SELF, ruleset, 0) == 0


def refuse(event: str, arguments) -> None:
    if event.startswith(REFUSED) and event not in HARMLESS:
        raise PermissionError(f"{event} is not allowed")


def main() -> None:
    settings = json.load(sys.stdin)
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if not leave_python_alone_readable():
        os._exit(3)
    seconds, memory = settings["cpu_seconds"], settings["memory"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # a signal, and a second later the end
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    sys.addaudithook(refuse)
    exec(compile(settings["program"], "<program>", "exec"), {"__name__": "__main__"})
    os.write(verdict, b"passed")


main()
