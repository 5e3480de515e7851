//! The verbs of `gannet-agent`.

pub mod check;
pub mod record;
pub mod run;
pub mod top;
