//! Starts captures and numbers them.

use std::time::{Duration, Instant, SystemTime};

use gannet_proto::control::{Rule, RuleError};

use super::{
    CaptureId, CaptureReason, CaptureTarget, RuleId,
    slots::{CAPTURE_SLOTS, Slot, SlotUse, Slots},
};

/// Length of a capture if the rule does not set one.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// Pause of a target after a capture if the rule does not set one.
const DEFAULT_COOLDOWN: Duration = Duration::from_secs(120);

/// Why a capture does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// All capture slots are in use.
    #[error("{CAPTURE_SLOTS} captures run on this node, which is the cap; wait until one has ended")]
    Full,
    /// The rule is not in force.
    #[error("no rule `{0}` is in force")]
    NoRule(RuleId),
    /// A manual capture has invalid parameters.
    #[error("{}", .0.iter().map(|error| format!("{}: {}", error.field, error.reason)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<RuleError>),
    /// The governor refuses captures, to keep the agent within its budgets.
    #[error("captures are refused: {0}")]
    Governed(String),
    /// The kernel refused the capture's rules.
    #[error("the kernel did not take the capture: {0}")]
    Kernel(String),
}

/// Owns the numbers of captures. The captures themselves are in [`Slots`].
#[derive(Debug, Default)]
pub(super) struct Captures {
    last_id: u64,
}

impl Captures {
    pub(super) fn start(
        &mut self,
        slots: &mut Slots,
        rule_id: &str,
        target: CaptureTarget,
        reason: CaptureReason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        let base =
            slots.live_rule(rule_id, now).ok_or_else(|| CaptureError::NoRule(rule_id.to_owned()))?.clone();
        let id = self.enter(slots, base, target, reason, ends)?;
        if let Some(base) = slots.live_rule(rule_id, now) {
            base.captures += 1;
        }
        Ok(id)
    }

    /// Starts a capture of a rule that exists for this capture only.
    pub(super) fn start_manual(
        &mut self,
        slots: &mut Slots,
        rule: &Rule,
        reason: CaptureReason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        self.enter(slots, Slot::for_manual_capture(rule, now), CaptureTarget::All, reason, ends)
    }

    fn enter(
        &mut self,
        slots: &mut Slots,
        base: Slot,
        target: CaptureTarget,
        reason: CaptureReason,
        ends: Instant,
    ) -> Result<CaptureId, CaptureError> {
        let id = CaptureId(self.last_id + 1);
        if !slots.add_capture(base, SlotUse::Capture { id, target, reason, ends }) {
            return Err(CaptureError::Full);
        }
        self.last_id = id.number();
        Ok(id)
    }
}

/// How long a rule's captures are.
pub(crate) fn capture_duration(rule: &Rule) -> Duration {
    let given = rule.capture.as_ref().and_then(|capture| capture.duration);
    given.and_then(|given| Duration::try_from(given).ok()).unwrap_or(DEFAULT_DURATION)
}

/// How long a target pauses after a capture of this rule.
pub(crate) fn capture_cooldown(rule: &Rule) -> Duration {
    let given = rule.capture.as_ref().and_then(|capture| capture.cooldown);
    given.and_then(|given| Duration::try_from(given).ok()).unwrap_or(DEFAULT_COOLDOWN)
}

/// How many captures of a rule may run at one time on this node.
pub(crate) fn max_concurrent_captures(rule: &Rule) -> usize {
    match rule.capture.as_ref().map_or(0, |capture| capture.max_concurrent) {
        0 => CAPTURE_SLOTS,
        given => given as usize,
    }
}
