//! Which addresses count as one client before anybody has logged in.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The part of a client's address that limits are counted by: all of an IPv4 address, the first 64
/// bits of an IPv6 address. A customer is given at least a /64, so counting by full addresses would
/// let one machine be 2^64 clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClientNetwork {
    /// The address of an IPv4 client, also if it is written `::ffff:a.b.c.d`.
    V4(u32),
    /// The network half of an IPv6 client's address.
    V6(u64),
}

impl ClientNetwork {
    /// The site that the network belongs to.
    pub fn site(self) -> ClientSite {
        match self {
            Self::V4(bits) => ClientSite::V4(bits),
            Self::V6(network) => ClientSite::V6(network >> 16),
        }
    }
}

/// The largest part of the address space that one client may have: an IPv4 address, or an IPv6 /48
/// (RFC 6177), which holds 65,536 networks. Limits by site bound what a client gains by changing
/// its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClientSite {
    /// The address of an IPv4 client.
    V4(u32),
    /// The first 48 bits of an IPv6 client's address.
    V6(u64),
}

impl From<IpAddr> for ClientNetwork {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4.to_bits()),
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, g, h, ..] = v6.octets();
                Self::V6(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
        }
    }
}

impl fmt::Display for ClientNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::V4(bits) => Ipv4Addr::from_bits(bits).fmt(f),
            Self::V6(network) => write!(f, "{}/64", Ipv6Addr::from_bits(u128::from(network) << 64)),
        }
    }
}

impl fmt::Display for ClientSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::V4(bits) => Ipv4Addr::from_bits(bits).fmt(f),
            Self::V6(site) => write!(f, "{}/48", Ipv6Addr::from_bits(u128::from(site) << 80)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(address: &str) -> ClientNetwork {
        address.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn ipv6_neighbours_are_one_client_and_ipv4_neighbours_are_two() {
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }

    #[test]
    fn ipv6_networks_of_the_same_48_bits_are_one_site_and_ipv4_neighbours_are_two() {
        let site = |address| network(address).site();
        assert_eq!(site("2001:db8:1:2::1"), site("2001:db8:1:ffff::1"));
        assert_ne!(site("2001:db8:1:2::1"), site("2001:db8:2:2::1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
    }

    #[test]
    fn mapped_address_is_its_ipv4_client() {
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }

    #[test]
    fn networks_are_displayed_with_their_prefix() {
        assert_eq!(network("2001:db8:1:2::1").to_string(), "2001:db8:1:2::/64");
        assert_eq!(
            network("2001:db8:1:2::1").site().to_string(),
            "2001:db8:1::/48"
        );
        for shown in [
            network("192.0.2.1").to_string(),
            network("192.0.2.1").site().to_string(),
        ] {
            assert_eq!(shown, "192.0.2.1");
        }
    }
}
