//! The effect of each call frame instruction on the registers that unwinding needs.

use gimli::{CallFrameInstruction, CommonInformationEntry, Register, UnwindSection};

use super::{
    Slice,
    expression::{cfa_expression, location_expression},
    registers::{Cfa, Location, RegisterState, Registers},
};
/// Depth of `DW_CFA_remember_state`; compilers use one or two.
const MAX_REMEMBERED: usize = 64;

/// Call frame instructions contradict themselves.
pub(super) struct Contradiction;

/// The entry that instructions belong to.
#[derive(Clone, Copy)]
pub(super) struct EntryContext<'a, 'd, S> {
    pub(super) section: &'a S,
    pub(super) cie: &'a CommonInformationEntry<Slice<'d>>,
    pub(super) registers: Registers,
    /// The state behind the instructions of the CIE.
    pub(super) initial: RegisterState,
}

impl<'d, S: UnwindSection<Slice<'d>>> EntryContext<'_, 'd, S> {
    /// Changes a state as one instruction says. Locations are the caller's concern: a CIE has none, and one that has some
    /// counts as if it had none.
    pub(super) fn apply(
        &self,
        state: &mut RegisterState,
        remembered: &mut Vec<RegisterState>,
        instruction: &CallFrameInstruction<usize>,
    ) -> Result<(), Contradiction> {
        use CallFrameInstruction as I;
        let Self { section, cie, registers, initial } = self;
        let factor = cie.data_alignment_factor();
        let scaled = |offset: i64| offset.checked_mul(factor).unwrap_or(i64::MAX);
        let unsigned = |offset: u64| i64::try_from(offset).map_or(i64::MAX, scaled);
        let plain = |offset: u64| i64::try_from(offset).unwrap_or(i64::MAX);
        let mut set = |register: Register, location: Location| {
            if register.0 == registers.fp {
                state.fp = location;
            } else if register.0 == registers.sp {
                state.sp = location;
            } else if register.0 == registers.ra {
                state.ra = location;
            } else if Some(register.0) == registers.rbx {
                state.rbx = location;
            }
        };
        match instruction {
            I::DefCfa { register, offset } => state.cfa = Cfa::Register(register.0, plain(*offset)),
            I::DefCfaSf { register, factored_offset } => {
                state.cfa = Cfa::Register(register.0, scaled(*factored_offset));
            }
            I::DefCfaRegister { register } => match &mut state.cfa {
                Cfa::Register(current, _) => *current = register.0,
                _ => return Err(Contradiction),
            },
            I::DefCfaOffset { offset } => match &mut state.cfa {
                Cfa::Register(_, current) => *current = plain(*offset),
                _ => return Err(Contradiction),
            },
            I::DefCfaOffsetSf { factored_offset } => match &mut state.cfa {
                Cfa::Register(_, current) => *current = scaled(*factored_offset),
                _ => return Err(Contradiction),
            },
            I::DefCfaExpression { expression } => {
                state.cfa = cfa_expression(*section, cie, *registers, expression);
            }
            I::Undefined { register } => set(*register, Location::Undefined),
            I::SameValue { register } => set(*register, Location::Same),
            I::Offset { register, factored_offset } => {
                set(*register, Location::AtCfa(unsigned(*factored_offset)));
            }
            I::OffsetExtendedSf { register, factored_offset } => {
                set(*register, Location::AtCfa(scaled(*factored_offset)));
            }
            I::ValOffset { register, factored_offset } => {
                set(*register, Location::IsCfa(unsigned(*factored_offset)));
            }
            I::ValOffsetSf { register, factored_offset } => {
                set(*register, Location::IsCfa(scaled(*factored_offset)));
            }
            I::Register { dest_register, src_register } => set(*dest_register, Location::In(src_register.0)),
            I::Expression { register, expression } if registers.are_followed(register.0) => {
                set(*register, location_expression(*section, cie, *registers, expression));
            }
            I::ValExpression { register, .. } => set(*register, Location::Bad),
            I::Restore { register } => {
                let at_start = [
                    (Some(registers.fp), initial.fp),
                    (Some(registers.sp), initial.sp),
                    (Some(registers.ra), initial.ra),
                    (registers.rbx, initial.rbx),
                ];
                if let Some((_, location)) =
                    at_start.into_iter().find(|(number, _)| *number == Some(register.0))
                {
                    set(*register, location);
                }
            }
            I::RememberState => {
                if remembered.len() == MAX_REMEMBERED {
                    return Err(Contradiction);
                }
                remembered.push(*state);
            }
            I::RestoreState => *state = remembered.pop().ok_or(Contradiction)?,
            I::NegateRaState => state.ra_signed = !state.ra_signed,
            _ => {}
        }
        Ok(())
    }
}
