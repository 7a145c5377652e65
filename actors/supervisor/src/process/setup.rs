//! What a supervisor needs before it listens: its credentials, and where its spans and figures go.

use super::SupervisorOptions;
use crate::credentials::Credentials;
use crate::host::{Error, Result};
use crate::wire::RunInfo;
use std::path::Path;
use std::sync::Arc;
use volary_storage::{RunDir, Store};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::{Identity, Pipeline, SpanRecord, TraceStore};
use volary_transport::{AccessRole, Authority, Endpoint, SUPERVISOR};

/// The pipeline of the supervisor's spans, which keeps those of the nodes too.
pub(super) fn start_telemetry(run: &RunInfo, dir: &RunDir) -> Result<Pipeline> {
    let failed = |what: &str, error: std::io::Error| Error::Start(format!("{what}: {error}"));
    let folder = dir.traces();
    let mut traces = TraceStore::open(&folder, run.telemetry.keep)
        .map_err(|error| failed(&folder.display().to_string(), error))?;
    let mut failing = false;
    let keep = move |records: Vec<SpanRecord>| match traces.append(&records) {
        Ok(dropped) => dropped,
        Err(error) => {
            if !std::mem::replace(&mut failing, true) {
                tracing::warn!(%error, "traces cannot be kept with the run; training goes on without them");
            }
            records.len() as u64
        }
    };
    let identity = Identity { run: run.run.clone(), process: SUPERVISOR.to_owned(), device: None };
    let pipeline = Pipeline::start(&run.telemetry, &identity, Box::new(keep))
        .map_err(|error| failed("the telemetry thread does not start", error))?;
    volary_telemetry::layer::install(pipeline.sdk_tracer());
    Ok(pipeline)
}

/// What is looked up when somebody asks for the supervisor's figures.
pub(super) fn register_scrape_hooks(
    metrics: &Arc<SupervisorMetrics>,
    pipeline: &Pipeline,
    (store, dir): (&Store, &RunDir),
    endpoint: &Endpoint,
) {
    let endpoint = endpoint.counter();
    let (weak, counts) = (Arc::downgrade(metrics), pipeline.counts());
    let (store, blobs) = (store.clone(), dir.blobs());
    metrics.scrape().before_scrape(move || {
        let Some(metrics) = weak.upgrade() else { return };
        metrics.spans(&counts);
        metrics.refused(endpoint());
        let sizes = std::fs::read_dir(&blobs).into_iter().flatten().flatten();
        let bytes = sizes.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum();
        metrics.disk(store.bytes_on_disk(), bytes);
    });
}

/// The authority, made here or brought along, and the tokens in the run's directory.
pub(super) fn open_credentials(options: &SupervisorOptions, store: &Store) -> Result<Credentials> {
    let dir = &options.dir;
    let read = |folder: &Path, file: &str| {
        let path = folder.join(file);
        std::fs::read_to_string(&path).map_err(|error| Error::Start(format!("{}: {error}", path.display())))
    };
    let authority = match &options.identity {
        Some(folder) => Authority::from_pem(&read(folder, "ca.crt")?, &read(folder, "ca.key")?)?,
        None => Authority::load_or_create(&dir.identity())?,
    };
    let credentials = Credentials::new(authority, store.clone(), options.certificate_lifetime);
    if let Some(folder) = &options.identity {
        for (role, file) in [(AccessRole::Node, "join-token"), (AccessRole::Operator, "operator-token")] {
            let path = folder.join(file);
            if path.exists() {
                let taken = credentials.import(role, &read(folder, file)?);
                taken.map_err(|reason| Error::Start(format!("{}: {reason}", path.display())))?;
            }
        }
    }
    let own = [
        (AccessRole::Node, "node.token"),
        (AccessRole::Operator, "operator.token"),
        (AccessRole::Viewer, "viewer.token"),
    ];
    for (role, file) in own {
        credentials.write_token_file(role, &dir.identity().join(file)).map_err(Error::Start)?;
    }
    Ok(credentials)
}
