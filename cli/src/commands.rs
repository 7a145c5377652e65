//! One file per command.

pub mod digest;
pub mod doctor;
pub mod generate;
pub mod identity;
pub mod node;
pub mod operate;
pub mod plan;
pub mod supervisor;
pub mod token;
pub mod top;
pub mod trace;
pub mod train;
