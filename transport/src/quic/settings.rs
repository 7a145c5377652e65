//! Settings of sockets and connections, by their path; measurements are in `docs/performance.md`.

use crate::error::{Error, Result};
use crate::limits::{
    RECEIVE_WINDOW_BYTES, SEND_WINDOW_BYTES, SOCKET_BUFFER_BYTES, STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::options::TransportOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// The largest UDP payload over IPv4 that quinn supports.
pub(crate) const LOOPBACK_DATAGRAM: u16 = 65_487;
const NETWORK_DATAGRAM: u16 = 1_452;
const INITIAL_WINDOW_BYTES: u64 = 4 << 20;

/// This machine's address on the route to `towards`.
///
/// # Errors
/// [`Error::Connection`] when there is no route.
pub fn local_ip(towards: SocketAddr) -> Result<IpAddr> {
    let any: SocketAddr = if towards.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let find = || {
        let socket = UdpSocket::bind(any)?;
        // Sends nothing; only queries the routing table.
        socket.connect(towards)?;
        socket.local_addr()
    };
    find().map(|address| address.ip()).map_err(|error| Error::connection(towards.to_string(), error))
}

pub(crate) fn bind_error(address: SocketAddr, error: &std::io::Error) -> Error {
    let reason = match error.kind() {
        std::io::ErrorKind::AddrInUse => "it is in use by another process".to_owned(),
        _ => error.to_string(),
    };
    Error::Bind { address, reason }
}

/// Binds a socket. `[::]` stands for all addresses of this machine: IPv4 and IPv6, or IPv4 where the kernel
/// has no IPv6.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let domain = socket2::Domain::for_address(address);
    let is_any = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let opened = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP));
    let bound = opened.and_then(|socket| {
        if is_any {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        Ok(socket.into())
    });
    match bound {
        Err(error) if is_any && error.kind() != io::ErrorKind::AddrInUse => {
            UdpSocket::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        bound => bound,
    }
}

pub(crate) fn udp_socket(address: SocketAddr) -> Result<UdpSocket> {
    let socket = bind(address).map_err(|error| bind_error(address, &error))?;
    let buffers = socket2::SockRef::from(&socket);
    // The kernel may grant less; `volary doctor` reports it.
    let _ = buffers.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = buffers.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    Ok(socket)
}

pub(crate) fn transport_config(loopback: bool, options: &TransportOptions) -> Result<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
    let idle = quinn::IdleTimeout::try_from(Duration::from_millis(options.idle_timeout_ms))
        .map_err(Error::identity)?;
    let mut cubic = quinn::congestion::CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    config
        .keep_alive_interval(Some(Duration::from_millis(options.keep_alive_ms)))
        .max_idle_timeout(Some(idle))
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(STREAMS_MAX.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(RECEIVE_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None);
    if loopback {
        // The first congestion window must hold a whole datagram, or nothing is ever sent.
        config
            .initial_mtu(LOOPBACK_DATAGRAM)
            .congestion_controller_factory(Arc::new(cubic))
            .enable_segmentation_offload(false);
    } else {
        config.initial_mtu(1_200).min_mtu(1_200).mtu_discovery_config(Some({
            let mut discovery = quinn::MtuDiscoveryConfig::default();
            discovery.upper_bound(NETWORK_DATAGRAM);
            discovery
        }));
    }
    Ok(config)
}
