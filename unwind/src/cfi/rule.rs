//! From the state of the registers to an unwind rule.

use gannet_elf::Arch;

use super::registers::{Cfa, Location, RegisterState, Registers};
use crate::format::{Unsupported, UnwindRule, cfa, deref_offset, flags, loc};

/// Returns the rule that a state amounts to.
pub(super) fn rule(state: &RegisterState, registers: Registers, arch: Arch, signal: bool) -> UnwindRule {
    if state.ra == Location::Undefined {
        return UnwindRule::OUTERMOST;
    }
    match try_rule(state, registers, arch) {
        Ok(rule) => {
            let signal = if signal { flags::SIGNAL } else { 0 };
            let signed = if state.ra_signed { flags::RA_SIGNED } else { 0 };
            UnwindRule { flags: signal | signed, ..rule }
        }
        Err(why) => UnwindRule::unsupported(why),
    }
}

/// Returns where a rule says that rbx is, in the encoding of [`flags::RBX_SHIFT`].
pub(super) fn rbx_of(state: &RegisterState) -> u8 {
    match state.rbx {
        Location::Unset | Location::Same => flags::RBX_SAME,
        Location::AtCfa(offset @ -56..=-16) if offset % 8 == 0 => (-offset / 8) as u8,
        _ => 0,
    }
}

fn try_rule(state: &RegisterState, registers: Registers, arch: Arch) -> Result<UnwindRule, Unsupported> {
    let narrow = |offset: i64| i32::try_from(offset).map_err(|_| Unsupported::Offset);
    let (cfa_kind, cfa_offset) = match state.cfa {
        Cfa::Register(register, offset) if register == registers.sp => (cfa::SP, narrow(offset)?),
        Cfa::Register(register, offset) if register == registers.fp => (cfa::FP, narrow(offset)?),
        Cfa::Register(register @ 0..32, offset) => (cfa::REGISTER + register as u8, narrow(offset)?),
        Cfa::Register(..) => return Err(Unsupported::Register),
        Cfa::Deref { fp, at, plus } => {
            let kind = if fp { cfa::FP_DEREF } else { cfa::SP_DEREF };
            (kind, deref_offset(at, plus).ok_or(Unsupported::Offset)?)
        }
        Cfa::Plt(from) => (cfa::PLT, i32::from(from)),
        Cfa::Bad(why) => return Err(why),
    };
    // Unwinding takes the frame address for the caller's stack pointer; an entry may only say the same in other words.
    match state.sp {
        Location::Unset | Location::Same | Location::IsCfa(0) => {}
        Location::At { fp, offset } if state.cfa == (Cfa::Deref { fp, at: offset, plus: 0 }) => {}
        _ => return Err(Unsupported::Register),
    }
    let (fp_kind, fp_offset) = match state.fp {
        Location::Unset | Location::Same => (loc::SAME, 0),
        Location::AtCfa(offset) => (loc::CFA, narrow(offset)?),
        Location::At { fp, offset } => (if fp { loc::FP } else { loc::SP }, narrow(offset)?),
        Location::In(register @ 0..32) => (loc::REGISTER + register as u8, 0),
        Location::Undefined | Location::Bad | Location::IsCfa(_) | Location::In(_) => (loc::UNDEFINED, 0),
    };
    let (ra_kind, ra_offset) = match (state.ra, arch) {
        (Location::AtCfa(offset), _) => (loc::CFA, narrow(offset)?),
        (Location::At { fp, offset }, _) => (if fp { loc::FP } else { loc::SP }, narrow(offset)?),
        (Location::In(register @ 0..32), _) => (loc::REGISTER + register as u8, 0),
        (Location::Unset | Location::Same, Arch::Aarch64) if registers.ra < 32 => {
            (loc::REGISTER + registers.ra as u8, 0)
        }
        _ => return Err(Unsupported::ReturnAddress),
    };
    Ok(UnwindRule { cfa_kind, fp_kind, ra_kind, flags: 0, cfa_offset, fp_offset, ra_offset })
}
/// Detects when an epilogue has taken the frame pointer, or rbx, from its slot.
///
/// Compilers do not describe it: their entries still name the slot when it is below the stack pointer, where a signal handler
/// may write at any time and which a copied stack does not contain. A slot that was above the stack pointer and is below it now
/// has been popped, and the register holds the caller's value. (A slot that never was above is in the red zone and stays in
/// use.)
#[derive(Default)]
pub(super) struct Restored {
    was_above: bool,
    rbx_was_above: bool,
}

impl Restored {
    pub(super) fn apply(&mut self, mut rule: UnwindRule) -> UnwindRule {
        if rule.fp_kind == loc::CFA {
            let below =
                rule.cfa_kind == cfa::SP && i64::from(rule.cfa_offset) + i64::from(rule.fp_offset) < 0;
            if below && self.was_above {
                rule.fp_kind = loc::SAME;
                rule.fp_offset = 0;
            }
            self.was_above |= !below;
        }
        if let slot @ 2.. = rule.rbx() {
            let below = rule.cfa_kind == cfa::SP && rule.cfa_offset < 8 * i32::from(slot);
            if below && self.rbx_was_above {
                rule.flags ^= (slot ^ flags::RBX_SAME) << flags::RBX_SHIFT;
            }
            self.rbx_was_above |= !below;
        }
        rule
    }
}
