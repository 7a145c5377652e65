//! The addresses of a placement's nodes, in a form that is short on the wire.

use crate::ids::NodeId;
use crate::placement::Names;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::net::SocketAddr;

/// Nodes in the order of their names, each with its QUIC address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses(pub Vec<(NodeId, String)>);

/// An address as bytes, or as it is where it is no number.
#[derive(Serialize, Deserialize)]
enum Address {
    Socket(SocketAddr),
    Text(String),
}

impl Address {
    fn new(text: &str) -> Self {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.to_string() == text => Self::Socket(address),
            _ => Self::Text(text.to_owned()),
        }
    }
}

impl Serialize for Addresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let addresses: Vec<Address> = self.0.iter().map(|(_, address)| Address::new(address)).collect();
        (Names::new(self.0.iter().map(|(node, _)| node)), addresses).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (names, addresses) = <(Names, Vec<Address>)>::deserialize(deserializer)?;
        let names = names.decode().map_err(de::Error::custom)?;
        if names.len() != addresses.len() {
            return Err(de::Error::custom("a node has no address"));
        }
        let text = |address| match address {
            Address::Socket(address) => SocketAddr::to_string(&address),
            Address::Text(text) => text,
        };
        Ok(Self(names.into_iter().zip(addresses.into_iter().map(text)).collect()))
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
