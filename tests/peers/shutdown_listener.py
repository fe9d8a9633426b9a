"""Shuts down a listening socket of another process, as a defect of the kernel or of a library would: PID PORT.

Exit code 3: the kernel does not allow it."""

import ctypes
import os
import re
import socket
import sys

PIDFD_GETFD = 438

pid, port = int(sys.argv[1]), int(sys.argv[2])
inodes = set()
for table in ("tcp", "tcp6"):
    with open(f"/proc/{pid}/net/{table}", encoding="ascii") as lines:
        for line in lines.readlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(fields[9])
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(pid)
found = 0
for descriptor in os.listdir(f"/proc/{pid}/fd"):
    try:
        link = os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except FileNotFoundError:
        continue  # It has been closed since.
    inode = re.fullmatch(r"socket:\[(\d+)\]", link)
    if inode and inode.group(1) in inodes:
        copy = libc.syscall(PIDFD_GETFD, pidfd, int(descriptor), 0)
        if copy < 0:
            print("pidfd_getfd:", os.strerror(ctypes.get_errno()), file=sys.stderr)
            sys.exit(3)
        socket.socket(fileno=copy).shutdown(socket.SHUT_RDWR)
        found += 1
if not found:
    sys.exit(f"process {pid} has no listener on port {port}")
