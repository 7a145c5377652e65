//! The supervisor's process: how it starts, what others in the process may ask of it, and how it ends.
//!
//! | module | contents |
//! | --- | --- |
//! | `setup` | its credentials, spans and metrics |
//! | `shared` | what its connections share |
//! | `admission` | who is admitted |
//! | `session` | the connection of one node |
//! | `lanes` | the tokens of its lanes |

mod admission;
mod lanes;
mod session;
mod setup;
mod shared;

use crate::actor::{RunEnd, SupervisorActor, SupervisorArgs, last_members};
use crate::blocking::blocking;
use crate::copier::CopierActor;
use crate::credentials::CredentialError;
use crate::error::{Error, Result};
use crate::events::EventStream;
use crate::limits::{FAREWELL_DONE, FAREWELL_FAILED, LAST_COPY_MAX, RETURN_MARGIN};
use crate::messages::{CopierMsg, SupervisorMsg, notify};
use crate::options::SupervisorOptions;
use crate::run_files::{CopyEvent, EventLine, ReportedCopy, unix_ms};
use admission::accept;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorRef};
use setup::{State, open_authority, open_mirror, open_state, register_scrape_hooks, start_telemetry};
use shared::{Shared, SharedParts};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use volary_core::machine::Event;
use volary_data::Dataset;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::{JsonLines, RunDir};
use volary_telemetry::Pipeline;
use volary_transport::{AccessRole, Authority, ClientAuth, Endpoint, SUPERVISOR, TransportOptions};

/// A running supervisor.
pub struct Supervisor {
    address: SocketAddr,
    ended: oneshot::Receiver<RunEnd>,
    endpoint: Endpoint,
    shared: Arc<Shared>,
    pipeline: Pipeline,
    events: EventStream,
    copier: Option<Copying>,
}

/// The copies of checkpoints, which go on when the run has ended.
struct Copying {
    copier: ActorRef<CopierMsg>,
    reported: ReportedCopy,
    dir: RunDir,
}

impl Copying {
    /// Waits for the last copy, and reports it.
    async fn end(self, events: &EventStream) {
        let answer = self.copier.call(|reply| CopierMsg::Idle { reply }, Some(LAST_COPY_MAX)).await;
        self.copier.stop(None);
        let outcome = match answer {
            Ok(CallResult::Success(outcome)) => outcome,
            _ => return tracing::warn!("the last checkpoint is not in the store: it took too long"),
        };
        let Some(outcome) = outcome else { return };
        let at_step = outcome.step;
        let Some(event) = CopyEvent::of(outcome, &self.reported) else { return };
        let line = EventLine { unix_ms: unix_ms(), at_step, event: &event };
        events.publish("event", &line);
        // The actor that wrote the file has ended.
        if let Err(error) = JsonLines::open(self.dir.events()).and_then(|mut file| file.append(&line)) {
            tracing::warn!(%error, "events.jsonl cannot be written");
        }
    }
}

/// What others in the supervisor's process may ask of it.
#[derive(Clone)]
pub struct SupervisorHandle {
    shared: Arc<Shared>,
    events: EventStream,
}

impl SupervisorHandle {
    /// Sends an operator's request and awaits the reply.
    pub async fn ask(&self, request: OperatorRequest) -> OperatorReply {
        self.shared.ask(request).await
    }

    /// Checks that an access token lets its holder operate the run.
    ///
    /// # Errors
    /// When it is not valid for that.
    pub fn check_operator(&self, token: &str) -> std::result::Result<(), CredentialError> {
        self.shared.credentials.check(token, AccessRole::Operator)
    }

    /// Checks that an access token lets its holder view the run: a viewer's or an operator's.
    ///
    /// # Errors
    /// When it is not valid for that.
    pub fn check_viewer(&self, token: &str) -> std::result::Result<(), CredentialError> {
        self.shared.credentials.check(token, AccessRole::Viewer).or_else(|_| self.check_operator(token))
    }

    /// The live events of the run.
    #[must_use]
    pub fn events(&self) -> &EventStream {
        &self.events
    }
}

/// The supervisor's endpoint while the supervisor starts: every connection is refused with
/// [`volary_transport::RefusalCode::Starting`]. Startup may take minutes, because the corpus is prepared in
/// it; nodes that hold the run's state retry instead of timing out.
pub struct Door {
    options: SupervisorOptions,
    authority: Authority,
    endpoint: Endpoint,
    open: watch::Sender<Option<Arc<Shared>>>,
}

impl Door {
    /// Listens. Call it in a tokio runtime.
    ///
    /// # Errors
    /// When the address is in use, or the authority cannot be read.
    pub fn open(options: SupervisorOptions) -> Result<Self> {
        let authority = open_authority(&options)?;
        let identity = authority.identity(SUPERVISOR)?;
        let idle_timeout_ms = options.settings.cluster.node_timeout_ms.max(100);
        let keep_alive_ms = (idle_timeout_ms / 6).min(TransportOptions::default().keep_alive_ms);
        let transport = TransportOptions { keep_alive_ms, idle_timeout_ms };
        let endpoint = options.network.bind(options.listen, identity, ClientAuth::Optional, &transport)?;
        let open = watch::Sender::new(None);
        tokio::spawn(accept(open.subscribe(), endpoint.clone()));
        Ok(Self { options, authority, endpoint, open })
    }

    /// The address on which it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Opens the run's state, and admits nodes.
    ///
    /// # Errors
    /// When the state is damaged or another run's.
    pub async fn start(self, dataset: Dataset) -> Result<Supervisor> {
        let Self { options, authority, endpoint, open } = self;
        // Off the runtime, which answers those who connect meanwhile.
        let opened = blocking(move || open_state(options, authority)).await?;
        let State { options, store, credentials, checkpoints } = opened;
        let mirror = open_mirror(&options, &store).await?;
        let SupervisorOptions { run, settings, dir, config_hash, metrics, .. } = options;
        let address = endpoint.local_addr();
        let pipeline = start_telemetry(&run, &dir)?;
        let events = EventStream::default();
        register_scrape_hooks(&metrics, &pipeline, (&store, &dir), &endpoint);
        let (dataset, rounds) = (Arc::new(dataset), settings.validation.rounds);
        let data = Arc::clone(&dataset);
        let validation_documents = blocking(move || data.validation_documents(rounds)).await?;
        let (end, ended) = oneshot::channel();
        let over = Arc::new(AtomicBool::new(false));
        // A member that lives dials again at once; its silence for this long is its end elsewhere too.
        let patience = Duration::from_millis(settings.cluster.node_timeout_ms) + RETURN_MARGIN;
        let names = if options.nodes_are_gone { Vec::new() } else { last_members(&store)? };
        let copier = match mirror {
            Some(mirror) => {
                let spawned = Actor::spawn(None, CopierActor, mirror).await;
                let copier = spawned.map_err(|error| Error::start("the copier's actor", error))?.0;
                Some(Copying { copier, reported: ReportedCopy::default(), dir: dir.clone() })
            }
            None => None,
        };
        let args = SupervisorArgs {
            copier: copier.as_ref().map(|copying| copying.copier.clone()),
            reported_copy: copier.as_ref().map(|copying| copying.reported.clone()).unwrap_or_default(),
            run,
            settings,
            dir,
            store,
            credentials: Arc::clone(&credentials),
            checkpoints: checkpoints.clone(),
            config_hash,
            address: address.to_string(),
            pipeline: pipeline.clone(),
            metrics,
            events: events.clone(),
            nodes_are_gone: options.nodes_are_gone,
            may_go_back: options.may_go_back,
            over: Arc::clone(&over),
            validation_documents,
            dataset: Arc::clone(&dataset),
            end,
        };
        let (actor, _) = Actor::spawn(None, SupervisorActor, args)
            .await
            .map_err(|error| Error::start("the supervisor's actor", error))?;
        let shared = Arc::new(Shared::new(SharedParts {
            credentials,
            checkpoints,
            dataset,
            actor,
            endpoint: endpoint.clone(),
            pipeline: pipeline.clone(),
            reserved: names,
            patience,
            over,
        }));
        open.send_replace(Some(Arc::clone(&shared)));
        Ok(Supervisor { address, ended, endpoint, shared, pipeline, events, copier })
    }
}

impl Supervisor {
    /// Listens, opens the run's state, and admits nodes.
    ///
    /// # Errors
    /// As [`Door::open`] and [`Door::start`].
    pub async fn start(options: SupervisorOptions, dataset: Dataset) -> Result<Self> {
        Door::open(options)?.start(dataset).await
    }

    /// The address on which it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A handle for others in this process.
    #[must_use]
    pub fn handle(&self) -> SupervisorHandle {
        SupervisorHandle { shared: Arc::clone(&self.shared), events: self.events.clone() }
    }

    /// Waits until the run has ended and its nodes are told. When `interrupted` resolves first, the run is
    /// asked to write a checkpoint and end.
    pub async fn ended(self, interrupted: impl Future<Output = ()>) -> RunEnd {
        let Self { mut ended, endpoint, shared, pipeline, copier, events, .. } = self;
        let first = tokio::select! {
            end = &mut ended => Some(end),
            () = interrupted => None,
        };
        let end = match first {
            Some(end) => end,
            None => {
                notify(&shared.actor, SupervisorMsg::Event(Event::StopRequested));
                ended.await
            }
        };
        let end = end.unwrap_or_else(|_| RunEnd::Halted {
            reason: "the supervisor's actor died".into(),
            may_pass: true,
        });
        // The writers are sending what is queued; nodes close their links when they have read it.
        let farewell = match end {
            RunEnd::Done { .. } => FAREWELL_DONE,
            RunEnd::Fatal { .. } => FAREWELL_FAILED,
            RunEnd::Halted { .. } => Duration::ZERO,
        };
        tokio::time::sleep(farewell).await;
        drop(endpoint);
        if let Some(copier) = copier {
            copier.end(&events).await;
        }
        pipeline.flush().await;
        end
    }
}
