"""Python reads this at start-up when its folder is on PYTHONPATH: no connection leaves the machine.

conftest.py imports it for the tests themselves and puts it on PYTHONPATH for all that they start (notebook kernels,
JupyterLab, the command line).
"""

import ipaddress
import socket


class NetworkBlocked(RuntimeError):
    """Something tried to reach another machine."""


def stays_here(host):
    """True for no host at all, this machine's name, and loopback or unspecified addresses."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def guard(owner, name, host_of):
    """Replace a function that reaches out by one that first asks where to."""
    original = getattr(owner, name)

    def guarded(*args, **kwargs):
        host = host_of(*args, **kwargs)
        if not stays_here(host):
            raise NetworkBlocked(f"{name} to {host!r}: tests may only talk to this machine")
        return original(*args, **kwargs)

    setattr(owner, name, guarded)


def host_of_address(connection, *args):
    """The host in the address of connect(address) or sendto(data, …, address); a file's socket has none."""
    address = args[-1] if args else None
    return address[0] if isinstance(address, tuple) else None


for method in ("connect", "connect_ex", "sendto"):
    guard(socket.socket, method, host_of_address)
for function in ("gethostbyname", "gethostbyname_ex"):
    guard(socket, function, lambda host: host)
guard(socket, "getaddrinfo", lambda host, *args, **kwargs: host)
