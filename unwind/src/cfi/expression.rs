//! DWARF expressions of the shapes that compilers make for call frame information.

use gimli::{CommonInformationEntry, Operation, UnwindExpression, UnwindSection};

use super::{
    Slice,
    registers::{Cfa, Location, Registers},
};
use crate::format::Unsupported;

/// Operations of an expression that are read; the longest known one has nine.
const MAX_OPERATIONS: usize = 12;

/// One operation, in a form that can be matched.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Op {
    Base(u16, i64),
    Deref,
    Number(u64),
    PlusNumber(u64),
    Plus,
    And,
    Ge,
    Shl,
    Other,
}

/// Reads the first operations of an expression.
fn operations<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    expression: &UnwindExpression<usize>,
) -> Vec<Op> {
    let Ok(expression) = expression.get(section) else { return vec![Op::Other] };
    let mut operations = expression.operations(cie.encoding());
    let mut found = Vec::new();
    while found.len() < MAX_OPERATIONS {
        found.push(match operations.next() {
            Ok(None) => break,
            Err(_) => Op::Other,
            Ok(Some(operation)) => match operation {
                Operation::RegisterOffset { register, offset, .. } => Op::Base(register.0, offset),
                Operation::Deref { size: 8, space: false, .. } => Op::Deref,
                Operation::UnsignedConstant { value } => Op::Number(value),
                Operation::SignedConstant { value } => Op::Number(value as u64),
                Operation::PlusConstant { value } => Op::PlusNumber(value),
                Operation::Plus => Op::Plus,
                Operation::And => Op::And,
                Operation::Ge => Op::Ge,
                Operation::Shl => Op::Shl,
                _ => Op::Other,
            },
        });
    }
    found
}

/// Returns how an expression finds the frame address.
pub(super) fn cfa_expression<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    registers: Registers,
    expression: &UnwindExpression<usize>,
) -> Cfa {
    let bad = Cfa::Bad(Unsupported::Expression);
    let deref = |register: u16, at: i64, plus: u64| {
        let plus = i64::try_from(plus).unwrap_or(i64::MAX);
        match register {
            r if r == registers.sp => Cfa::Deref { fp: false, at, plus },
            r if r == registers.fp => Cfa::Deref { fp: true, at, plus },
            _ => bad,
        }
    };
    match operations(section, cie, expression).as_slice() {
        [Op::Base(register, offset)] => Cfa::Register(*register, *offset),
        [Op::Base(register, at), Op::Deref] => deref(*register, *at, 0),
        [Op::Base(register, at), Op::Deref, Op::PlusNumber(plus)]
        | [Op::Base(register, at), Op::Deref, Op::Number(plus), Op::Plus] => deref(*register, *at, *plus),
        [
            Op::Base(sp, 8),
            Op::Base(pc, 0),
            Op::Number(15),
            Op::And,
            Op::Number(from @ 0..=15),
            Op::Ge,
            Op::Number(3),
            Op::Shl,
            Op::Plus,
        ] if *sp == registers.sp && *pc == registers.ra => Cfa::Plt(*from as u8),
        _ => bad,
    }
}

/// Returns the location in memory that an expression computes.
pub(super) fn location_expression<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    registers: Registers,
    expression: &UnwindExpression<usize>,
) -> Location {
    match operations(section, cie, expression).as_slice() {
        [Op::Base(register, offset)] if *register == registers.sp => {
            Location::At { fp: false, offset: *offset }
        }
        [Op::Base(register, offset)] if *register == registers.fp => {
            Location::At { fp: true, offset: *offset }
        }
        _ => Location::Bad,
    }
}
