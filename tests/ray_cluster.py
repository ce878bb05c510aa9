"""A Ray cluster of two nodes on this machine, each with an address of its own, started as a user does. Import it before Ray."""

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

CLONE_NEWNET, SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8913, 0x8914, 1  # Linux
HOSTS = ("127.0.0.2", "127.0.0.3")  # Ray replaces 127.0.0.1 by an address that others can reach
BOTH = ("ray:auto/cpu",) * 2

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("RAY_AUTH_MODE", "token")  # read when Ray is imported
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "comfyui-asyncdiff[ray]"')

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="two nodes on one machine take addresses that only Linux has")


def until(happens, seconds=30.0):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def listens(host, port):
    with socket.socket() as here:
        return here.connect_ex((host, port)) == 0


@contextlib.contextmanager
def private_network():
    """This thread, and what it starts, have a network of their own meanwhile, in which there is loopback alone.

    Ray listens on all addresses of a machine, and no test may open a port that another machine can reach.
    """
    import fcntl  # not on Windows, where this file is imported, too

    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if libc.unshare(CLONE_NEWNET):
            why = os.strerror(ctypes.get_errno())
            pytest.skip(f"no network of its own for Ray, which listens on all addresses ({why}): run as root")
        try:
            with socket.socket() as any_socket:  # loopback is there, but down
                request = struct.pack("16sh14x", b"lo", 0)
                (flags,) = struct.unpack_from("16xh", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0


@contextlib.contextmanager
def two_nodes(*paths):
    """Nodes of three cores, which find modules in ``paths``; this program's environment names the cluster meanwhile.

    Yields its address for Ray Client.
    """
    with private_network(), _two_nodes(*paths) as client_address:
        yield client_address


@contextlib.contextmanager
def _two_nodes(*paths):
    from asyncdiff_nodes.engine.devices import resolve_devices

    with socket.create_server((HOSTS[0], 0)) as free, socket.create_server((HOSTS[0], 0)) as other:
        port, client_port = free.getsockname()[1], other.getsockname()[1]
    address = f"{HOSTS[0]}:{port}"
    environment = {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of its sockets have room for 107 characters
    common = ["--num-cpus=3", "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats", "--block"]
    head = [
        "--head",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        "--include-dashboard=false",
        f"--node-ip-address={HOSTS[0]}",
    ]
    second = [f"--address={address}", f"--node-ip-address={HOSTS[1]}"]
    nodes = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for which in (head, second):
                command = [sys.executable, "-m", "ray.scripts.scripts", "start", *which, *common]
                nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT))
                until(lambda: listens(HOSTS[0], port))
            until(lambda: resolve_devices(["ray:auto/cpu"]) == BOTH)
            yield f"ray://{HOSTS[0]}:{client_port}"
        finally:
            ray.shutdown()
            for node in reversed(nodes):
                family = psutil.Process(node.pid).children(recursive=True)
                node.terminate()
                node.wait(20)
                psutil.wait_procs(family, 10)
            shutil.rmtree(folder, ignore_errors=True)
