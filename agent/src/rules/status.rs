//! Reports the state of rules: in statuses, in explanations of single processes, and in the tags of profiles.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use gannet_proto::{
    control::{Rule, RuleStatus, rule_status},
    labels::Labels,
};

use super::{
    MANUAL_RULE_ID, RuleId,
    compile::ProcessTraits,
    condition_name,
    containers::PodContainers,
    slots::{Slot, SlotUse, Slots},
};
use crate::profile::RuleTag;

/// Owns what reports contain beside the rules themselves.
#[derive(Debug, Default)]
pub(super) struct RuleStatuses {
    /// Conditions that the sensors cannot watch at the moment, by rule.
    faults: BTreeMap<RuleId, String>,
    /// The limits that the governor has lowered, human-readable.
    governed: Option<String>,
}

impl RuleStatuses {
    pub(super) fn set_faults(&mut self, faults: BTreeMap<RuleId, String>) {
        self.faults = faults;
    }

    pub(super) fn set_governed(&mut self, reason: Option<String>) {
        self.governed = reason;
    }

    /// Returns the status of each rule. `processes` counts the processes of a slot.
    pub(super) fn all(
        &self,
        slots: &Slots,
        now: SystemTime,
        processes: impl Fn(u32) -> u64,
    ) -> Vec<RuleStatus> {
        let mut statuses: BTreeMap<&str, RuleStatus> = BTreeMap::new();
        for (index, slot) in slots.active().filter(|(_, slot)| slot.rule.id != MANUAL_RULE_ID) {
            let processes = processes(index as u32);
            if let Some(known) = statuses.get_mut(slot.rule.id.as_str()) {
                known.processes = known.processes.max(processes);
                continue;
            }
            let (state, reason) = self.state(slots, slot, now);
            statuses.insert(&slot.rule.id, Self::status(slot, state, reason, processes));
        }
        for waiting in slots.waiting() {
            let slot = &waiting.entry;
            let (state, reason) =
                slot.not_live(now).unwrap_or_else(|| (rule_status::State::Waiting, waiting.reason()));
            statuses.insert(&slot.rule.id, Self::status(slot, state, reason, 0));
        }
        statuses.into_values().collect()
    }

    fn status(slot: &Slot, state: rule_status::State, reason: String, processes: u64) -> RuleStatus {
        RuleStatus {
            rule_id: slot.rule.id.clone(),
            state: state.into(),
            reason,
            processes,
            samples: slot.samples,
            last_sample: slot.last_sample.map(Into::into),
            expires_at: slot.expires_at.map(Into::into),
        }
    }

    /// Explains for each rule why it samples a process or does not.
    pub(super) fn explain(
        &self,
        slots: &Slots,
        pods: &PodContainers,
        process: &ProcessTraits<'_>,
        container: Option<u64>,
        now: SystemTime,
    ) -> Vec<(RuleId, String)> {
        let mut lines: Vec<(RuleId, String)> = Vec::new();
        let in_slots = slots.active().map(|(_, slot)| (slot, None));
        let waiting = slots.waiting().iter().map(|waiting| (&waiting.entry, Some(waiting.reason())));
        for (slot, waits) in in_slots.chain(waiting) {
            if lines.iter().any(|(id, _)| *id == slot.rule.id) {
                continue;
            }
            let (state, reason) = match waits {
                Some(reason) => (rule_status::State::Waiting, reason),
                None => self.state(slots, slot, now),
            };
            let in_container =
                slot.containers(pods).is_none_or(|ids| container.is_some_and(|id| ids.contains(&id)));
            let why = if let Some(mismatch) = slot.compiled.mismatch(process) {
                format!("does not match: {mismatch}")
            } else if !in_container {
                "does not match: it is in none of the containers that the rule names".into()
            } else if state == rule_status::State::Capturing {
                "matches, and samples it".into()
            } else {
                format!("matches, but samples nothing now: {reason}")
            };
            lines.push((slot.rule.id.clone(), why));
        }
        lines
    }

    /// Returns what profiles say about the rule or capture in a slot.
    pub(super) fn tag(&self, slot: &Slot) -> RuleTag {
        let (reason, evidence, capture) = match &slot.usage {
            SlotUse::Always => ("always", String::new(), 0),
            SlotUse::Watch { .. } => ("pre-trigger", String::new(), 0),
            SlotUse::AtExec => ("exec", "the process matched at execve".to_owned(), 0),
            SlotUse::Capture { reason, id, .. } => (reason.kind, reason.evidence.clone(), id.number()),
        };
        let capture_of_rule = slot.rule.capture.as_ref();
        let lacks = |part: Option<bool>| part == Some(false);
        RuleTag {
            id: slot.rule.id.clone(),
            revision: slot.revision,
            reason: reason.to_owned(),
            evidence,
            capture,
            pre_trigger: None,
            governed: self.governed.clone(),
            labels: slot
                .rule
                .labels
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect::<Labels>(),
            without_user: lacks(capture_of_rule.and_then(|capture| capture.user_stacks)),
            without_kernel: lacks(capture_of_rule.and_then(|capture| capture.kernel_stacks)),
        }
    }

    fn state(&self, slots: &Slots, slot: &Slot, now: SystemTime) -> (rule_status::State, String) {
        if let Some(not_live) = slot.not_live(now) {
            return not_live;
        }
        if matches!(slot.usage, SlotUse::Always) {
            return (rule_status::State::Capturing, String::new());
        }
        let running: Vec<String> = slots
            .active()
            .filter_map(|(_, other)| match &other.usage {
                SlotUse::Capture { reason, .. } if other.rule.id == slot.rule.id => {
                    Some(format!("{} {}", reason.kind, reason.evidence))
                }
                _ => None,
            })
            .collect();
        if !running.is_empty() {
            return (rule_status::State::Capturing, running.join("; "));
        }
        let mut reason = format!("waits for {}", condition_names(&slot.rule));
        if let Some(fault) = self.faults.get(&slot.rule.id) {
            reason = format!("{reason}; not watched everywhere: {fault}");
        }
        if slot.captures > 0 {
            let ago = slot
                .last_capture
                .and_then(|at| now.duration_since(at).ok())
                .map(|ago| Duration::from_secs(ago.as_secs()));
            let ago = ago.map_or_else(String::new, |ago| {
                format!(", the last ended {} ago", humantime::format_duration(ago))
            });
            reason = format!("{reason}; {} captures so far{ago}", slot.captures);
        }
        (rule_status::State::Waiting, reason)
    }
}

/// Returns the names of a rule's conditions: `pressure or exec`.
fn condition_names(rule: &Rule) -> String {
    let names: Vec<&str> =
        rule.when.iter().filter_map(|condition| Some(condition_name(condition.kind.as_ref()?))).collect();
    names.join(" or ")
}
