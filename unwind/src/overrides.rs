//! Tables that the operator supplies, for files whose own frame information is broken. They take precedence over it.
//!
//! Each file has a text:
//!
//! ```text
//! # the fault of the file, and who found it
//! content 0123456789abcdef0123456789abcdef
//! arch x86_64
//! 0x1000 sp+8
//! 0x1004 sp+16 fp=cfa-16
//! 0x1010 fp+16 fp=cfa-16
//! 0x1080 none
//! end 0x1080
//! ```
//!
//! Each line after `arch` has the ELF virtual address from which a rule holds, and the frame address: `sp+N`, `fp+N`,
//! `*(sp+N)+M`, `*(fp+N)+M`, `stop` (the outermost function) or `none` (no function here). After it, in any order, `fp=` and
//! `ra=` locate the caller's frame pointer and the return address: `cfa+N`, `sp+N`, `fp+N`. The frame pointer can also be `same`
//! (the default) or `lost`, the return address `lr` (the default on aarch64; on x86_64 it is `cfa-8`). `signal` marks a signal
//! trampoline. Numbers are decimal, or hexadecimal with `0x`.
use std::collections::HashMap;

use gannet_elf::{Arch, ContentId};

use crate::format::{UnwindRule, cfa, deref_offset, dwarf_register, flags, loc};
use crate::limits::TableLimits;
use crate::{
    table::UnwindTable,
    table_builder::{TableBuilder, TableBuilderError},
};

/// Supplied tables by content.
#[derive(Clone, Default, Debug)]
pub struct Overrides(HashMap<ContentId, UnwindTable>);

impl Overrides {
    /// Returns the table for a file content, if there is one.
    pub fn get(&self, content: &ContentId) -> Option<&UnwindTable> {
        self.0.get(content)
    }

    /// Adds a table; returns the one that it replaces.
    pub fn insert(&mut self, content: ContentId, table: UnwindTable) -> Option<UnwindTable> {
        self.0.insert(content, table)
    }

    /// Adds the table that a text describes; returns the content of its file.
    pub fn insert_text(&mut self, text: &str, limits: &TableLimits) -> Result<ContentId, OverrideError> {
        let (content, table) = parse(text, limits)?;
        self.insert(content, table);
        Ok(content)
    }
}

/// The reason why a text describes no table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct OverrideError {
    /// The line, counted from 1.
    pub line: usize,
    /// Fault of the line.
    pub fault: OverrideFault,
}

/// The fault of a line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OverrideFault {
    /// The line has the wrong form.
    #[error("expected {expected}, found {found:?}")]
    Expected {
        /// The form that is right here.
        expected: &'static str,
        /// The text that was found.
        found: String,
    },
    /// Rows are out of order or too many.
    #[error(transparent)]
    TableBuilder(#[from] TableBuilderError),
}

fn expected(expected: &'static str, found: &str) -> OverrideFault {
    OverrideFault::Expected { expected, found: found.chars().take(80).collect() }
}

fn parse(text: &str, limits: &TableLimits) -> Result<(ContentId, UnwindTable), OverrideError> {
    let mut content = None;
    let mut arch = None;
    let mut rows = Vec::new();
    let mut last_line = 0;
    let at = |line: usize| move |fault: OverrideFault| OverrideError { line, fault };
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        last_line = number;
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match (word, &content, arch) {
            ("content", None, _) => {
                let id =
                    rest.parse().map_err(|_| at(number)(expected("a content id (32 hex digits)", rest)))?;
                content = Some(id);
            }
            ("arch", Some(_), None) => {
                arch = Some(match rest {
                    "x86_64" => Arch::X86_64,
                    "aarch64" => Arch::Aarch64,
                    _ => return Err(at(number)(expected("x86_64 or aarch64", rest))),
                });
            }
            ("end", Some(content), Some(arch)) => {
                let end = parse_number(rest).map_err(at(number))?;
                return lay_out(arch, &rows, end, limits)
                    .map(|table| (*content, table))
                    .map_err(|(line, error)| at(line.unwrap_or(number))(error.into()));
            }
            (address, Some(_), Some(arch)) => {
                let address = parse_number(address).map_err(at(number))?;
                rows.push((number, address, parse_rule(rest, arch).map_err(at(number))?));
            }
            (word, None, _) => return Err(at(number)(expected("`content` and a content id first", word))),
            (word, _, None) => return Err(at(number)(expected("`arch` after `content`", word))),
        }
    }
    Err(at(last_line + 1)(expected("`end` and the address behind the last function", "end of text")))
}

type RowError = (Option<usize>, TableBuilderError);

fn lay_out(
    arch: Arch,
    rows: &[(usize, u64, UnwindRule)],
    end: u64,
    limits: &TableLimits,
) -> Result<UnwindTable, RowError> {
    let start = rows.first().map_or(end, |(_, address, _)| *address);
    let mut builder = TableBuilder::new(arch, start, end, limits).map_err(|error| (None, error))?;
    for (line, address, rule) in rows {
        builder.push(*address, *rule).map_err(|error| (Some(*line), error))?;
    }
    builder.finish().map_err(|error| (None, error))
}

fn parse_number(text: &str) -> Result<u64, OverrideFault> {
    let parsed = match text.strip_prefix("0x") {
        // The standard parser would accept a sign.
        Some(digits) if digits.starts_with('+') => return Err(expected("an address", text)),
        None if text.starts_with('+') => return Err(expected("an address", text)),
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| expected("an address", text))
}

/// Parses `name`, `name+N` or `name-N`.
fn parse_sum(text: &str) -> Result<(&str, i64), OverrideFault> {
    let Some(at) = text.find(['+', '-']) else { return Ok((text, 0)) };
    let (name, number) = text.split_at(at);
    let size = parse_number(&number[1..]).ok().and_then(|size| i64::try_from(size).ok());
    let size = size.ok_or_else(|| expected("an offset", number))?;
    Ok((name, if number.starts_with('-') { -size } else { size }))
}

fn narrow(offset: i64, text: &str) -> Result<i32, OverrideFault> {
    i32::try_from(offset).map_err(|_| expected("an offset that fits 32 bits", text))
}

fn parse_rule(text: &str, arch: Arch) -> Result<UnwindRule, OverrideFault> {
    let mut words = text.split_whitespace();
    let frame = words.next().unwrap_or_default();
    let lr = loc::REGISTER + dwarf_register::AARCH64_LR as u8;
    let mut rule = match arch {
        Arch::X86_64 => UnwindRule::X86_64_ENTRY,
        Arch::Aarch64 => UnwindRule { cfa_kind: cfa::SP, ra_kind: lr, ..UnwindRule::NONE },
    };
    let frame_words = "`sp+N`, `fp+N`, `*(sp+N)+M`, `*(fp+N)+M`, `stop` or `none`";
    match frame {
        "none" => rule = UnwindRule::NONE,
        "stop" => rule = UnwindRule::OUTERMOST,
        _ => {
            if let Some((inner, outer)) = frame.strip_prefix("*(").and_then(|rest| rest.split_once(')')) {
                let ((name, at), (_, plus)) = (parse_sum(inner)?, parse_sum(outer)?);
                rule.cfa_kind = match name {
                    "sp" => cfa::SP_DEREF,
                    "fp" => cfa::FP_DEREF,
                    _ => return Err(expected(frame_words, frame)),
                };
                rule.cfa_offset = deref_offset(at, plus)
                    .ok_or_else(|| expected("N within 8 MiB and M from 0 to 255", frame))?;
            } else {
                let (name, offset) = parse_sum(frame)?;
                rule.cfa_kind = match name {
                    "sp" => cfa::SP,
                    "fp" => cfa::FP,
                    _ => return Err(expected(frame_words, frame)),
                };
                rule.cfa_offset = narrow(offset, frame)?;
            }
        }
    }
    for word in words {
        let location = |text: &str| -> Result<(u8, i32), OverrideFault> {
            let (name, offset) = parse_sum(text)?;
            let kind = match name {
                "cfa" => loc::CFA,
                "sp" => loc::SP,
                "fp" => loc::FP,
                _ => return Err(expected("`cfa+N`, `sp+N` or `fp+N`", text)),
            };
            Ok((kind, narrow(offset, text)?))
        };
        (rule.fp_kind, rule.fp_offset, rule.ra_kind, rule.ra_offset) = match word.split_once('=') {
            None if word == "signal" => {
                rule.flags |= flags::SIGNAL;
                continue;
            }
            Some(("fp", "same")) => (loc::SAME, 0, rule.ra_kind, rule.ra_offset),
            Some(("fp", "lost")) => (loc::UNDEFINED, 0, rule.ra_kind, rule.ra_offset),
            Some(("fp", text)) => {
                let (kind, offset) = location(text)?;
                (kind, offset, rule.ra_kind, rule.ra_offset)
            }
            Some(("ra", "lr")) if arch == Arch::Aarch64 => (rule.fp_kind, rule.fp_offset, lr, 0),
            Some(("ra", text)) => {
                let (kind, offset) = location(text)?;
                (rule.fp_kind, rule.fp_offset, kind, offset)
            }
            _ => return Err(expected("`fp=`, `ra=` or `signal`", word)),
        };
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: &str = "content 0123456789abcdef0123456789abcdef\narch x86_64\n";

    #[test]
    fn a_text_becomes_a_table() {
        let mut overrides = Overrides::default();
        let text = format!(
            "# broken by its linker\n{CONTENT}0x1000 sp+8\n0x1004 sp+0x10 fp=cfa-16 # pushed\n0x1010 *(fp-8)+8 fp=fp+0\n\
             0x1020 *(sp+160) fp=sp+120 ra=sp+168 signal\n0x1030 stop\n0x1040 none\n0x1050 fp+16 fp=lost\nend 0x1060\n"
        );
        let content = overrides.insert_text(&text, &TableLimits::default()).unwrap();
        let table = overrides.get(&content).unwrap();
        let at = |vaddr| table.lookup(vaddr).unwrap();
        assert_eq!(at(0x1003), UnwindRule::X86_64_ENTRY);
        let pushed = UnwindRule { fp_kind: loc::CFA, fp_offset: -16, ..UnwindRule::x86_64_sp(16) };
        assert_eq!(at(0x100f), pushed);
        let realigned = at(0x1010);
        assert_eq!((realigned.cfa_kind, realigned.cfa_offset), (cfa::FP_DEREF, deref_offset(-8, 8).unwrap()));
        assert_eq!((realigned.fp_kind, realigned.fp_offset), (loc::FP, 0));
        assert_eq!(at(0x1020), UnwindRule::X86_64_SIGNAL);
        assert!(at(0x1030).is_outermost());
        assert_eq!(at(0x1040), UnwindRule::NONE);
        assert_eq!(at(0x105f).fp_kind, loc::UNDEFINED);
        assert_eq!(at(0x1060), UnwindRule::NONE);
    }

    #[test]
    fn an_error_names_the_line_and_the_right_form() {
        for (text, line, words) in [
            ("0x1000 sp+8", 1, "`content`"),
            ("content 12", 1, "32 hex digits"),
            ("content 0123456789abcdef0123456789abcdef\n0x10 sp+8", 2, "`arch`"),
            (&format!("{CONTENT}0x10 rax+8"), 3, "`sp+N`"),
            (&format!("{CONTENT}0x10 sp+9999999999"), 3, "32 bits"),
            (&format!("{CONTENT}0x10 sp+8 ra=lr"), 3, "`cfa+N`"),
            (&format!("{CONTENT}0x10 sp+8 what"), 3, "`fp=`"),
            (&format!("{CONTENT}0x20 sp+8\n0x10 sp+8\nend 0x30"), 4, "sort"),
            (&format!("{CONTENT}0x20 sp+8\n0x40 sp+8\nend 0x30"), 4, "sort"),
            (&format!("{CONTENT}0x20 sp+8"), 4, "`end`"),
            (&format!("{CONTENT}+5 sp+8"), 3, "address"),
        ] {
            let error = parse(text, &TableLimits::default()).unwrap_err();
            assert_eq!(error.line, line, "{text}: {error}");
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }
}
