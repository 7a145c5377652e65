//! The supervisor's process: who is let in, and what becomes of the links of nodes and operators.

use crate::feed::Feed;
use crate::host::{Error, Result};
use crate::keys::Keys;
use crate::limits::HELLO_MAX;
use crate::operator::{OperatorReply, OperatorRequest};
use crate::supervisor::{Arrival, RunEnd, SupervisorActor, SupervisorArgs, SupervisorMsg, WORDS_AHEAD};
use crate::wire::{self, Down, RunInfo, ShardAt, ShardWish, Up};
use ractor::rpc::CallResult;
use ractor::{Actor, ActorRef};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use volary_core::NodeId;
use volary_core::compute::{ComputeError, Computed};
use volary_core::machine::{Event, Settings};
use volary_data::Dataset;
use volary_storage::{BlobStore, Checkpoints, Digest, RunDir, RunIdentity, Store, journal};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::{Identity, Pipeline, SpanRecord, TraceStore};
use volary_transport::{
    Accepted, Admit, Authority, Canary, CanaryKey, CanaryWatch, ControlReceiver, ControlSender, Endpoint,
    Frame, InboundFrame, Kind, Link, Role, SUPERVISOR, Token, TokenRole, TransportOptions,
};

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
    door: Arc<Door>,
    pipeline: Pipeline,
    feed: Feed,
}

/// What others in the supervisor's process may ask of it.
#[derive(Clone)]
pub struct Desk {
    door: Arc<Door>,
    feed: Feed,
}

impl Desk {
    /// Asks the supervisor.
    pub async fn ask(&self, request: OperatorRequest) -> OperatorReply {
        ask_operator(&self.door.actor, request).await
    }

    /// Whether a token's text lets somebody operate the run.
    ///
    /// # Errors
    /// Why not.
    pub fn may_operate(&self, token: &str) -> std::result::Result<(), String> {
        self.door.keys.check(token, TokenRole::Operator)
    }

    /// Whether a token's text lets somebody look: a viewer's does, and an operator's.
    ///
    /// # Errors
    /// Why not.
    pub fn may_look(&self, token: &str) -> std::result::Result<(), String> {
        self.door.keys.check(token, TokenRole::Viewer).or_else(|_| self.may_operate(token))
    }

    /// What happens from now on.
    #[must_use]
    pub fn feed(&self) -> &Feed {
        &self.feed
    }
}

impl Supervisor {
    /// Opens the run's state and listens.
    ///
    /// # Errors
    /// When the address is in use, or the state is damaged or another run's.
    pub async fn start(options: SupervisorOptions, dataset: Dataset) -> Result<Self> {
        let store = Store::open(&options.dir)?;
        let keys = Arc::new(open_keys(&options, &store)?);
        let SupervisorOptions { run, settings, dir, config_hash, listen, metrics, nodes_are_gone, .. } =
            options;
        store.identify(&RunIdentity {
            name: run.run.clone(),
            seed: run.seed,
            config_hash,
            format: journal::FORMAT,
        })?;
        let checkpoints = Checkpoints::open(&dir, store.clone(), BlobStore::open(dir.blobs())?)?;
        let identity = keys.authority().identity(SUPERVISOR)?;
        let idle_timeout_ms = settings.cluster.node_timeout_ms.max(100);
        let keep_alive_ms = (idle_timeout_ms / 6).min(TransportOptions::default().keep_alive_ms);
        let transport = TransportOptions { keep_alive_ms, idle_timeout_ms };
        let endpoint = Endpoint::bind(listen, identity, Admit::Anybody, &transport)?;
        let address = endpoint.local_addr();
        let pipeline = start_telemetry(&run, &dir)?;
        let feed = Feed::default();
        look_before_scrapes(&metrics, &pipeline, (&store, &dir), &endpoint);
        let (end, ended) = oneshot::channel();
        let args = SupervisorArgs {
            run,
            settings,
            dir,
            store: store.clone(),
            keys: Arc::clone(&keys),
            checkpoints: checkpoints.clone(),
            config_hash,
            dataset: Arc::new(dataset),
            address: address.to_string(),
            pipeline: pipeline.clone(),
            metrics,
            feed: feed.clone(),
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
        let door = Arc::new(Door { keys, checkpoints, actor, sessions, canary, pipeline: keep });
        tokio::spawn(accept(Arc::clone(&door), endpoint.clone()));
        Ok(Self { address, ended, endpoint, door, pipeline, feed })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// For others in this process.
    #[must_use]
    pub fn desk(&self) -> Desk {
        Desk { door: Arc::clone(&self.door), feed: self.feed.clone() }
    }

    /// Waits until the run has ended and its nodes have heard so. When `interrupted` comes first, the run is asked
    /// to write a checkpoint and end.
    pub async fn ended(self, interrupted: impl Future<Output = ()>) -> RunEnd {
        let Self { mut ended, endpoint, door, pipeline, .. } = self;
        let first = tokio::select! {
            end = &mut ended => Some(end),
            () = interrupted => None,
        };
        let end = match first {
            Some(end) => end,
            None => {
                drop(door.actor.cast(SupervisorMsg::Event(Event::StopRequested)));
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

/// The pipeline of the supervisor's spans, which keeps those of the nodes too.
fn start_telemetry(run: &RunInfo, dir: &RunDir) -> Result<Pipeline> {
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
fn look_before_scrapes(
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
fn open_keys(options: &SupervisorOptions, store: &Store) -> Result<Keys> {
    let dir = &options.dir;
    let read = |folder: &Path, file: &str| {
        let path = folder.join(file);
        std::fs::read_to_string(&path).map_err(|error| Error::Start(format!("{}: {error}", path.display())))
    };
    let authority = match &options.identity {
        Some(folder) => Authority::from_pem(&read(folder, "ca.crt")?, &read(folder, "ca.key")?)?,
        None => Authority::load_or_create(&dir.identity())?,
    };
    let keys = Keys::new(authority, store.clone(), options.certificate_lifetime);
    if let Some(folder) = &options.identity {
        for (role, file) in [(TokenRole::Node, "join-token"), (TokenRole::Operator, "operator-token")] {
            let path = folder.join(file);
            if path.exists() {
                let taken = keys.take_in(role, &read(folder, file)?);
                taken.map_err(|reason| Error::Start(format!("{}: {reason}", path.display())))?;
            }
        }
    }
    let own = [
        (TokenRole::Node, "node.token"),
        (TokenRole::Operator, "operator.token"),
        (TokenRole::Viewer, "viewer.token"),
    ];
    for (role, file) in own {
        keys.hand_out(role, &dir.identity().join(file)).map_err(Error::Start)?;
    }
    Ok(keys)
}

/// What is needed to let somebody in.
struct Door {
    keys: Arc<Keys>,
    checkpoints: Checkpoints,
    actor: ActorRef<SupervisorMsg>,
    sessions: AtomicU64,
    canary: Option<Canary>,
    pipeline: Pipeline,
}

/// Whose words are heard.
struct Heard {
    node: NodeId,
    session: u64,
    /// The certificate that it came with, or its last one since.
    certificate: [u8; 32],
    /// The zone that its token gave it.
    zone: Option<String>,
    down: mpsc::Sender<Down>,
}

async fn accept(door: Arc<Door>, endpoint: Endpoint) {
    while let Some(accepted) = endpoint.accept().await {
        let door = Arc::clone(&door);
        tokio::spawn(async move {
            if let Err(reason) = door.admit(accepted).await {
                tracing::warn!(reason, "somebody was not let in");
            }
        });
    }
}

impl Door {
    async fn admit(self: Arc<Self>, accepted: Accepted) -> std::result::Result<(), String> {
        let mut zone = None;
        let certificate = accepted.certificate.unwrap_or_default();
        let verdict = match &accepted.role {
            Role::Join { token, .. } => self.keys.check(token, TokenRole::Node),
            Role::Operator { token } => self.keys.check(token, TokenRole::Operator),
            Role::Node { name } => self.keys.admit(name, accepted.certificate).map(|of| zone = of),
            Role::Peer { .. } => Err("this is the supervisor, not a node".into()),
        };
        if let Err(reason) = verdict {
            accepted.refuse(&reason).await;
            return Err(reason);
        }
        match accepted.role.clone() {
            Role::Join { token, request, name } => self.certify(accepted, &token, &request, name).await,
            Role::Operator { .. } => {
                let (link, sender, receiver) = accepted.welcome().await.map_err(|e| e.to_string())?;
                self.serve_operator(link, sender, receiver).await;
                Ok(())
            }
            Role::Node { .. } | Role::Peer { .. } => {
                let (link, sender, receiver) = accepted.welcome().await.map_err(|e| e.to_string())?;
                self.serve_node((link, certificate, zone), sender, receiver).await
            }
        }
    }

    async fn certify(
        &self,
        accepted: Accepted,
        token: &str,
        request: &[u8],
        name: Option<String>,
    ) -> std::result::Result<(), String> {
        match self.keys.exchange(token, request, name) {
            Ok((name, issued)) => {
                let ca = self.keys.authority().certificate().to_vec();
                accepted.certify(name, issued, ca).await.map_err(|error| error.to_string())
            }
            Err(reason) => {
                accepted.refuse(&reason).await;
                Err(reason)
            }
        }
    }

    /// A node, from its first words to the end of its link.
    async fn serve_node(
        self: Arc<Self>,
        (link, certificate, zone): (Link, [u8; 32], Option<String>),
        sender: ControlSender,
        mut receiver: ControlReceiver,
    ) -> std::result::Result<(), String> {
        let node = NodeId::new(link.peer());
        let hello = tokio::time::timeout(HELLO_MAX, receiver.recv::<Up>()).await;
        let Ok(Ok(Some(Up::Hello(info, held)))) = hello else {
            return Err(format!("{node} did not say what it is within {HELLO_MAX:?}"));
        };
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (down, words) = mpsc::channel(WORDS_AHEAD);
        tokio::spawn(write_down(sender, words));
        let mut heard = Heard { node: node.clone(), session, certificate, zone, down: down.clone() };
        let (key, mut watch) = self.expect_canary().unzip();
        let arrival =
            Arrival { node: node.clone(), info, held, session, down, link: link.clone(), canary: key };
        drop(self.actor.cast(SupervisorMsg::Joined(Box::new(arrival))));
        tokio::spawn(serve_shards(Arc::clone(&self), link.clone()));
        let died = async {
            match &mut watch {
                Some(watch) => watch.ended().await,
                None => std::future::pending().await,
            }
        };
        let reason = tokio::select! {
            reason = self.hear(&mut heard, &mut receiver) => reason,
            () = died => "its process has ended".to_owned(),
        };
        link.close("the control stream ended");
        drop(self.actor.cast(SupervisorMsg::Lost { node, session, reason }));
        Ok(())
    }

    fn expect_canary(&self) -> Option<((u16, CanaryKey), CanaryWatch)> {
        let canary = self.canary.as_ref()?;
        let (key, watch) = canary.expect().ok()?;
        Some(((canary.address().port(), key), watch))
    }

    /// Hands on what a node says, until it says no more.
    async fn hear(&self, heard: &mut Heard, receiver: &mut ControlReceiver) -> String {
        loop {
            let (node, session) = (heard.node.clone(), heard.session);
            let told = match receiver.recv::<Up>().await {
                Ok(Some(Up::Say(message))) => SupervisorMsg::Said { node, session, message },
                Ok(Some(Up::Spans(spans))) => {
                    self.keep_spans(&node, &spans);
                    continue;
                }
                Ok(Some(Up::Links(links))) => SupervisorMsg::Links { node, session, links },
                Ok(Some(Up::Profile(mut profile))) => {
                    if let Err(reason) = profile.check() {
                        return format!("it measured what cannot be: {reason}");
                    }
                    if let (true, Some(zone)) = (profile.zone.is_empty(), &heard.zone) {
                        profile.zone.clone_from(zone);
                    }
                    SupervisorMsg::Measured { node, session, profile }
                }
                Ok(Some(Up::Renew(request))) => match self.keys.renew(&node.0, heard.certificate, &request) {
                    Ok(issued) => {
                        tracing::info!(%node, "its certificate was renewed");
                        heard.certificate = issued.fingerprint();
                        drop(heard.down.send(Down::Renewed(issued)).await);
                        continue;
                    }
                    Err(reason) => return reason,
                },
                Ok(Some(Up::Hello(..))) => continue,
                Ok(None) => return "it ended its control stream".to_owned(),
                Err(error) => return error.to_string(),
            };
            if self.actor.cast(told).is_err() {
                return "the supervisor has ended".to_owned();
            }
        }
    }

    async fn serve_operator(&self, link: Link, mut sender: ControlSender, mut receiver: ControlReceiver) {
        while let Ok(Some(request)) = receiver.recv::<OperatorRequest>().await {
            let answer = match self.keys.answer(&request) {
                Some(answer) => answer,
                None => tokio::select! {
                    answer = ask_operator(&self.actor, request) => answer,
                    _ = link.closed() => return,
                },
            };
            if sender.send(&answer).await.is_err() {
                return;
            }
        }
    }

    /// Keeps what a node has traced. It speaks for itself only, whatever it says.
    fn keep_spans(&self, node: &NodeId, spans: &[String]) {
        let own = |mut record: SpanRecord| {
            record.process.clone_from(&node.0);
            record
        };
        self.pipeline
            .keep(spans.iter().filter_map(|span| serde_json::from_str(span).ok().map(own)).collect());
    }

    async fn stored_shard(&self, frame: &Frame) -> Computed<Frame> {
        let wish: ShardWish = wire::decode(frame)?;
        let version = wish.version.ok_or_else(|| ComputeError("of which checkpoint?".into()))?;
        let at = ShardAt { shard: wish.shard, version };
        let checkpoints = self.checkpoints.clone();
        let read = move || checkpoints.read(version, wish.shard);
        let bytes = crate::checkpointer::blocking(read).await.map_err(ComputeError)?;
        wire::blob(Kind::Shard, frame.epoch, frame.step, &at, bytes)
    }
}

async fn write_down(mut sender: ControlSender, mut words: mpsc::Receiver<Down>) {
    while let Some(word) = words.recv().await {
        if let Err(error) = sender.send(&word).await {
            return tracing::debug!(%error, "a node does not hear its supervisor any more");
        }
    }
    sender.finish().await;
}

/// A node's wishes for shards of a checkpoint, and its own for the next one.
async fn serve_shards(door: Arc<Door>, link: Link) {
    let mut inbound = link.serve();
    while let Some(InboundFrame { frame, reply }) = inbound.next().await {
        match frame.kind {
            Kind::Blob => {
                let step = frame.step;
                match wire::decode::<ShardAt>(&frame).and_then(|at| Ok((at, wire::only_blob(frame)?))) {
                    Ok((at, bytes)) => {
                        drop(door.actor.cast(SupervisorMsg::Shard { step, shard: at.shard, bytes }))
                    }
                    Err(error) => {
                        tracing::warn!(peer = link.peer(), %error, "a checkpoint's shard is malformed")
                    }
                }
            }
            Kind::Probe => {
                if let (Some(reply), Ok(answer)) = (reply, wire::frame(Kind::Reply, 0, 0, &(), Vec::new())) {
                    drop(reply.reply(answer).await);
                }
            }
            Kind::ShardRequest => {
                let answer = door.stored_shard(&frame).await;
                let answer =
                    answer.unwrap_or_else(|error| wire::refusal(frame.epoch, frame.step, &error.to_string()));
                if let Some(reply) = reply
                    && let Err(error) = reply.reply(answer).await
                {
                    tracing::debug!(peer = link.peer(), %error, "a shard did not get through");
                }
            }
            other => tracing::warn!(peer = link.peer(), kind = ?other, "a frame that has no business here"),
        }
    }
}

async fn ask_operator(actor: &ActorRef<SupervisorMsg>, request: OperatorRequest) -> OperatorReply {
    match actor.call(|reply| SupervisorMsg::Operator { request, reply }, None).await {
        Ok(CallResult::Success(answer)) => answer,
        _ => OperatorReply::Failed { reason: "the supervisor has ended".into() },
    }
}

/// Asks a running supervisor, as `volary status`, `checkpoint` and `stop` do.
///
/// # Errors
/// When it is not there or refuses the token.
pub async fn operate(address: SocketAddr, token: &Token, request: &OperatorRequest) -> Result<OperatorReply> {
    let endpoint = Endpoint::dial_only(address, &TransportOptions::default())?;
    let (_link, mut sender, mut receiver) = endpoint.operate(address, token).await?;
    sender.send(request).await?;
    match receiver.recv().await? {
        Some(reply) => Ok(reply),
        None => Err(Error::Start("the supervisor ended before it answered".into())),
    }
}
