//! A whole cluster of real actors in one process, over the memory network and without libtorch.
//!
//! Every run is compared with the quiet run on one node: the losses of all steps and the digest of the last
//! checkpoint must be equal bit for bit, whatever happened on the way.
#![expect(clippy::expect_used, clippy::panic, reason = "tests")]

mod harness;
mod process;

use harness::{Cluster, Computed, settings, until};
use std::sync::OnceLock;
use std::time::Duration;
use volary_core::LayerId;
use volary_core::costs::{Costs, lanes_in_flight, live_gradients};
use volary_node::NodeEnd;
use volary_node::testing::{FakeDevice, Operation};
use volary_protocol::operator::{OperatorReply, OperatorRequest};

const STEPS: u64 = 12;

/// The run on one node that nothing disturbs.
fn quiet() -> &'static Computed {
    static QUIET: OnceLock<Computed> = OnceLock::new();
    QUIET.get_or_init(|| Cluster::start(settings(STEPS, 1)).finish())
}

#[test]
fn any_number_of_nodes_computes_the_same_bits() {
    assert_eq!(quiet().losses.len() as u64, STEPS);
    let distinct: std::collections::BTreeSet<u64> = quiet().losses.iter().map(|(_, loss, _)| *loss).collect();
    assert_eq!(distinct.len() as u64, STEPS, "every step changes the loss");
    assert_eq!(quiet().validation.len(), 4, "before the first step, after 4, 8 and 12");
    for nodes in [2, 3, 5] {
        assert_eq!(Cluster::start(settings(STEPS, nodes)).finish(), *quiet(), "{nodes} nodes");
    }
}

#[test]
fn sums_that_pass_several_nodes_compute_the_same_bits() {
    let mut settings = settings(STEPS, 5);
    settings.cluster.fan_in = 2;
    assert_eq!(Cluster::start(settings).finish(), *quiet());
}

#[test]
fn one_replica_or_three_compute_the_same_bits() {
    for replication in [1, 3] {
        let mut settings = settings(STEPS, 3);
        settings.cluster.replication = replication;
        assert_eq!(Cluster::start(settings).finish(), *quiet(), "{replication} replicas");
    }
}

#[test]
fn stages_on_nodes_that_cannot_hold_the_model_compute_the_same_bits() {
    let settings = settings(STEPS, 4);
    let costs = Costs::new(&settings.architecture, &settings.training);
    let half = |layers| costs.stage_bytes(LayerId::range(layers), 2);
    let memory = half(0..2).max(half(2..4)) + 5 * costs.expert_bytes;
    assert!(memory < half(0..4), "no node holds all layers");
    let mut cluster = Cluster::with_memory(settings, memory);
    assert_eq!(cluster.finish(), *quiet());
    let events = cluster.lines("events").join("\n");
    assert!(events.contains("\"stages\":2"), "{events}");
}

/// When the first shard is updated, all lanes are done: no activation is alive, and at most one gradient
/// per shard.
#[test]
fn activations_and_gradients_of_lanes_are_gone_when_the_update_begins() {
    let cluster = Cluster::start(settings(200, 1));
    let shards = settings(200, 1).architecture.shards().len();
    let device = cluster.device("node-1");
    for step in [3, 6, 9] {
        cluster.wait_for_step(step);
        let hold = device.hold(Operation::Apply);
        until("an update is held", || hold.is_reached());
        assert!(device.live_tensors() <= shards, "{} alive, {shards} shards", device.live_tensors());
    }
}

#[test]
fn no_tensor_outlives_the_run() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    let devices = ["node-1", "node-2"].map(|name| cluster.device(name));
    assert_eq!(cluster.finish(), *quiet());
    let end = cluster.node_end("node-1");
    assert!(matches!(end, Ok(NodeEnd::Left(_))), "{end:?}");
    cluster.node_end("node-2").expect("an end");
    for device in devices {
        until("no tensor is alive", || device.live_tensors() == 0);
        assert!(device.live_tensors_max() > 0);
    }
}

/// A node dies while one of its calls is under way: forward, backward, in the reduction, in the update.
#[test]
fn a_death_in_any_phase_costs_no_committed_step() {
    let phases = [
        Operation::Embed,
        Operation::Dense,
        Operation::Gate,
        Operation::Expert,
        Operation::Combine,
        Operation::Loss,
        Operation::ExpertBackward,
        Operation::DenseBackward,
        Operation::ExpertGradient,
        Operation::Add,
        Operation::Norm,
        Operation::Apply,
    ];
    for phase in phases {
        let mut cluster = Cluster::start(settings(STEPS, 3));
        cluster.wait_for_step(2);
        let hold = cluster.device("node-2").hold(phase);
        until(&format!("{phase:?} is reached"), || hold.is_reached());
        cluster.kill("node-2");
        drop(hold);
        assert_eq!(cluster.finish(), *quiet(), "{phase:?}");
        assert_eq!((cluster.count("lost"), cluster.count("went_back")), (1, 0), "{phase:?}");
    }
}

#[test]
fn a_join_copies_shards_to_a_learner_and_aborts_no_step() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    slow_down(&cluster);
    cluster.wait_for_step(2);
    let name = cluster.join();
    until("the newcomer is a member", || state(&cluster, &name) == Some("member".into()));
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("aborted"), cluster.count("migrated")), (0, 1));
}

#[test]
fn a_drained_node_hands_over_and_leaves_and_aborts_no_step() {
    let mut cluster = Cluster::start(settings(STEPS, 3));
    slow_down(&cluster);
    cluster.wait_for_step(2);
    let reply = cluster.ask(OperatorRequest::Drain { node: "node-2".into() });
    assert!(matches!(reply, OperatorReply::Done { .. }), "{reply:?}");
    let end = cluster.node_end("node-2");
    assert!(matches!(end, Ok(NodeEnd::Left(_))), "{end:?}");
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("aborted"), cluster.count("left")), (0, 1));
}

#[test]
fn a_node_that_is_asked_to_leave_is_drained() {
    let mut cluster = Cluster::start(settings(STEPS, 3));
    slow_down(&cluster);
    cluster.wait_for_step(2);
    cluster.ask_to_leave("node-3");
    let end = cluster.node_end("node-3");
    assert!(matches!(end, Ok(NodeEnd::Left(_))), "{end:?}");
    assert_eq!(cluster.finish(), *quiet());
}

#[test]
fn a_node_whose_device_fails_is_fenced_and_the_others_continue() {
    let mut cluster = Cluster::start(settings(STEPS, 3));
    cluster.wait_for_step(2);
    cluster.device("node-2").fail(Operation::Apply);
    assert_eq!(cluster.finish(), *quiet());
    assert!(cluster.count("fenced") >= 1);
    assert_eq!(cluster.count("went_back"), 0);
    let events = cluster.lines("events").join("\n");
    assert!(events.contains("Apply fails"), "the reason is named: {events}");
}

#[test]
fn nodes_keep_their_state_while_the_supervisor_restarts() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    slow_down(&cluster);
    cluster.wait_for_step(3);
    cluster.kill_supervisor();
    std::thread::sleep(Duration::from_millis(50));
    cluster.start_supervisor();
    assert_eq!(cluster.finish(), *quiet());
    let events = cluster.lines("events").join("\n");
    assert_eq!((cluster.count("returned"), cluster.count("went_back")), (2, 0), "{events}");
}

#[test]
fn after_a_loss_of_everything_the_run_resumes_from_its_checkpoint() {
    let mut settings = settings(STEPS, 2);
    settings.cluster.return_timeout_ms = 200;
    let mut cluster = Cluster::start(settings);
    slow_down(&cluster);
    cluster.wait_for_step(3);
    let reply = cluster.ask(OperatorRequest::Checkpoint);
    let OperatorReply::Done { step } = reply else { panic!("no checkpoint: {reply:?}") };
    cluster.wait_for_step(step.0 + 1);
    for name in ["node-1", "node-2"] {
        cluster.kill(name);
    }
    cluster.kill_supervisor();
    cluster.start_supervisor();
    let names: Vec<String> = (0..3).map(|_| cluster.join()).collect();
    assert_eq!(cluster.finish(), *quiet());
    let loaded: u64 = names.iter().map(|name| cluster.device(name).calls(Operation::Load)).sum();
    assert!(loaded > 0, "shards came from the checkpoint");
    let events = cluster.lines("events").join("\n");
    assert!(events.contains(&format!("\"to\":{step}")), "it goes back to step {step} only: {events}");
}

#[test]
fn the_last_replica_of_a_shard_takes_the_run_back_to_its_checkpoint() {
    let mut settings = settings(STEPS, 3);
    settings.cluster.replication = 1;
    settings.cluster.return_timeout_ms = 200;
    let mut cluster = Cluster::start(settings);
    slow_down(&cluster);
    cluster.wait_for_step(2);
    let reply = cluster.ask(OperatorRequest::Checkpoint);
    let OperatorReply::Done { step } = reply else { panic!("no checkpoint: {reply:?}") };
    cluster.wait_for_step(step.0 + 2);
    cluster.kill("node-2");
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!(cluster.count("went_back"), 1);
    let events = cluster.lines("events").join("\n");
    assert!(events.contains(&format!("\"to\":{step}")), "{events}");
}

#[test]
fn a_slow_node_changes_no_bit() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    cluster.device("node-2").set_delay(Duration::from_millis(1));
    assert_eq!(cluster.finish(), *quiet());
}

#[test]
fn a_killed_process_restarts_under_its_name() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    slow_down(&cluster);
    cluster.wait_for_step(2);
    cluster.kill("node-2");
    cluster.start_node("node-2", FakeDevice::default());
    until("node-2 has joined again", || cluster.count("joined") == 3);
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("lost"), cluster.count("went_back")), (1, 0));
}

/// After a supervisor restart, members return under their names, and a restarted process can rejoin under its
/// old name once the reservation has expired.
#[test]
fn processes_that_restart_together_with_the_supervisor_get_their_names_back() {
    let mut settings = settings(STEPS, 3);
    settings.cluster.replication = 3;
    let mut cluster = Cluster::start(settings);
    slow_down(&cluster);
    cluster.wait_for_step(3);
    cluster.kill_supervisor();
    cluster.kill("node-3");
    cluster.start_supervisor();
    // The newcomer asks for the name before and after its owner could have returned.
    cluster.start_node("node-3", FakeDevice::default());
    let hold = cluster.device("node-1").hold(Operation::Apply);
    until("all have joined", || cluster.count("returned") == 2 && cluster.count("joined") == 4);
    drop(hold);
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!(cluster.count("went_back"), 0);
}

/// A restart may take longer than nodes wait for a supervisor that is gone: this one says that it is
/// starting.
#[test]
fn nodes_wait_for_a_supervisor_that_starts_slowly_and_lose_nothing() {
    let mut settings = settings(STEPS, 2);
    settings.cluster.supervisor_timeout_ms = 1_500;
    let mut cluster = Cluster::start(settings);
    slow_down(&cluster);
    cluster.wait_for_step(3);
    cluster.kill_supervisor();
    cluster.start_supervisor_after(Duration::from_millis(4_000));
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("returned"), cluster.count("went_back")), (2, 0));
}

#[test]
fn a_newcomer_that_cannot_be_dialed_is_told_so_and_disturbs_nobody() {
    let mut cluster = Cluster::start(settings(STEPS, 2));
    slow_down(&cluster);
    cluster.wait_for_step(2);
    let name = cluster.join_hidden();
    let end = cluster.node_end(&name);
    assert!(matches!(&end, Ok(NodeEnd::Unreachable { address, .. }) if address == "127.0.0.1:9"), "{end:?}");
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("aborted"), cluster.count("joined")), (0, 2));
}

#[test]
fn the_last_nodes_leave_with_a_checkpoint_and_the_run_goes_on_with_others() {
    let mut settings = settings(STEPS, 2);
    settings.stay = true;
    let mut cluster = Cluster::start(settings);
    slow_down(&cluster);
    cluster.wait_for_step(3);
    for name in ["node-1", "node-2"] {
        cluster.ask_to_leave(name);
    }
    for name in ["node-1", "node-2"] {
        let end = cluster.node_end(name);
        assert!(matches!(end, Ok(NodeEnd::Left(_))), "{end:?}");
    }
    cluster.join();
    assert_eq!(cluster.finish(), *quiet());
    assert_eq!((cluster.count("left"), cluster.count("went_back")), (2, 0));
}

/// The gradients that the planner counts with, and two activations per shard of each lane in flight.
fn tensors_max(lanes: u32, shards: usize) -> usize {
    let gradients = usize::try_from(live_gradients(lanes, lanes_in_flight(1))).expect("a number");
    (gradients + 2 * lanes_in_flight(1)) * shards
}

/// However many lanes there are: what the lanes in flight make, and one partial sum per level of the tree.
#[test]
fn the_gradients_in_memory_do_not_grow_with_the_number_of_lanes() {
    for lanes in [8, 128] {
        let mut settings = settings(2, 1);
        settings.training.lanes = lanes;
        settings.validation.rounds = 0;
        let shards = settings.architecture.shards().len();
        let mut cluster = Cluster::start(settings);
        let device = cluster.device("node-1");
        // The device always has something more urgent to do than to add gradients.
        device.set_delay(Duration::from_micros(100));
        cluster.finish();
        let most = tensors_max(lanes, shards);
        let peak = device.live_tensors_max();
        assert!(peak <= most, "{peak} tensors for {lanes} lanes, {most} were expected at most");
    }
}

/// Two nodes with one stage each: one drives all lanes, and the other only serves them.
#[test]
fn a_stage_that_serves_lanes_keeps_no_more_gradients_than_one_that_drives_them() {
    let lanes = 128;
    let mut settings = settings(2, 2);
    settings.training.lanes = lanes;
    settings.validation.rounds = 0;
    settings.cluster.replication = 1;
    let costs = Costs::new(&settings.architecture, &settings.training);
    let of = |layers| costs.stage_bytes(LayerId::range(layers), lanes_in_flight(1));
    let memory = of(0..2).max(of(2..4)) + 4 * costs.expert_bytes;
    assert!(memory < of(0..4), "no node holds all layers");
    let shards = settings.architecture.shards().len();
    let mut cluster = Cluster::with_memory(settings, memory);
    let devices = ["node-1", "node-2"].map(|name| cluster.device(name));
    // The one that serves is slower than the one that drives.
    devices[1].set_delay(Duration::from_micros(300));
    cluster.finish();
    assert!(cluster.lines("events").join("\n").contains("\"stages\":2"));
    let most = tensors_max(lanes, shards);
    for device in devices {
        let peak = device.live_tensors_max();
        assert!(peak <= most, "{peak} tensors, {most} were expected at most");
    }
}

/// Makes steps take some milliseconds, so that the run outlasts what a test does to it.
fn slow_down(cluster: &Cluster) {
    for node in cluster.nodes.values() {
        node.device.set_delay(Duration::from_micros(300));
    }
}

/// A node's state in the status.
fn state(cluster: &Cluster, name: &str) -> Option<String> {
    cluster.status().nodes.into_iter().find(|node| node.name == name).map(|node| node.state)
}
