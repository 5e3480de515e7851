//! When a capture starts. Sensors on a thread of their own look at pressure, CPU use and throttling; the state machine in
//! [`trigger`] decides, on the engine's thread and in its time; the engine starts and ends captures. Nothing here writes
//! maps.

mod psi;
pub mod rate;
mod sensors;
mod stat;
pub mod trigger;

pub use self::{
    psi::{Pressure, PressureError},
    sensors::{Report, Sensors, Task},
    stat::Usage,
    trigger::{Level, Observation, Spot, Start, Triggers},
};
use crate::{cgroup::mount_of, rules::ConditionSupport};
use gannet_proto::control::condition;

/// What this node can watch.
#[derive(Clone, Debug)]
pub struct NodeConditions {
    /// Why there is no pressure of the node.
    node_pressure: Option<String>,
    /// Why there is none of control groups.
    group_pressure: Option<String>,
}

impl NodeConditions {
    /// Looks what the kernel offers.
    pub fn probe() -> Self {
        let node_pressure = std::fs::read_to_string("/proc/pressure/cpu").err().map(|error| {
            format!("this kernel tells no pressure (/proc/pressure/cpu: {error}); boot it with psi=1")
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
            condition::Kind::Pressure(pressure) if pressure.scope() == condition::pressure::Scope::Node => {
                self.node_pressure.clone()
            }
            condition::Kind::Pressure(_) => self.group_pressure.clone(),
            _ => None,
        }
    }
}
