//! The two kinds of process: how a supervisor and a node start, and how their links become actors' messages.

use crate::disturb::{Disturbance, disturb};
use crate::executor::Executor;
use crate::inbound;
use crate::keys::NO_CERTIFICATE;
use crate::limits::{
    DIAL_MAX, DIAL_PAUSE, IDLE_MS, LINKS_EVERY, SPAN_BATCHES_AHEAD, SPANS_PER_WORD, WELCOME_MAX,
};
use crate::measure;
use crate::node::{Connection, NodeActor, NodeArgs, NodeEnd, NodeMsg};
use crate::node_context::NodeContext;
use crate::peers::{Broken, Peers};
use crate::shards::Uplink;
use crate::supervisor::WORDS_AHEAD;
use crate::wire::{Down, LinkReport, NodeInfo, RunInfo, Up};
use ractor::rpc::CallResult;
use ractor::{Actor, ActorRef};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use volary_core::NodeId;
use volary_core::compute::{Compute, Computed};
use volary_core::messages::{Held, ToNode};
use volary_core::profile::Profile;
use volary_telemetry::metrics::NodeMetrics;
use volary_telemetry::{Pipeline, SpanRecord};
use volary_transport::canary::CanaryHeld;
use volary_transport::{
    Admit, ControlReceiver, ControlSender, Endpoint, Identity, Interference, Issued, KeyRequest, Link, Token,
    TransportOptions, join, local_ip,
};

/// An error of a process as a whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network.
    #[error(transparent)]
    Transport(#[from] volary_transport::Error),
    /// The disk.
    #[error(transparent)]
    Storage(#[from] volary_storage::Error),
    /// The device.
    #[error("the device: {0}")]
    Compute(#[from] volary_core::compute::ComputeError),
    /// An actor or thread that does not start, or a refusal.
    #[error("{0}")]
    Start(String),
    /// What another attempt may mend.
    #[error("{0}")]
    NotYet(String),
}

impl Error {
    /// Whether this node is known and its certificate is not good any more.
    fn says_that_the_certificate_is_over(&self) -> bool {
        matches!(self, Self::Transport(volary_transport::Error::Refused(reason)) if reason.starts_with(NO_CERTIFICATE))
    }

    /// Whether another attempt may mend it.
    fn may_pass(&self) -> bool {
        matches!(self, Self::NotYet(_) | Self::Transport(volary_transport::Error::Connection { .. }))
    }
}

/// The result of starting a process.
pub type Result<T> = std::result::Result<T, Error>;

/// Seconds of a processor per byte on the wire: encryption, checksums and copies, as measured on loopback.
const NETWORK_S_PER_BYTE: f64 = 1.3e-9;

/// What a node is told.
#[derive(Debug)]
pub struct NodeOptions {
    /// The supervisor's address.
    pub supervisor: SocketAddr,
    /// A node's token.
    pub token: Token,
    /// The name that it would like.
    pub name: Option<String>,
    /// Where peers reach it; this machine's address on the way to the supervisor, any port, when left out.
    pub listen: Option<SocketAddr>,
    /// Its device, for people.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// Memory that it may use, in bytes.
    pub memory_bytes: u64,
    /// What fails together with it; empty when that is not known.
    pub zone: String,
    /// Called on every thread of the executor before its first computation.
    pub prepare_thread: fn(),
    /// What this node measures, for whoever scrapes it.
    pub metrics: Arc<NodeMetrics>,
    /// Where its figures are served, if they are.
    pub http: Option<SocketAddr>,
    /// A hook into the network, and what to do through it, for fault tests.
    pub disturbed: Option<(Interference, mpsc::Receiver<Disturbance>)>,
}

/// Runs a node until it leaves or its supervisor has been gone for too long. `make` makes its computations once the run
/// is known; each word in `leave` asks to leave, the second one at once.
///
/// # Errors
/// When it is refused, or the device cannot take the model.
pub async fn run_node<B: Compute>(
    options: NodeOptions,
    make: impl FnOnce(&RunInfo) -> Computed<B>,
    mut leave: mpsc::Receiver<()>,
) -> Result<NodeEnd> {
    // The shorter of both ends' timeouts counts, and the supervisor's is the run's `cluster.node_timeout_ms`.
    let transport = TransportOptions { idle_timeout_ms: IDLE_MS, ..TransportOptions::default() };
    let identity = dial(&options, &transport).await?;
    let name = NodeId::new(identity.name());
    let listen = match options.listen {
        Some(listen) => listen,
        None => SocketAddr::new(local_ip(options.supervisor)?, 0),
    };
    let endpoint = match &options.disturbed {
        Some((hook, _)) => {
            Endpoint::bind_disturbed(listen, identity, Admit::Certified, &transport, hook.clone())?
        }
        None => Endpoint::bind(listen, identity, Admit::Certified, &transport)?,
    };
    let mut way = Way { instance: rand_instance(), name: name.0.clone(), endpoint, options, profile: None };
    let first = way.connect(Held::default(), Instant::now() + DIAL_MAX).await?;
    let run = first.run.clone();
    tracing::info!(node = %name, run = run.run, device = way.options.device, "joined");
    way.endpoint.set_idle_timeout(run.node_timeout_ms)?;
    let executor = Executor::start(make(&run)?, way.options.threads, way.options.prepare_thread)
        .map_err(|error| Error::Start(format!("the device's threads do not start: {error}")))?;
    let (peers, breaks) = Peers::new(way.endpoint.clone());
    let (pipeline, mut spans) = start_telemetry(&run, &name, &way.options.device)?;
    let shape = (&run.architecture, &run.training);
    let observed = (pipeline.tracer(), Arc::clone(&way.options.metrics));
    let node = Arc::new(NodeContext::new(name, shape, executor, peers, observed));
    look_before_scrapes(&node, &pipeline);
    let (end, mut ended) = oneshot::channel();
    let args = NodeArgs { node: Arc::clone(&node), end };
    let (agent, running) = Actor::spawn(None, NodeActor(PhantomData), args)
        .await
        .map_err(|error| Error::Start(format!("the node's agent does not start: {error}")))?;
    tokio::spawn(inbound::accept(Arc::clone(&node), way.endpoint.clone()));
    tokio::spawn(tell_of_breaks(Arc::clone(&node), agent.clone(), breaks));
    if let Some((interference, orders)) = way.options.disturbed.take() {
        tokio::spawn(disturb(Arc::clone(&node), interference, orders));
    }
    let profile = measure_all(&node, &way.options, &run, &first.link).await;
    way.profile = Some(profile.clone());
    let mut served = Served::start(first, &agent, &node, &way.endpoint);
    // Now it may be placed.
    drop(served.up.send(Up::Profile(Box::new(profile))).await);
    let mut asked = false;
    let end = loop {
        tokio::select! {
            biased;
            end = &mut ended => {
                break end.unwrap_or_else(|_| NodeEnd::SupervisorGone("the node's agent died".into()));
            }
            Some(()) = leave.recv() => {
                if asked {
                    break NodeEnd::Left("it was told to leave at once".into());
                }
                asked = true;
                drop(agent.cast(NodeMsg::WantsToLeave));
            }
            Some(ended) = spans.recv() => served.send_spans(&pipeline, &ended),
            reason = served.ended() => {
                served.close();
                drop(agent.cast(NodeMsg::SupervisorGone));
                tracing::warn!(reason, "the supervisor is gone; this node keeps its state and waits");
                let deadline = Instant::now() + Duration::from_millis(run.supervisor_timeout_ms);
                let mut wish = std::pin::pin!(way.return_to(&agent, deadline));
                let back = tokio::select! {
                    biased;
                    end = &mut ended => break end.unwrap_or_else(|_| NodeEnd::Left("the node's agent ended".into())),
                    back = &mut wish => back,
                    Some(()) = leave.recv() => break NodeEnd::Left("it was told to leave at once".into()),
                };
                match back {
                    Ok(connected) if connected.run.same_model(&run) => {
                        tracing::info!(keep = connected.keep, "the supervisor is back");
                        served = Served::start(connected, &agent, &node, &way.endpoint);
                        if asked {
                            drop(agent.cast(NodeMsg::WantsToLeave));
                        }
                    }
                    Ok(_) => break NodeEnd::SupervisorGone("another run's supervisor has taken its place".into()),
                    // The last word on the stream may have been that this node is let go.
                    Err(error) => break ended.try_recv().unwrap_or_else(|_| {
                        NodeEnd::SupervisorGone(format!("{reason}; then {error}"))
                    }),
                }
            }
        }
    };
    agent.stop(None);
    drop(running.await);
    pipeline.flush().await;
    while let Ok(ended) = spans.try_recv() {
        served.send_spans(&pipeline, &ended);
    }
    served.link.close("the node leaves");
    Ok(end)
}

/// What this node can do. A device that cannot be measured is left to what is seen of it later.
async fn measure_all<B: Compute>(
    node: &NodeContext<B>,
    options: &NodeOptions,
    run: &RunInfo,
    link: &Link,
) -> Profile {
    let began = Instant::now();
    let mut profile = Profile {
        memory_bytes: options.memory_bytes,
        zone: options.zone.clone(),
        threads: node.executor.threads(),
        network_s_per_byte: NETWORK_S_PER_BYTE,
        ..Profile::relative(node.executor.threads() as f64)
    };
    if !run.measure {
        return profile;
    }
    let measured = measure::device(&node.executor, &run.architecture, &run.training, &mut profile).await;
    if let Err(error) = measured {
        tracing::warn!(%error, "the device cannot be measured; its speed is learned while it trains");
    }
    if let Some(carried) = measure::link(link, || link.stats().bytes_sent).await {
        profile.round_trip_s = carried.round_trip.as_secs_f64();
        profile.bandwidth = carried.bandwidth;
    }
    let costs = &node.costs;
    let tokens = |flops: f64, rate: f64| (rate / flops).round();
    let whole: f64 = costs.dense_flops.iter().sum();
    tracing::info!(
        dense_forward_tokens_per_s = tokens(whole, profile.dense.forward),
        dense_backward_tokens_per_s = tokens(2.0 * whole, profile.dense.backward),
        expert_forward_rows_per_s = tokens(costs.expert_flops, profile.expert.forward),
        expert_backward_rows_per_s = tokens(2.0 * costs.expert_flops, profile.expert.backward),
        round_trip_ms = profile.round_trip_s * 1e3,
        bandwidth_mb_per_s = (profile.bandwidth / 1e6).round(),
        took_ms = began.elapsed().as_millis() as u64,
        "measured"
    );
    profile
}

/// The pipeline of this node's spans, and those that have ended, for the supervisor to keep.
fn start_telemetry(
    run: &RunInfo,
    name: &NodeId,
    device: &str,
) -> Result<(Pipeline, mpsc::Receiver<Vec<String>>)> {
    let identity = volary_telemetry::Identity {
        run: run.run.clone(),
        process: name.0.clone(),
        device: Some(device.to_owned()),
    };
    let (sender, spans) = mpsc::channel(SPAN_BATCHES_AHEAD);
    let keep = move |records: Vec<SpanRecord>| {
        let lines: Vec<String> = records.iter().filter_map(|r| serde_json::to_string(r).ok()).collect();
        // A supervisor that is away or slow costs spans, not time.
        sender.try_send(lines).map_or(records.len() as u64, |()| 0)
    };
    let pipeline = Pipeline::start(&run.telemetry, &identity, Box::new(keep))
        .map_err(|error| Error::Start(format!("the telemetry thread does not start: {error}")))?;
    Ok((pipeline, spans))
}

/// What is looked up when somebody asks for this node's figures.
fn look_before_scrapes<B: Compute>(node: &Arc<NodeContext<B>>, pipeline: &Pipeline) {
    let (weak, counts) = (Arc::downgrade(node), pipeline.counts());
    node.metrics.scrape().before_scrape(move || {
        let Some(node) = weak.upgrade() else { return };
        node.metrics.executor(node.executor.totals());
        node.metrics.spans(&counts);
        node.metrics.refused(node.peers.refused());
        for LinkReport { peer, round_trip_ms, sent_bytes, received_bytes, .. } in node.peers.reports() {
            let round_trip = Duration::from_secs_f64(round_trip_ms / 1e3);
            node.metrics.link(&node.id.0, &peer, sent_bytes, received_bytes, round_trip);
        }
    });
}

/// A number that tells this process from another one of the same name.
fn rand_instance() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// What a supervisor let in.
struct Connected {
    link: Link,
    sender: ControlSender,
    receiver: ControlReceiver,
    run: RunInfo,
    keep: bool,
    canary: Option<CanaryHeld>,
}

/// The way to the supervisor.
struct Way {
    instance: u64,
    name: String,
    endpoint: Endpoint,
    options: NodeOptions,
    /// What was measured, once it was.
    profile: Option<Profile>,
}

impl Way {
    /// Connects with what the agent holds, again and again until the deadline.
    async fn return_to(&self, agent: &ActorRef<NodeMsg>, deadline: Instant) -> Result<Connected> {
        let held = match agent.call(|reply| NodeMsg::Held { reply }, None).await {
            Ok(CallResult::Success(held)) => held,
            _ => return Err(Error::Start("the node's agent died".into())),
        };
        self.connect(held, deadline).await
    }

    async fn connect(&self, held: Held, deadline: Instant) -> Result<Connected> {
        loop {
            // While the supervisor was away nobody could renew it.
            if self.endpoint.identity()?.left().is_zero() {
                drop(self.join_anew().await);
            }
            match self.connect_once(held.clone()).await {
                // Shut out, it may join anew: with its token, if that is still good, and another certificate.
                Err(error) if error.says_that_the_certificate_is_over() => self.join_anew().await?,
                Err(error) if Instant::now() < deadline && error.may_pass() => {
                    tracing::debug!(%error, "not yet");
                    tokio::time::sleep(DIAL_PAUSE).await;
                }
                connected => return connected,
            }
        }
    }

    async fn join_anew(&self) -> Result<()> {
        tokio::time::sleep(DIAL_PAUSE).await;
        let NodeOptions { supervisor, token, .. } = &self.options;
        let name = Some(self.name.clone());
        let identity = join(*supervisor, token, name, &TransportOptions::default()).await?;
        self.endpoint.set_identity(identity)?;
        Ok(())
    }

    async fn connect_once(&self, held: Held) -> Result<Connected> {
        let options = &self.options;
        let (link, mut sender, mut receiver) = self.endpoint.connect_supervisor(options.supervisor).await?;
        let info = NodeInfo {
            pid: std::process::id(),
            device: options.device.clone(),
            threads: options.threads,
            profile: self.profile.clone(),
            address: self.endpoint.local_addr().to_string(),
            http: options.http.map(|address| address.to_string()),
            instance: self.instance,
        };
        sender.send(&Up::Hello(info, held)).await?;
        let welcome = match tokio::time::timeout(WELCOME_MAX, receiver.recv::<Down>()).await {
            Ok(Ok(Some(Down::Welcome(welcome)))) => *welcome,
            Ok(Ok(Some(Down::Taken))) => {
                return Err(Error::NotYet("a living node has this name; choose another one".into()));
            }
            Ok(Ok(Some(Down::Say(ToNode::Leave { reason }, _)))) => return Err(Error::Start(reason)),
            Ok(Err(error)) => return Err(error.into()),
            _ => return Err(Error::NotYet("the supervisor did not say what the run is".into())),
        };
        let run: RunInfo = serde_json::from_str(&welcome.run)
            .map_err(|error| Error::Start(format!("the supervisor's words about the run: {error}")))?;
        let canary = match welcome.canary {
            // Without it a death is noticed all the same, only later.
            Some((port, key)) => {
                volary_transport::canary::hold(SocketAddr::new(options.supervisor.ip(), port), &key)
                    .await
                    .ok()
            }
            None => None,
        };
        Ok(Connected { link, sender, receiver, run, keep: welcome.keep, canary })
    }
}

/// A link to the supervisor in use.
struct Served {
    link: Link,
    up: mpsc::Sender<Up>,
    reader: tokio::task::JoinHandle<String>,
    canary: Option<CanaryHeld>,
    reports: tokio::task::JoinHandle<()>,
    renewals: tokio::task::JoinHandle<()>,
}

impl Served {
    fn start<B: Compute>(
        connected: Connected,
        agent: &ActorRef<NodeMsg>,
        node: &Arc<NodeContext<B>>,
        endpoint: &Endpoint,
    ) -> Self {
        let Connected { link, sender, receiver, keep, canary, .. } = connected;
        let (up, words) = mpsc::channel(WORDS_AHEAD);
        let connection = Connection { up: up.clone(), uplink: Uplink { link: link.clone() }, keep };
        drop(agent.cast(NodeMsg::Connected(connection)));
        tokio::spawn(write_up(sender, words));
        let (renewed, answers) = mpsc::channel(1);
        let reader = tokio::spawn(read_down(receiver, agent.clone(), renewed));
        let renewals = tokio::spawn(renew(endpoint.clone(), up.clone(), answers));
        let reports = tokio::spawn(report_links(Arc::clone(node), up.clone()));
        Self { link, up, reader, canary, reports, renewals }
    }

    /// Resolves when the supervisor cannot be heard any more, with the reason.
    async fn ended(&mut self) -> String {
        let canary = async {
            match &mut self.canary {
                Some(canary) => canary.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = &mut self.reader => reason.unwrap_or_else(|error| error.to_string()),
            () = canary => "its process has ended".into(),
        }
    }

    /// Spans that find no room are not kept, and counted.
    fn send_spans(&self, pipeline: &Pipeline, spans: &[String]) {
        for part in spans.chunks(SPANS_PER_WORD) {
            if self.up.try_send(Up::Spans(part.to_vec())).is_err() {
                pipeline.lost(part.len() as u64);
            }
        }
    }

    fn close(&self) {
        self.link.close("the link is given up");
        self.reader.abort();
        self.reports.abort();
        self.renewals.abort();
    }
}

/// Joins, and tries again for a while when the supervisor does not listen yet; a refusal is final.
async fn dial(options: &NodeOptions, transport: &TransportOptions) -> Result<Identity> {
    let start = Instant::now();
    loop {
        match join(options.supervisor, &options.token, options.name.clone(), transport).await {
            Err(volary_transport::Error::Connection { .. }) if start.elapsed() < DIAL_MAX => {
                tokio::time::sleep(DIAL_PAUSE).await;
            }
            joined => return Ok(joined?),
        }
    }
}

async fn write_up(mut sender: ControlSender, mut words: mpsc::Receiver<Up>) {
    while let Some(word) = words.recv().await {
        if let Err(error) = sender.send(&word).await {
            return tracing::debug!(%error, "the supervisor does not hear this node any more");
        }
    }
    sender.finish().await;
}

/// Asks for another certificate, for a new key, when half of the present one's time has passed.
async fn renew(endpoint: Endpoint, up: mpsc::Sender<Up>, mut answers: mpsc::Receiver<Issued>) {
    let (name, authority) = match endpoint.identity() {
        Ok(own) => (own.name().to_owned(), own.authority().to_vec()),
        Err(error) => return tracing::warn!(%error, "there is nothing to renew"),
    };
    loop {
        let left = endpoint.identity().map_or(Duration::ZERO, |own| own.left());
        tokio::time::sleep(left / 2).await;
        let Ok(request) = KeyRequest::new() else { continue };
        if up.send(Up::Renew(request.der().to_vec())).await.is_err() {
            return;
        }
        let Some(issued) = answers.recv().await else { return };
        match endpoint.set_identity(request.into_identity(&name, issued, authority.clone())) {
            Ok(()) => tracing::info!("this node's certificate was renewed"),
            Err(error) => tracing::warn!(%error, "a renewed certificate is no good"),
        }
    }
}

async fn read_down(
    mut receiver: ControlReceiver,
    agent: ActorRef<NodeMsg>,
    renewed: mpsc::Sender<Issued>,
) -> String {
    loop {
        match receiver.recv::<Down>().await {
            Ok(Some(Down::Say(message, traced))) => {
                if agent.cast(NodeMsg::Down(message, traced)).is_err() {
                    return "the node's agent has ended".to_owned();
                }
            }
            Ok(Some(Down::Renewed(issued))) => drop(renewed.try_send(issued)),
            Ok(Some(Down::Welcome(_) | Down::Taken)) => {}
            Ok(None) => return "it ended the control stream".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// A link between two parts of a run that breaks ends the epoch: what was on its way may be lost, and its receiver would wait for it
/// in silence until the step's time is over.
async fn tell_of_breaks<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    mut breaks: mpsc::UnboundedReceiver<Broken>,
) {
    while let Some(broken) = breaks.recv().await {
        let placement = node.placement();
        let has_a_part = placement.is_member(&broken.peer) || placement.is_learning(&broken.peer);
        if node.peers.counts(&broken) && has_a_part {
            let reason = format!("the link to {} broke: {}", broken.peer, broken.reason);
            drop(agent.cast(NodeMsg::Failed { epoch: placement.epoch, reason }));
        }
    }
}

/// Tells the supervisor now and then what this node knows of its links.
async fn report_links<B: Compute>(node: Arc<NodeContext<B>>, up: mpsc::Sender<Up>) {
    loop {
        tokio::time::sleep(LINKS_EVERY).await;
        node.peers.measure_new_links().await;
        if up.send(Up::Links(node.peers.reports())).await.is_err() {
            return;
        }
    }
}
