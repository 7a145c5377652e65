//! Our frames against bare quinn with the same settings, in one run: `cargo bench -p volary-transport`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_transport::measure_loopback;

const TOTAL: usize = 1 << 30;
const FRAME: usize = 1 << 20;
const ROUNDS: usize = 5;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Interleaved, so that a noisy neighbor affects both.
        let report = runtime.block_on(measure_loopback(TOTAL, FRAME)).expect("loopback");
        ours.push(report.gigabytes_per_second);
        bare.push(bare_quinn());
        println!("round {round}: frames {:.2} GB/s, bare quinn {:.2} GB/s", ours[round], bare[round]);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (ours, bare) = (median(&mut ours), median(&mut bare));
    println!(
        "median: frames {ours:.2} GB/s, bare quinn {bare:.2} GB/s, ratio {:.2} (at least 0.8)",
        ours / bare
    );
}

/// One uni-stream per MiB between two endpoints on threads of their own, nothing but quinn.
fn bare_quinn() -> f64 {
    let certificate = rcgen::generate_simple_self_signed(vec!["bare.volary".into()]).expect("a certificate");
    let chain = vec![certificate.cert.der().clone()];
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certificate.signing_key.serialize_der());
    let server_tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(chain.clone(), key.into())
        .expect("a server");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(chain[0].clone()).expect("a root");
    let client_tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(
        quinn::crypto::rustls::QuicServerConfig::try_from(server_tls).expect("a server"),
    ));
    server.transport_config(transport());
    let mut client = quinn::ClientConfig::new(Arc::new(
        quinn::crypto::rustls::QuicClientConfig::try_from(client_tls).expect("a client"),
    ));
    client.transport_config(transport());
    let (address, wait) = std::sync::mpsc::channel();
    let receiver = std::thread::spawn(move || {
        block_on(async {
            let endpoint = endpoint(Some(server));
            address.send(endpoint.local_addr().expect("an address")).expect("the sender waits");
            let connection = endpoint.accept().await.expect("a dialer").await.expect("a connection");
            for _ in 0..TOTAL / FRAME {
                let mut stream = connection.accept_uni().await.expect("a stream");
                while let Some(chunk) = stream.read_chunk(FRAME, true).await.expect("a chunk") {
                    drop(chunk);
                }
            }
            connection.close(0u32.into(), b"");
            endpoint.wait_idle().await;
        });
    });
    let address = wait.recv().expect("the receiver listens");
    let start = Instant::now();
    block_on(async {
        let endpoint = endpoint(None);
        let connection =
            endpoint.connect_with(client, address, "bare.volary").expect("an address").await.expect("a peer");
        let data = Bytes::from(vec![7; FRAME]);
        for _ in 0..TOTAL / FRAME {
            let mut stream = connection.open_uni().await.expect("a stream");
            stream.write_all_chunks(&mut [data.clone()]).await.expect("a write");
            stream.finish().expect("an open stream");
        }
        connection.closed().await;
    });
    let seconds = start.elapsed().as_secs_f64();
    receiver.join().expect("the receiver");
    TOTAL as f64 / seconds / 1e9
}

fn block_on(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work);
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites = vec![rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(provider)
}

fn endpoint(server: Option<quinn::ServerConfig>) -> quinn::Endpoint {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let options = socket2::SockRef::from(&socket);
    options.set_send_buffer_size(4 << 20).expect("a buffer");
    options.set_recv_buffer_size(4 << 20).expect("a buffer");
    let mut config = quinn::EndpointConfig::default();
    config.max_udp_payload_size(65_487).expect("a size");
    quinn::Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).expect("an endpoint")
}

fn transport() -> Arc<quinn::TransportConfig> {
    let mut cubic = quinn::congestion::CubicConfig::default();
    cubic.initial_window(4 << 20);
    let mut config = quinn::TransportConfig::default();
    config
        .max_idle_timeout(Some(Duration::from_secs(10).try_into().expect("a timeout")))
        .stream_receive_window((1u32 << 20).into())
        .receive_window((4u32 << 20).into())
        .send_window(2 << 20)
        .initial_mtu(65_487)
        .mtu_discovery_config(None)
        .enable_segmentation_offload(false)
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(cubic));
    Arc::new(config)
}
