//! What a supervisor needs before it listens: its credentials, its spans, its metrics.

use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::options::SupervisorOptions;
use std::path::Path;
use std::sync::Arc;
use volary_protocol::RunInfo;
use volary_storage::{BlobStore, Checkpoints, Mirror, RunDir, RunIdentity, Store, journal};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::{Identity, Pipeline, SpanRecord, TraceStore};
use volary_transport::{AccessRole, Authority, Endpoint, SUPERVISOR};

/// The pipeline of the supervisor's spans, which keeps those of the nodes too.
pub(super) fn start_telemetry(run: &RunInfo, dir: &RunDir) -> Result<Pipeline> {
    let folder = dir.traces();
    let mut traces = TraceStore::open(&folder, run.telemetry.keep)
        .map_err(|error| Error::File { path: folder, reason: error.to_string() })?;
    let mut failing = false;
    let keep = move |records: Vec<SpanRecord>| match traces.append(&records) {
        Ok(dropped) => dropped,
        Err(error) => {
            if !std::mem::replace(&mut failing, true) {
                tracing::warn!(%error, "traces cannot be stored; training continues without them");
            }
            records.len() as u64
        }
    };
    let identity = Identity { run: run.run.clone(), process: SUPERVISOR.to_owned(), device: None };
    let pipeline = Pipeline::start(&run.telemetry, &identity, Box::new(keep))
        .map_err(|error| Error::start("the telemetry thread", error))?;
    volary_telemetry::layer::install(pipeline.sdk_tracer());
    Ok(pipeline)
}

/// Registers what is read when the supervisor's metrics are scraped.
pub(super) fn register_scrape_hooks(
    metrics: &Arc<SupervisorMetrics>,
    pipeline: &Pipeline,
    (store, dir): (&Store, &RunDir),
    endpoint: &Endpoint,
) {
    let refused = endpoint.refused_counter();
    let (weak, counts) = (Arc::downgrade(metrics), pipeline.counts());
    let (store, blobs) = (store.clone(), dir.blobs());
    metrics.scrape().before_scrape(move || {
        let Some(metrics) = weak.upgrade() else { return };
        metrics.spans(&counts);
        metrics.refused(refused());
        let files = std::fs::read_dir(&blobs).into_iter().flatten().flatten();
        let bytes = files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum();
        metrics.disk(store.bytes_on_disk(), bytes);
    });
}

/// The authority, created here or elsewhere.
pub(super) fn open_authority(options: &SupervisorOptions) -> Result<Authority> {
    Ok(match &options.identity {
        Some(folder) => Authority::from_pem(&read(folder, "ca.crt")?, &read(folder, "ca.key")?)?,
        None => Authority::load_or_create(&options.dir.identity())?,
    })
}

/// The run's state on disk, open.
pub(super) struct State {
    pub(super) options: SupervisorOptions,
    pub(super) store: Store,
    pub(super) credentials: Arc<Credentials>,
    pub(super) checkpoints: Checkpoints,
}

/// Opens the run's state.
pub(super) fn open_state(options: SupervisorOptions, authority: Authority) -> Result<State> {
    let (dir, run) = (&options.dir, &options.run);
    let store = Store::open(dir)?;
    let credentials = Arc::new(open_credentials(&options, authority, &store)?);
    let (name, seed, config_hash) = (run.run.clone(), run.seed, options.config_hash);
    store.identify(&RunIdentity { name, seed, config_hash, format: journal::FORMAT })?;
    let checkpoints = Checkpoints::open(dir, store.clone(), BlobStore::open(dir.blobs())?)?;
    Ok(State { options, store, credentials, checkpoints })
}

/// The copies of the run's checkpoints, if it has any. A store that refuses keeps the run from starting.
pub(super) async fn open_mirror(options: &SupervisorOptions, store: &Store) -> Result<Option<Mirror>> {
    let (Some(address), Some(identity)) = (&options.settings.checkpoint.store, store.identity()?) else {
        return Ok(None);
    };
    Ok(Some(Mirror::open(address, &options.dir, &identity).await?))
}

/// The certificates issued so far, and the access tokens in the run's directory.
fn open_credentials(options: &SupervisorOptions, authority: Authority, store: &Store) -> Result<Credentials> {
    let dir = &options.dir;
    let credentials = Credentials::new(authority, store.clone(), options.certificate_lifetime);
    if let Some(folder) = &options.identity {
        for (role, file) in [(AccessRole::Node, "join-token"), (AccessRole::Operator, "operator-token")] {
            let path = folder.join(file);
            if path.exists() {
                let imported = credentials.import(role, &read(folder, file)?);
                imported.map_err(|error| Error::File { path, reason: error.to_string() })?;
            }
        }
    }
    let token_files = [
        (AccessRole::Node, "node.token"),
        (AccessRole::Operator, "operator.token"),
        (AccessRole::Viewer, "viewer.token"),
    ];
    for (role, file) in token_files {
        credentials.write_token_file(role, &dir.identity().join(file))?;
    }
    Ok(credentials)
}

fn read(folder: &Path, file: &str) -> Result<String> {
    let path = folder.join(file);
    std::fs::read_to_string(&path).map_err(|error| Error::File { path, reason: error.to_string() })
}
