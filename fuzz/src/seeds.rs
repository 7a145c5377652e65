//! Valid inputs, from which mutations start.

use bytes::Bytes;
use volary_core::compute::Compute;
use volary_core::{Epoch, Step};
use volary_transport::{
    AccessRole, AccessToken, AccessTokenTerms, Authority, Dtype, Frame, FrameKind, KeyRequest, Part,
    TraceHeader,
};

/// A configuration with every section.
pub const CONFIG: &str = r#"[run]
name = "t"
seed = 3
[data]
sources = [{ name = "a", path = "a.txt", weight = 1.0 }]
vocabulary = 300
[model]
vocabulary = 300
hidden = 8
layers = 2
heads = 2
head_dim = 4
feed_forward = 16
experts = 4
capacity = { factor = 1.5 }
[training]
steps = 5
lanes = 4
sequences_per_lane = 1
sequence_length = 8
optimizer = { kind = "adafactor" }
schedule = { kind = "inverse_square_root", rate = 0.03, constant_steps = 100, warmup_steps = 10 }
[cluster]
replication = 2
[checkpoint]
every = 3
[validation]
rounds = 1
[telemetry]
endpoint = "http://127.0.0.1:4317"
"#;

const INVENTORY: &str = r#"[[node]]
name = "a"
count = 2
zones = ["x", "y"]
memory = "1GiB"
tflops = 1.5
bandwidth = "100MB"
round_trip_ms = 0.5
price_per_hour = 1.0
[[offer]]
name = "b"
memory = "80GiB"
tflops = 100.0
bandwidth = "10GB"
"#;

fn frame() -> Frame {
    let part = Part { dtype: Dtype::F32, shape: vec![2, 3], data: Bytes::from(vec![7u8; 24]) };
    let trace = TraceHeader::default();
    Frame {
        kind: FrameKind::Forward,
        epoch: Epoch(3),
        step: Step(4),
        trace,
        meta: Bytes::from_static(b"header"),
        parts: vec![part],
    }
}

fn access_token() -> Option<AccessToken> {
    AccessToken::issue([9; 32], AccessRole::Node, 0, AccessTokenTerms::default()).ok().map(|(token, _)| token)
}

/// The valid inputs of a target.
#[must_use]
pub fn of(target: &str) -> Vec<Vec<u8>> {
    let text = |text: &str| vec![text.as_bytes().to_vec()];
    match target {
        "frame" => vec![frame().encode().unwrap_or_default().concat()],
        "handshake" => volary_transport::fuzz_handshake_seeds(),
        "messages" => volary_protocol::fuzz_message_seeds(),
        "access_token" => access_token().map(|token| token.reveal().into_bytes()).into_iter().collect(),
        "certificate_request" => KeyRequest::new().map(|r| r.der().to_vec()).into_iter().collect(),
        "authority" => Authority::create()
            .map(|authority| {
                let (certificate, key) = authority.to_pem();
                format!("{certificate}\n\n{key}").into_bytes()
            })
            .into_iter()
            .collect(),
        "config" => {
            vec![
                CONFIG.as_bytes().to_vec(),
                format!("{CONFIG}\0training.steps=7\nrun.name=\"x\"").into_bytes(),
            ]
        }
        "inventory" => text(INVENTORY),
        "shard" => crate::SHARDS
            .into_iter()
            .filter_map(|shard| {
                let glam = crate::GLAM.as_ref()?;
                glam.store(shard, Step(1), &glam.initial(shard).ok()?).ok()
            })
            .collect(),
        "tokenizer" => {
            let texts = ["the lane runs a step and every expert adds its share".to_owned()];
            let trained = volary_data::Tokenizer::train(texts.into_iter(), 280).ok();
            let saved = trained.and_then(|tokenizer| {
                let folder = tempfile::tempdir().ok()?;
                let path = folder.path().join("t.json");
                tokenizer.save(&path).ok()?;
                std::fs::read(path).ok()
            });
            saved.into_iter().collect()
        }
        "records" => vec![
            b"\x00First paragraph.\n\nSecond one.\n".to_vec(),
            b"\x01{\"text\": \"one\"}\n{\"text\": \"two\"}\n".to_vec(),
            b"\x02PAR1".to_vec(),
            [b"\x03".as_slice(), &[31, 139, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]].concat(),
        ],
        "manifest" => vec![volary_storage::fuzz_manifest_seed()],
        "http" => volary_cli::http::fuzz_http_seeds(),
        _ => Vec::new(),
    }
}
