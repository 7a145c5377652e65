//! The supervisor's process: how it starts, what others in it may ask, and how it ends.
//!
//! | file | what |
//! | --- | --- |
//! | `setup` | its credentials, spans and figures |
//! | `door` | who is let in, and what becomes of their links |

mod admission;
mod setup;

use crate::event_stream::EventStream;
use crate::host::{Error, Result};
use crate::limits::CHECKPOINT_BYTES_AHEAD;
use crate::operator::{OperatorReply, OperatorRequest};
use crate::supervisor::{RunEnd, SupervisorActor, SupervisorArgs, SupervisorMsg};
use crate::wire::RunInfo;
use admission::{Admission, accept, ask_operator};
use ractor::Actor;
use setup::{open_credentials, register_scrape_hooks, start_telemetry};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};
use volary_core::machine::{Event, Settings};
use volary_data::Dataset;
use volary_storage::{BlobStore, Checkpoints, Digest, RunDir, RunIdentity, Store, journal};
use volary_telemetry::Pipeline;
use volary_telemetry::metrics::SupervisorMetrics;
use volary_transport::{AccessRole, AccessToken, Admit, Canary, Endpoint, SUPERVISOR, TransportOptions};

/// How long the last words may take to reach the nodes.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// What a supervisor is told.
#[derive(Clone, Debug)]
pub struct SupervisorOptions {
    /// What nodes must know of the run.
    pub run: RunInfo,
    /// What the state machine is told.
    pub settings: Settings,
    /// The run's directory, whose lock the caller holds.
    pub dir: RunDir,
    /// The hash of everything that the mathematics depends on.
    pub config_hash: Digest,
    /// The address to listen on.
    pub listen: SocketAddr,
    /// What it measures, for whoever scrapes it.
    pub metrics: Arc<SupervisorMetrics>,
    /// A folder with an authority that was made elsewhere (`ca.crt`, `ca.key`) and tokens (`join-token`, and maybe
    /// `operator-token`); the run's own authority when left out.
    pub identity: Option<PathBuf>,
    /// How long a node's certificate is good for; it is renewed when half of that has passed.
    pub certificate_lifetime: Duration,
    /// Whether no node has anything in memory any more, so that the run goes on from its last checkpoint.
    pub nodes_are_gone: bool,
}

/// A running supervisor.
pub struct Supervisor {
    address: SocketAddr,
    ended: oneshot::Receiver<RunEnd>,
    endpoint: Endpoint,
    admission: Arc<Admission>,
    pipeline: Pipeline,
    events: EventStream,
}

/// What others in the supervisor's process may ask of it.
#[derive(Clone)]
pub struct SupervisorHandle {
    admission: Arc<Admission>,
    events: EventStream,
}

impl SupervisorHandle {
    /// Asks the supervisor.
    pub async fn ask(&self, request: OperatorRequest) -> OperatorReply {
        ask_operator(&self.admission.actor, request).await
    }

    /// Whether a token's text lets somebody operate the run.
    ///
    /// # Errors
    /// Why not.
    pub fn may_operate(&self, token: &str) -> std::result::Result<(), String> {
        self.admission.credentials.check(token, AccessRole::Operator)
    }

    /// Whether a token's text lets somebody look: a viewer's does, and an operator's.
    ///
    /// # Errors
    /// Why not.
    pub fn may_look(&self, token: &str) -> std::result::Result<(), String> {
        self.admission.credentials.check(token, AccessRole::Viewer).or_else(|_| self.may_operate(token))
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> &EventStream {
        &self.events
    }
}

impl Supervisor {
    /// Opens the run's state and listens.
    ///
    /// # Errors
    /// When the address is in use, or the state is damaged or another run's.
    pub async fn start(options: SupervisorOptions, dataset: Dataset) -> Result<Self> {
        let store = Store::open(&options.dir)?;
        let credentials = Arc::new(open_credentials(&options, &store)?);
        let SupervisorOptions { run, settings, dir, config_hash, listen, metrics, nodes_are_gone, .. } =
            options;
        store.identify(&RunIdentity {
            name: run.run.clone(),
            seed: run.seed,
            config_hash,
            format: journal::FORMAT,
        })?;
        let checkpoints = Checkpoints::open(&dir, store.clone(), BlobStore::open(dir.blobs())?)?;
        let identity = credentials.authority().identity(SUPERVISOR)?;
        let idle_timeout_ms = settings.cluster.node_timeout_ms.max(100);
        let keep_alive_ms = (idle_timeout_ms / 6).min(TransportOptions::default().keep_alive_ms);
        let transport = TransportOptions { keep_alive_ms, idle_timeout_ms };
        let endpoint = Endpoint::bind(listen, identity, Admit::Anybody, &transport)?;
        let address = endpoint.local_addr();
        let pipeline = start_telemetry(&run, &dir)?;
        let events = EventStream::default();
        register_scrape_hooks(&metrics, &pipeline, (&store, &dir), &endpoint);
        let (end, ended) = oneshot::channel();
        let args = SupervisorArgs {
            run,
            settings,
            dir,
            store: store.clone(),
            credentials: Arc::clone(&credentials),
            checkpoints: checkpoints.clone(),
            config_hash,
            dataset: Arc::new(dataset),
            address: address.to_string(),
            pipeline: pipeline.clone(),
            metrics,
            events: events.clone(),
            nodes_are_gone,
            end,
        };
        let (actor, _) = Actor::spawn(None, SupervisorActor, args)
            .await
            .map_err(|error| Error::Start(format!("the supervisor does not start: {error}")))?;
        let sessions = AtomicU64::new(0);
        // Without it a death is noticed all the same, only later.
        let canary = Canary::listen(address);
        let canary = canary.inspect_err(|error| tracing::warn!(%error, "no canary")).ok();
        let keep = pipeline.clone();
        let room = Arc::new(Semaphore::new(CHECKPOINT_BYTES_AHEAD as usize >> 10));
        let names = Mutex::default();
        let admission = Arc::new(Admission {
            credentials,
            checkpoints,
            actor,
            sessions,
            canary,
            pipeline: keep,
            names,
            room,
        });
        tokio::spawn(accept(Arc::clone(&admission), endpoint.clone()));
        Ok(Self { address, ended, endpoint, admission, pipeline, events })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// For others in this process.
    #[must_use]
    pub fn desk(&self) -> SupervisorHandle {
        SupervisorHandle { admission: Arc::clone(&self.admission), events: self.events.clone() }
    }

    /// Waits until the run has ended and its nodes have heard so. When `interrupted` comes first, the run is asked
    /// to write a checkpoint and end.
    pub async fn ended(self, interrupted: impl Future<Output = ()>) -> RunEnd {
        let Self { mut ended, endpoint, admission, pipeline, .. } = self;
        let first = tokio::select! {
            end = &mut ended => Some(end),
            () = interrupted => None,
        };
        let end = match first {
            Some(end) => end,
            None => {
                drop(admission.actor.cast(SupervisorMsg::Event(Event::StopRequested)));
                ended.await
            }
        };
        let end = end.unwrap_or_else(|_| RunEnd::Fatal { reason: "the supervisor's actor died".into() });
        // The writers are sending what was queued; nodes close their links when they have read it.
        tokio::time::sleep(if matches!(end, RunEnd::Done { .. }) {
            FAREWELL_MAX / 8
        } else {
            FAREWELL_MAX / 4
        })
        .await;
        drop(endpoint);
        pipeline.flush().await;
        end
    }
}

/// Asks a running supervisor, as `volary status`, `checkpoint` and `stop` do.
///
/// # Errors
/// When it is not there or refuses the token.
pub async fn operate(
    address: SocketAddr,
    token: &AccessToken,
    request: &OperatorRequest,
) -> Result<OperatorReply> {
    let endpoint = Endpoint::dial_only(address, &TransportOptions::default())?;
    let (_link, mut sender, mut receiver) = endpoint.operate(address, token).await?;
    sender.send(request).await?;
    match receiver.recv().await? {
        Some(reply) => Ok(reply),
        None => Err(Error::Start("the supervisor ended before it answered".into())),
    }
}
