//! The registers that unwinding needs, and where their values are.

use crate::format::Unsupported;

/// DWARF numbers of the registers that unwinding needs, in one file.
#[derive(Clone, Copy)]
pub(super) struct Registers {
    pub(super) sp: u16,
    pub(super) fp: u16,
    pub(super) ra: u16,
    /// Register rbx, on x86_64 only.
    pub(super) rbx: Option<u16>,
}

impl Registers {
    pub(super) fn are_followed(&self, register: u16) -> bool {
        [self.sp, self.fp, self.ra].contains(&register) || self.rbx == Some(register)
    }
}

/// How the frame address is found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Cfa {
    Register(u16, i64),
    Deref { fp: bool, at: i64, plus: i64 },
    Plt(u8),
    Bad(Unsupported),
}

/// The location of the caller's value of a register.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Location {
    Unset,
    Same,
    Undefined,
    /// In memory, at an offset from the frame address.
    AtCfa(i64),
    /// In memory, at an offset from the frame pointer or the stack pointer.
    At {
        fp: bool,
        offset: i64,
    },
    In(u16),
    /// The value is the frame address plus this.
    IsCfa(i64),
    Bad,
}

/// The registers at one instruction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct RegisterState {
    pub(super) cfa: Cfa,
    pub(super) fp: Location,
    pub(super) ra: Location,
    pub(super) sp: Location,
    pub(super) rbx: Location,
    pub(super) ra_signed: bool,
}

impl RegisterState {
    /// The state before the first instruction of a CIE.
    pub(super) const START: Self = Self {
        cfa: Cfa::Bad(Unsupported::Malformed),
        fp: Location::Unset,
        ra: Location::Unset,
        sp: Location::Unset,
        rbx: Location::Unset,
        ra_signed: false,
    };
}
