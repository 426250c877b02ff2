"""How far inside an address is: the whole Internet, this network, this computer, or where clouds keep their secrets.

What is fetched for somebody else must not lead further inside than the operator meant (server-side request forgery).
"""

from __future__ import annotations

import ipaddress

PUBLIC, PRIVATE, LOOPBACK, LINK_LOCAL = range(4)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Metadata services of clouds at addresses that look like ordinary ones: AWS on IPv6, Alibaba, Azure's host, Oracle.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))


def reach_of(address: Address) -> int:
    """PUBLIC, PRIVATE, LOOPBACK or LINK_LOCAL, which stands for every address that nobody may be led to."""
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if inner is not None:
        return reach_of(inner)
    if address.is_link_local or address.is_multicast or address in _METADATA:
        return LINK_LOCAL
    if address.is_loopback or address.is_unspecified:
        return LOOPBACK
    return PUBLIC if address.is_global else PRIVATE
