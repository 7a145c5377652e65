use super::*;

fn peer() -> NodeId {
    NodeId::new("node-2")
}

#[test]
fn only_an_unreachable_peer_is_blamed() {
    let unreachable = Error::Unreachable { peer: peer(), reason: "timed out".into() };
    assert_eq!(unreachable.failure().suspect, Some(peer()));
    assert!(!unreachable.failure().fatal);
    let refusal = FrameRefusal::new(FrameRefusalCode::Stale, "late");
    let others = [
        Error::Compute(ComputeError("nan".into())),
        Error::Refused { peer: peer(), refusal },
        Error::NoAnswer { peer: peer(), limit: Duration::from_secs(1) },
        Error::MissingShard { shard: ShardId::Embedding },
    ];
    for error in others {
        assert_eq!(error.failure().suspect, None, "{error}");
    }
}

#[test]
fn failures_of_state_are_fatal_and_those_of_a_lane_are_not() {
    let compute = || ComputeError("out of memory".into());
    assert!(Error::replica(ShardId::Embedding)(compute()).failure().fatal);
    assert!(!Error::Compute(compute()).failure().fatal);
    let (shard, step) = (ShardId::Embedding, Step(3));
    let fatal = [
        Error::WrongVersion { shard, version: Step(2), wanted: step },
        Error::MissingGradient { shard, step },
        Error::ActorDied { actor: "of embedding".into(), reason: "panic".into() },
        Error::TooLarge { peer: peer(), reason: "3 GiB".into() },
        Error::NotUpdated { step, source: Box::new(Error::ComputationDropped) },
    ];
    for error in fatal {
        assert!(error.failure().fatal, "{error}");
    }
    assert!(!Error::ComputationDropped.failure().fatal, "a lane's");
    let supervisor = |link_open| Error::Supervisor { reason: "no such shard".into(), link_open };
    assert!(supervisor(true).failure().fatal, "it will not give another answer");
    assert!(!supervisor(false).failure().fatal, "it returns");
}

#[test]
fn refusals_carry_the_code_of_their_cause() {
    let missing = Error::MissingShard { shard: ShardId::Embedding }.refusal();
    assert_eq!(missing.code, FrameRefusalCode::MissingShard);
    assert_eq!(missing.reason, "embedding is not on this node");
    let unexpected = Error::UnexpectedFrame { kind: FrameKind::Blob }.refusal();
    assert_eq!(unexpected.code, FrameRefusalCode::Malformed);
}

#[test]
fn the_part_of_a_step_is_named_and_changes_neither_blame_nor_severity() {
    let unreachable = Error::Unreachable { peer: peer(), reason: "timed out".into() }.of("lane 3");
    assert_eq!(unreachable.to_string(), "lane 3: node-2 cannot be reached: timed out");
    assert_eq!((unreachable.failure().suspect, unreachable.failure().fatal), (Some(peer()), false));
    let missing = Error::MissingShard { shard: ShardId::Embedding }.of("lane 3");
    assert_eq!(missing.refusal().code, FrameRefusalCode::MissingShard);
}
