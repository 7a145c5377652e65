//! The agent alone, with hand-written commands.

use super::*;
use crate::architecture::presets;
use crate::ids::{ExpertId, LayerId};
use crate::layout::Layout;
use crate::limits::COPY_ATTEMPTS_MAX;
use crate::messages::{LastCommit, Norm};
use crate::shared::Shared;
use crate::update::Moments;
use std::sync::Arc;

const UPDATE: Update = Update { apply: true, rate: 0.1, scale: 1.0, moments: Moments::Decay(0.0) };
const EXPERT: ShardId = ShardId::Expert { layer: LayerId(0), expert: ExpertId(1) };

fn id(name: &str) -> NodeId {
    NodeId::new(name)
}

/// The agent `a` of two nodes, and its last effects.
struct Harness {
    agent: Agent,
    effects: Vec<Effect>,
}

impl Harness {
    fn new() -> Self {
        let architecture = Arc::new(presets()[1].architecture.clone());
        Self { agent: Agent::new(id("a"), architecture), effects: Vec::new() }
    }

    fn handle(&mut self, event: Event) -> &[Effect] {
        self.effects = self.agent.handle(event);
        &self.effects
    }

    fn assign(&mut self, assignment: Assignment) -> &[Effect] {
        self.handle(Event::Command(NodeCommand::Assign(Box::new(assignment))))
    }

    fn begin(&mut self, epoch: Epoch, step: Step) -> &[Effect] {
        self.handle(Event::Command(NodeCommand::Begin {
            epoch,
            step,
            data: step,
            pass: Pass::Train,
            lanes: Vec::new(),
            compare: Vec::new(),
        }))
    }

    fn prepare(&mut self, epoch: Epoch, step: Step) -> &[Effect] {
        self.prepare_with(epoch, step, &[ShardId::Embedding, EXPERT])
    }

    /// Prepares a step with the gradients of these shards.
    fn prepare_with(&mut self, epoch: Epoch, step: Step, shards: &[ShardId]) -> &[Effect] {
        let norm = Norm { squared: 1.0, finite: true };
        let norms = shards.iter().map(|shard| (*shard, norm)).collect();
        let message =
            NodeReport::Prepared { epoch, step, norms, digests: Vec::new(), lanes: Vec::new(), speed: None };
        self.handle(Event::Done(message))
    }

    fn commit(&mut self, epoch: Epoch, step: Step) -> &[Effect] {
        self.handle(Event::Command(NodeCommand::Commit { epoch, step, update: UPDATE }))
    }

    /// In placement `epoch` at `version`, with the embedding in memory and `learn` to be copied.
    fn entered(epoch: Epoch, version: Step, learn: &[ShardId]) -> Self {
        let mut harness = Self::new();
        harness.assign(assignment(epoch, version, Source::Initial, learn));
        harness.handle(Event::Fetched { epoch, outcome: Ok(()) });
        harness
    }

    fn reports(&self) -> Vec<&NodeReport> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Report(message) => Some(message),
                _ => None,
            })
            .collect()
    }
}

fn layout(placement: Placement) -> Shared<Layout> {
    Shared::new(Layout { placement: placement.into(), ..Layout::default() })
}

fn assignment(epoch: Epoch, version: Step, source: Source, learn: &[ShardId]) -> Assignment {
    let members = vec![id("a"), id("b")];
    let stage = crate::placement::Stage {
        layers: LayerId::range(0..u16::MAX),
        holders: members.clone(),
        lanes: vec![0, 1],
    };
    let learners = learn.iter().map(|shard| (*shard, [id("a")].into())).collect();
    Assignment {
        layout: layout(Placement { epoch, stages: vec![stage], members, learners, ..Placement::default() }),
        timeline: Timeline(0),
        version,
        last: None,
        shards: vec![(ShardId::Embedding, source)],
        learn: learn.iter().map(|shard| (*shard, vec![id("b"), id("c")])).collect(),
    }
}

fn applied(effects: &[Effect]) -> Vec<Step> {
    let applied = |effect: &Effect| match effect {
        Effect::Apply { step, .. } => Some(*step),
        _ => None,
    };
    effects.iter().filter_map(applied).collect()
}

///
#[test]
fn a_commit_is_applied_once_and_only_when_its_step_is_prepared() {
    let mut harness = Harness::entered(Epoch(1), Step(0), &[]);
    harness.begin(Epoch(1), Step(1));
    assert!(harness.commit(Epoch(1), Step(1)).is_empty(), "not prepared");
    harness.prepare(Epoch(1), Step(1));
    assert_eq!(applied(harness.commit(Epoch(1), Step(1))), [Step(1)]);
    assert!(harness.commit(Epoch(1), Step(1)).is_empty(), "repeated");
    assert_eq!(harness.agent.resident_state().version, Step(1));
}

///
#[test]
fn a_message_of_another_epoch_changes_nothing() {
    let mut harness = Harness::entered(Epoch(2), Step(0), &[]);
    harness.begin(Epoch(2), Step(1));
    assert!(harness.begin(Epoch(1), Step(1)).is_empty());
    harness.prepare(Epoch(2), Step(1));
    assert!(harness.commit(Epoch(1), Step(1)).is_empty());
    assert!(harness.commit(Epoch(3), Step(1)).is_empty());
    assert!(harness.assign(assignment(Epoch(1), Step(0), Source::Held, &[])).is_empty());
}

///
#[test]
fn a_missed_journaled_commit_is_applied_with_the_next_assignment() {
    let mut harness = Harness::entered(Epoch(1), Step(0), &[]);
    harness.begin(Epoch(1), Step(1));
    harness.prepare(Epoch(1), Step(1));
    harness.handle(Event::SupervisorLost);
    assert!(harness.effects.contains(&Effect::Discard { epoch: Epoch(1), all: false }), "its gradients stay");
    assert_eq!(harness.agent.resident_state().prepared, Some((Epoch(1), Step(1))));
    let last = Some(LastCommit { epoch: Epoch(1), step: Step(1), update: UPDATE });
    harness.assign(Assignment { last, ..assignment(Epoch(2), Step(1), Source::Held, &[]) });
    assert_eq!(applied(&harness.effects), [Step(1)]);
    assert_eq!(harness.reports(), [&NodeReport::Ready { epoch: Epoch(2) }]);
}

#[test]
fn a_prepared_step_that_was_never_committed_is_dropped_and_the_state_stays() {
    let mut harness = Harness::entered(Epoch(1), Step(0), &[]);
    harness.begin(Epoch(1), Step(1));
    harness.prepare(Epoch(1), Step(1));
    harness.assign(assignment(Epoch(2), Step(0), Source::Held, &[]));
    assert_eq!(applied(&harness.effects), [] as [Step; 0]);
    assert_eq!(harness.reports(), [&NodeReport::Ready { epoch: Epoch(2) }]);
    assert_eq!(harness.agent.resident_state().prepared, None);
}

#[test]
fn a_node_that_missed_a_commit_reports_it_and_begins_nothing() {
    let mut harness = Harness::entered(Epoch(1), Step(0), &[]);
    harness.assign(assignment(Epoch(2), Step(2), Source::Held, &[]));
    assert!(matches!(harness.reports()[..], [NodeReport::Behind { epoch: Epoch(2), version: Step(2), .. }]));
    assert!(harness.begin(Epoch(2), Step(3)).is_empty());
}

#[test]
fn shards_of_an_aborted_placement_are_dropped() {
    let mut harness = Harness::new();
    harness.assign(assignment(Epoch(1), Step(0), Source::Initial, &[]));
    harness.handle(Event::Command(NodeCommand::Abort { epoch: Epoch(1) }));
    assert!(harness.handle(Event::Fetched { epoch: Epoch(1), outcome: Ok(()) }).is_empty());
    assert!(harness.agent.resident_state().shards.is_empty());
}

#[test]
fn state_of_another_timeline_is_released() {
    let mut harness = Harness::entered(Epoch(1), Step(4), &[]);
    harness.assign(Assignment {
        timeline: Timeline(1),
        ..assignment(Epoch(2), Step(4), Source::Checkpoint(Step(4)), &[])
    });
    assert!(harness.effects.contains(&Effect::Release(vec![ShardId::Embedding])));
    assert!(harness.effects.iter().any(|effect| matches!(effect, Effect::Fetch { version: Step(4), .. })));
}

#[test]
fn a_copy_that_is_steps_behind_catches_up_with_its_stashed_gradients() {
    let mut harness = Harness::entered(Epoch(1), Step(5), &[EXPERT]);
    let copy = Effect::Copy { epoch: Epoch(1), shard: EXPERT, from: vec![id("b"), id("c")] };
    assert!(harness.effects.contains(&copy), "{:?}", harness.effects);
    for step in [Step(6), Step(7)] {
        harness.begin(Epoch(1), step);
        harness.prepare(Epoch(1), step);
        let effects = harness.commit(Epoch(1), step);
        let kept = matches!(effects, [Effect::Apply { stash, .. }] if stash[0].0 == EXPERT);
        assert!(kept, "{effects:?}");
    }
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(5)) });
    let install = Effect::Install { shard: EXPERT, version: Step(5), replay: vec![Step(6), Step(7)] };
    assert!(harness.effects.contains(&install), "{:?}", harness.effects);
    assert_eq!(harness.reports(), [&learned(Step(7))]);
    assert_eq!(harness.agent.shards().get(&EXPERT), Some(&Step(7)));
}

#[test]
fn a_copy_that_is_too_far_behind_is_requested_a_bounded_number_of_times() {
    let mut harness = Harness::entered(Epoch(1), Step(0), &[EXPERT]);
    let kept = stash_steps(harness.agent.architecture.shard_parameters(EXPERT));
    for step in Step(1).through(Step(kept as u64 + 1)) {
        harness.begin(Epoch(1), step);
        harness.prepare(Epoch(1), step);
        harness.commit(Epoch(1), step);
    }
    for ask in 1..COPY_ATTEMPTS_MAX {
        let effects = harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(0)) });
        let first = if ask % 2 == 1 { "c" } else { "b" };
        let is_next = matches!(effects, [Effect::Copy { from, .. }] if from[0] == id(first));
        assert!(is_next, "the next holder: {effects:?}");
    }
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(0)) });
    assert!(matches!(harness.reports()[..], [NodeReport::CannotLearn { .. }]), "{:?}", harness.effects);
}

fn learned(version: Step) -> NodeReport {
    NodeReport::Learned { epoch: Epoch(1), version, shards: vec![EXPERT] }
}

/// A learner in placement 1, which `member` and not this node is a member of, with a copy at step 5.
fn learner() -> Harness {
    let mut harness = Harness::new();
    let mut assignment = assignment(Epoch(1), Step(5), Source::Initial, &[EXPERT]);
    assignment.shards.clear();
    let members = vec![id("member")];
    let placement =
        Placement { members, stages: Vec::new(), ..Placement::clone(&assignment.layout.placement) };
    assignment.layout = layout(placement);
    harness.assign(assignment);
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(5)) });
    assert_eq!(harness.reports(), [&learned(Step(5))]);
    harness
}

#[test]
fn a_learner_that_is_prepared_applies_the_step_and_says_that_it_still_has_its_copy() {
    let mut harness = learner();
    harness.begin(Epoch(1), Step(6));
    harness.prepare(Epoch(1), Step(6));
    assert_eq!(applied(harness.commit(Epoch(1), Step(6))), [Step(6)]);
    assert_eq!(harness.reports(), [&learned(Step(6))]);
}

///
#[test]
fn a_learner_that_misses_a_step_drops_its_copy_and_copies_again() {
    let mut harness = learner();
    harness.begin(Epoch(1), Step(6));
    let effects = harness.commit(Epoch(1), Step(6));
    let copies = |effect: &Effect| matches!(effect, Effect::Copy { shard, .. } if *shard == EXPERT);
    assert!(matches!(effects, [Effect::Release(_), copy] if copies(copy)), "{effects:?}");
    assert!(harness.agent.shards().is_empty());
    // It takes part in the next step, and learns the shard at a later version.
    assert!(matches!(harness.begin(Epoch(1), Step(7)), [Effect::Run { .. }]));
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(6)) });
    assert_eq!(harness.reports(), [&learned(Step(6))]);
}

///
#[test]
fn a_member_without_the_gradient_of_a_shard_that_it_learns_applies_the_others_and_copies_again() {
    let mut harness = Harness::entered(Epoch(1), Step(5), &[EXPERT]);
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(5)) });
    harness.begin(Epoch(1), Step(6));
    harness.prepare_with(Epoch(1), Step(6), &[ShardId::Embedding]);
    harness.commit(Epoch(1), Step(6));
    let effects = &harness.effects;
    assert!(matches!(&effects[0], Effect::Release(shards) if shards == &[EXPERT]), "{effects:?}");
    let only_embedding =
        |effect: &Effect| matches!(effect, Effect::Apply { shards, .. } if shards == &[ShardId::Embedding]);
    assert!(only_embedding(&effects[1]), "{effects:?}");
    assert!(matches!(&effects[2], Effect::Copy { shard, .. } if *shard == EXPERT), "{effects:?}");
}

#[test]
fn a_copy_that_cannot_be_installed_is_not_learned() {
    let mut harness = Harness::entered(Epoch(1), Step(5), &[EXPERT]);
    harness.handle(Event::Copied { epoch: Epoch(1), shard: EXPERT, outcome: Ok(Step(5)) });
    // The shell stops at the failed effect: the report after it is not sent.
    let failure = Failure { reason: "no memory".into(), fatal: false, suspect: None };
    harness.handle(Event::NotInstalled { shard: EXPERT, failure });
    assert!(matches!(harness.reports()[..], [NodeReport::CannotLearn { .. }]), "{:?}", harness.effects);
    assert!(!harness.agent.shards().contains_key(&EXPERT));
}

#[test]
fn a_node_that_could_not_apply_a_step_holds_nothing_any_more() {
    let mut harness = Harness::entered(Epoch(1), Step(5), &[]);
    harness.begin(Epoch(1), Step(6));
    harness.prepare(Epoch(1), Step(6));
    harness.commit(Epoch(1), Step(6));
    let failure = Failure { reason: "no memory".into(), fatal: false, suspect: None };
    harness.handle(Event::NotApplied { failure });
    assert!(matches!(harness.reports()[..], [NodeReport::Behind { version: Step(5), .. }]));
    assert!(harness.agent.resident_state().shards.is_empty());
}
