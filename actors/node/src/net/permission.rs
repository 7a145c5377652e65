//! Whether the placement foresees what a peer sends.

use crate::context::NodeContext;
use crate::error::{Error, Result};
use volary_core::compute::Compute;
use volary_core::placement::Traffic;
use volary_core::{Epoch, NodeId};

/// Checks what `peer` sends to this node in an epoch.
///
/// # Errors
/// When the placement has been replaced meanwhile, or does not foresee it. Nothing else may come of it.
pub(crate) fn check<B: Compute>(
    node: &NodeContext<B>,
    epoch: Epoch,
    peer: &NodeId,
    traffic: Traffic<'_>,
) -> Result<()> {
    let placement = node.placement();
    if placement.epoch != epoch {
        return Err(Error::OtherPlacement { wanted: epoch, current: placement.epoch });
    }
    match placement.may_send(peer, &node.id, traffic) {
        true => Ok(()),
        false => Err(Error::NotForeseen { peer: peer.clone(), what: format!("{traffic:?}") }),
    }
}
