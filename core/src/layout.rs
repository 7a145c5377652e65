//! The placement and the addresses of its nodes, in a form that is short on the wire.

use crate::ids::NodeId;
use crate::placement::{Names, Placement};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::net::SocketAddrV4;
use std::sync::Arc;

/// What every node knows of the cluster: the same for all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// The placement.
    pub placement: Arc<Placement>,
    /// The QUIC address of every member.
    pub addresses: Addresses,
}

/// Nodes in the order of their names, each with its QUIC address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses(pub Vec<(NodeId, String)>);

/// Addresses as columns, which compress better than rows: what is the same in all of them takes no bytes.
#[derive(Default, Serialize, Deserialize)]
struct Encoded {
    names: Names,
    /// The four octets of each IPv4 address; of another one, zeros.
    octets: [Vec<u8>; 4],
    ports: Vec<u16>,
    /// Other addresses as they are, by their places.
    others: Vec<(u32, String)>,
}

impl Serialize for Addresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let names = Names::new(self.0.iter().map(|(node, _)| node));
        let mut encoded = Encoded { names, ..Encoded::default() };
        for (place, (_, text)) in self.0.iter().enumerate() {
            let address = text.parse().ok().filter(|address: &SocketAddrV4| address.to_string() == *text);
            if address.is_none() {
                encoded.others.push((place as u32, text.clone()));
            }
            let octets = address.map_or([0; 4], |address| address.ip().octets());
            encoded.octets.iter_mut().zip(octets).for_each(|(column, octet)| column.push(octet));
            encoded.ports.push(address.map_or(0, |address| address.port()));
        }
        encoded.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Encoded { names, octets: [a, b, c, d], ports, others } = Encoded::deserialize(deserializer)?;
        let names = names.decode().map_err(de::Error::custom)?;
        if [&a, &b, &c, &d].iter().any(|column| column.len() != names.len()) || ports.len() != names.len() {
            return Err(de::Error::custom("a node has no address"));
        }
        let address = |place: usize| {
            SocketAddrV4::new([a[place], b[place], c[place], d[place]].into(), ports[place]).to_string()
        };
        let mut all: Vec<(NodeId, String)> =
            names.into_iter().enumerate().map(|(place, node)| (node, address(place))).collect();
        for (place, text) in others {
            let node = all.get_mut(place as usize);
            node.ok_or_else(|| de::Error::custom("an address has no node"))?.1 = text;
        }
        Ok(Self(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_and_are_short() {
        let address = |number: usize| format!("10.0.{}.{}:7100", number / 256, number % 256);
        let mut all: Vec<(NodeId, String)> =
            (0..1_000).map(|number| (NodeId::new(format!("node-{number:04}")), address(number))).collect();
        all.push((NodeId::new("z"), "[::1]:7100".into()));
        all.push((NodeId::new("zz"), "no number".into()));
        let all = Addresses(all);
        let bytes = postcard::to_stdvec(&all).expect("bytes");
        assert_eq!(postcard::from_bytes::<Addresses>(&bytes).expect("addresses"), all);
        assert!(bytes.len() < 15 * 1_002, "{} bytes", bytes.len());
    }
}
