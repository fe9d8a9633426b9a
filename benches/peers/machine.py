"""Machine data: free ports, CPU and memory of a process tree."""

import os
import pathlib
import socket
import time


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.01)
    raise SystemExit(f"nothing listens on {port}")


def tree(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_seconds(pids, thread=""):
    """User and system time of all threads with this name prefix, in nanoseconds; utime and stime have only hundredths
    of a second."""
    total = 0
    for member in (member for pid in pids for member in tree(pid)):
        for task in pathlib.Path(f"/proc/{member}/task").iterdir():
            if (task / "comm").read_text().startswith(thread):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident_kib(pids):
    members = (member for pid in pids for member in tree(pid))
    pages = sum(int(pathlib.Path(f"/proc/{member}/statm").read_text().split()[1]) for member in members)
    return pages * os.sysconf("SC_PAGESIZE") / 1024
