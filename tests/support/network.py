"""Two hosts with an address each and a bad cable between them, on one Linux machine and in namespaces of its own.

Each host is a network namespace whose only way out is a TUN device; a thread here carries the packets from one to the
other, and loses some.  So real TCP, with its own retransmissions, meets a real loss of packets.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from typing import Self

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000
INTERFACE = "cable"


class TwoHosts:
    """A context; raises OSError or CalledProcessError where namespaces or TUN devices are not permitted.

    loss: the share of packets that the cable loses.  cut: nothing passes while it is set.
    """

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.loss = 0.0
        self.cut = threading.Event()
        self.carried = self.lost = 0
        self._names = [f"swinv2_{os.getpid()}_{side}" for side in "ab"]
        self._devices: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._random = random.Random(0)

    def __enter__(self) -> Self:
        try:
            for number, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
                device = f"sw{os.getpid() % 10**7}{'ab'[number]}"
                _ip("netns", "add", name)
                self._devices.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                fcntl.ioctl(self._devices[-1], _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN_NO_PI))
                _ip("link", "set", device, "netns", name)
                inside = ("-n", name)
                _ip(*inside, "link", "set", device, "name", INTERFACE, "mtu", "9000", "txqueuelen", "5000")
                _ip(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip(*inside, "link", "set", INTERFACE, "up")
                _ip(*inside, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        for device in self._devices:
            os.close(device)
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def command(self, host: int, *arguments: str) -> list[str]:
        """The command that runs another on host 0 or 1."""
        return ["ip", "netns", "exec", self._names[host], *arguments]

    def enter(self, host: int) -> None:
        """Make this process, and all that it starts, one of host 0 or 1."""
        with open(f"/run/netns/{self._names[host]}", "rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self._names[host]} failed")

    def cut_for(self, seconds: float) -> None:
        """Pull the cable out, wait, and put it back."""
        self.cut.set()
        time.sleep(seconds)
        self.cut.clear()

    def _carry(self) -> None:
        other = dict(zip(self._devices, reversed(self._devices), strict=True))
        while not self._end.is_set():
            for device in select.select(self._devices, [], [], 0.2)[0]:
                try:
                    packet = os.read(device, 65536)
                    if self.cut.is_set() or self._random.random() < self.loss:
                        self.lost += 1
                    else:
                        os.write(other[device], packet)
                        self.carried += 1
                except OSError:
                    self.lost += 1  # a full queue, or a device that goes


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
