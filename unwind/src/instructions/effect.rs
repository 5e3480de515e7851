//! The effect of one instruction, and where control goes after it.

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

/// The effect of an instruction on the stack pointer and rbp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Effect {
    None,
    /// Moves the stack pointer down by this number of bytes.
    Move(i32),
    PushFp,
    PopFp,
    /// Stores rbp this number of bytes above the stack pointer.
    StoreFp(i32),
    /// Loads rbp from the stack.
    RestoreFp,
    FpIsSp,
    /// Sets the stack pointer this number of bytes above rbp.
    SpIsFp(i32),
    Leave,
    /// Sets the stack pointer to an unknown address.
    SpLost,
    /// Uses rbp for something else.
    FpLost,
}

impl Effect {
    /// Returns the effect of an instruction.
    pub(crate) fn of(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Self {
        use Register::{RBP, RSP};
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        let distance = instruction.memory_displacement64() as i32;
        // `[base + displacement]`, without an index.
        let at = |base: Register| {
            instruction.memory_base() == base && instruction.memory_index() == Register::None
        };
        let is_immediate = matches!(instruction.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
        match instruction.mnemonic() {
            Mnemonic::Push if to == RBP => Self::PushFp,
            Mnemonic::Pop if to == RBP => Self::PopFp,
            Mnemonic::Pop if to == RSP => Self::SpLost,
            Mnemonic::Sub if to == RSP && is_immediate => Self::Move(instruction.immediate(1) as i32),
            Mnemonic::Add if to == RSP && is_immediate => {
                Self::Move((instruction.immediate(1) as i32).wrapping_neg())
            }
            Mnemonic::Lea if to == RSP && at(RSP) => Self::Move(distance.wrapping_neg()),
            Mnemonic::Lea if to == RSP && at(RBP) => Self::SpIsFp(distance),
            Mnemonic::Mov if to == RBP && from == RSP => Self::FpIsSp,
            Mnemonic::Mov if to == RSP && from == RBP => Self::SpIsFp(0),
            Mnemonic::Mov if to == RBP && instruction.op1_kind() == OpKind::Memory && at(RSP) => {
                Self::RestoreFp
            }
            Mnemonic::Mov if from == RBP && instruction.op0_kind() == OpKind::Memory && at(RSP) => {
                Self::StoreFp(distance)
            }
            Mnemonic::Leave => Self::Leave,
            // The called function pops the return address, unless the call is to the next instruction.
            Mnemonic::Call if instruction.near_branch_target() == instruction.next_ip() => Self::Move(8),
            Mnemonic::Call => Self::None,
            _ => {
                // This check first is much faster.
                let named = |register: Register| {
                    (0..instruction.op_count())
                        .any(|n| instruction.op_register(n).full_register() == register)
                };
                let mut written = |register: Register| {
                    named(register)
                        && info.info(instruction).used_registers().iter().any(|used| {
                            used.register().full_register() == register
                                && !matches!(
                                    used.access(),
                                    OpAccess::Read | OpAccess::CondRead | OpAccess::None
                                )
                        })
                };
                match instruction.stack_pointer_increment() {
                    0 if written(RSP) => Self::SpLost,
                    0 if written(RBP) => Self::FpLost,
                    moved => Self::Move(-moved),
                }
            }
        }
    }
}

/// The flow of control after an instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Flow {
    Next,
    Call,
    /// To this address, or to the next instruction.
    Branch(u64),
    /// To this address.
    Jump(u64),
    /// To an address in a register or in memory.
    Indirect,
    Return,
    /// No caller can be found from here.
    UnwindEnd,
    /// The bytes are no instruction.
    Invalid,
}

impl Flow {
    /// Returns where control goes after an instruction.
    pub(crate) fn of(instruction: &Instruction) -> Self {
        let direct = instruction.op0_kind() == OpKind::NearBranch64;
        match instruction.flow_control() {
            _ if instruction.is_invalid() => Self::Invalid,
            _ if instruction.mnemonic() == Mnemonic::Hlt => Self::UnwindEnd,
            FlowControl::Call | FlowControl::IndirectCall => Self::Call,
            FlowControl::ConditionalBranch if direct => Self::Branch(instruction.near_branch64()),
            FlowControl::UnconditionalBranch if direct => Self::Jump(instruction.near_branch64()),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => Self::Indirect,
            FlowControl::Return => Self::Return,
            FlowControl::Exception => Self::UnwindEnd,
            _ => Self::Next,
        }
    }

    /// Returns whether control never reaches the next instruction.
    pub(crate) fn ends(self) -> bool {
        !matches!(self, Self::Next | Self::Call | Self::Branch(_))
    }
}
