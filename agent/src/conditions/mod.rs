//! Decides when a capture starts.
//!
//! Sensors on a thread of their own measure pressure, CPU use and throttling ([`sensors`]). The state machine in [`trigger`]
//! decides on the engine's thread, in the engine's time. The engine starts and ends the captures. Nothing in this module
//! writes BPF maps.

mod psi;
mod rate;
mod sensors;
mod stat;
mod trigger;

use std::fs;

use gannet_proto::control::condition::{self, pressure};

pub use self::psi::{PressureError, PressureFile};
pub(crate) use self::{
    sensors::{SensorTask, Sensors},
    trigger::{CaptureStart, SuppressedStarts, Triggers, WatchScope},
};
use crate::{cgroup::mount_of, rules::ConditionSupport};

/// The conditions that the running kernel can watch.
#[derive(Clone, Debug)]
pub(crate) struct NodeConditions {
    /// Why the node has no pressure files.
    node_pressure: Option<String>,
    /// Why control groups have no pressure files.
    group_pressure: Option<String>,
}

impl NodeConditions {
    /// Reads what the kernel offers.
    pub(crate) fn probe() -> Self {
        let node_pressure = fs::read_to_string("/proc/pressure/cpu").err().map(|error| {
            format!("this kernel reports no pressure (/proc/pressure/cpu: {error}); boot it with psi=1")
        });
        let group_pressure = node_pressure.clone().or_else(|| {
            mount_of("").is_none().then(|| {
                "pressure of control groups needs cgroup2, which is not mounted here; scope: node works"
                    .to_owned()
            })
        });
        Self { node_pressure, group_pressure }
    }
}

impl ConditionSupport for NodeConditions {
    fn missing(&self, kind: &condition::Kind) -> Option<String> {
        match kind {
            condition::Kind::Pressure(wanted) if wanted.scope() == pressure::Scope::Node => {
                self.node_pressure.clone()
            }
            condition::Kind::Pressure(_) => self.group_pressure.clone(),
            _ => None,
        }
    }
}
