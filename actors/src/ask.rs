//! One actor asks another and waits for the answer, for no longer than the limit.

use crate::limits::CALL_MAX;
use ractor::rpc::CallResult;
use ractor::{ActorRef, Message, RpcReplyPort};
use volary_core::compute::{ComputeError, Computed};

/// Sends the message that `make` builds around a reply port and awaits the reply.
pub(crate) async fn ask<M: Message, T: Send + 'static>(
    actor: &ActorRef<M>,
    make: impl FnOnce(RpcReplyPort<Computed<T>>) -> M,
) -> Computed<T> {
    match actor.call(make, Some(CALL_MAX)).await {
        Ok(CallResult::Success(answer)) => answer,
        Ok(CallResult::Timeout) => Err(ComputeError(format!("no answer within {CALL_MAX:?}"))),
        Ok(CallResult::SenderError) => Err(ComputeError("the answer was dropped".into())),
        Err(error) => Err(ComputeError(format!("an actor is gone: {error}"))),
    }
}
