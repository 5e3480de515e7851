//! The text of one unwind rule, in the files of [`crate::overrides`].
//!
//! Beside the forms that the module's text names, there are some that few users write. They are here so that the table of any
//! file can be written as text:
//!
//! | text | meaning |
//! |---|---|
//! | `plt+N` | entries of a linkage table, which push once from byte N on |
//! | `rN+M` | the register with DWARF number N, plus M; as `fp=rN` and `ra=rN` the register holds the value |
//! | `unsupported=REASON` | there is a function, and no rule |
//! | `ra=none` | there is no caller: the stack ends here |
//! | `rbx=same`, `rbx=cfa-N` | where the caller's rbx is |
//! | `signed` | the return address is signed |
//! | `guessed` | the rule is a guess; its frames are marked |
//! | `list` | the frame stands for frames that an interpreter keeps in a list |
use std::fmt::{self, Write};

use gannet_elf::Arch;

use crate::format::{Unsupported, UnwindRule, cfa, deref_offset, dwarf_register, flags, loc};

/// DWARF numbers that a rule may have.
const REGISTERS: u8 = 32;
const LR: u8 = loc::REGISTER + dwarf_register::AARCH64_LR as u8;
/// Flags that have a word of their own.
const WORDS: [(u8, &str); 4] = [
    (flags::SIGNAL, "signal"),
    (flags::GUESSED, "guessed"),
    (flags::RA_SIGNED, "signed"),
    (flags::LIST, "list"),
];
const RBX_MASK: u8 = 7 << flags::RBX_SHIFT;
const FRAME_WORDS: &str = "`sp+N`, `fp+N`, `*(sp+N)+M`, `*(fp+N)+M`, `stop` or `none`";

/// A text of the wrong form.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected {expected}, found {found:?}")]
pub struct WrongForm {
    /// The form that is right here.
    pub expected: &'static str,
    /// The text that was found, at most 80 characters of it.
    pub found: String,
}

pub(crate) fn expected(expected: &'static str, found: &str) -> WrongForm {
    WrongForm { expected, found: found.chars().take(80).collect() }
}

pub(crate) fn parse_number(text: &str) -> Result<u64, WrongForm> {
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
fn parse_sum(text: &str) -> Result<(&str, i64), WrongForm> {
    let Some(at) = text.find(['+', '-']) else { return Ok((text, 0)) };
    let (name, number) = text.split_at(at);
    let size = parse_number(&number[1..]).ok().and_then(|size| i64::try_from(size).ok());
    let size = size.ok_or_else(|| expected("an offset", number))?;
    Ok((name, if number.starts_with('-') { -size } else { size }))
}

fn narrow(offset: i64, text: &str) -> Result<i32, WrongForm> {
    i32::try_from(offset).map_err(|_| expected("an offset that fits 32 bits", text))
}

/// Parses the name of a register, `r` and its DWARF number.
fn parse_register(name: &str) -> Option<u8> {
    let digits = name.strip_prefix('r')?;
    let number = digits.parse().ok().filter(|number| *number < REGISTERS)?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then_some(number)
}

fn entry(arch: Arch) -> UnwindRule {
    match arch {
        Arch::X86_64 => UnwindRule::X86_64_ENTRY,
        Arch::Aarch64 => UnwindRule { cfa_kind: cfa::SP, ra_kind: LR, ..UnwindRule::NONE },
    }
}

/// Parses the frame address and the words behind it.
pub(crate) fn parse_rule(text: &str, arch: Arch) -> Result<UnwindRule, WrongForm> {
    let mut words = text.split_whitespace();
    let mut rule = parse_frame(words.next().unwrap_or_default(), arch)?;
    for word in words {
        if let Some((flag, _)) = WORDS.iter().find(|(_, name)| *name == word) {
            rule.flags |= flag;
            continue;
        }
        match word.split_once('=') {
            Some(("fp", "same")) => (rule.fp_kind, rule.fp_offset) = (loc::SAME, 0),
            Some(("fp", "lost")) => (rule.fp_kind, rule.fp_offset) = (loc::UNDEFINED, 0),
            Some(("fp", text)) => (rule.fp_kind, rule.fp_offset) = parse_location(text)?,
            Some(("ra", "lr")) if arch == Arch::Aarch64 => (rule.ra_kind, rule.ra_offset) = (LR, 0),
            Some(("ra", "none")) => (rule.ra_kind, rule.ra_offset) = (loc::UNDEFINED, 0),
            Some(("ra", text)) => (rule.ra_kind, rule.ra_offset) = parse_location(text)?,
            Some(("rbx", text)) if arch == Arch::X86_64 => {
                rule.flags = rule.flags & !RBX_MASK | parse_rbx(text)? << flags::RBX_SHIFT;
            }
            _ => return Err(expected("`fp=`, `ra=` or `signal`", word)),
        }
    }
    Ok(rule)
}

fn parse_frame(frame: &str, arch: Arch) -> Result<UnwindRule, WrongForm> {
    let mut rule = entry(arch);
    if let Some(reason) = frame.strip_prefix("unsupported=") {
        let known = Unsupported::ALL.into_iter().find(|why| why.as_str() == reason);
        return known.map(UnwindRule::unsupported).ok_or_else(|| expected("a known reason", reason));
    }
    if let Some((inner, outer)) = frame.strip_prefix("*(").and_then(|rest| rest.split_once(')')) {
        let ((name, at), (nothing, plus)) = (parse_sum(inner)?, parse_sum(outer)?);
        rule.cfa_kind = match (name, nothing) {
            ("sp", "") => cfa::SP_DEREF,
            ("fp", "") => cfa::FP_DEREF,
            _ => return Err(expected(FRAME_WORDS, frame)),
        };
        rule.cfa_offset =
            deref_offset(at, plus).ok_or_else(|| expected("N within 8 MiB and M from 0 to 255", frame))?;
        return Ok(rule);
    }
    let (name, offset) = parse_sum(frame)?;
    rule.cfa_kind = match (name, offset) {
        ("none", 0) => return Ok(UnwindRule::NONE),
        ("stop", 0) => return Ok(UnwindRule::OUTERMOST),
        ("sp", _) => cfa::SP,
        ("fp", _) => cfa::FP,
        ("plt", 0..=16) if arch == Arch::X86_64 => cfa::PLT,
        _ => match parse_register(name) {
            Some(number) => cfa::REGISTER + number,
            None => return Err(expected(FRAME_WORDS, frame)),
        },
    };
    rule.cfa_offset = narrow(offset, frame)?;
    Ok(rule)
}

fn parse_location(text: &str) -> Result<(u8, i32), WrongForm> {
    let (name, offset) = parse_sum(text)?;
    let kind = match name {
        "cfa" => loc::CFA,
        "sp" => loc::SP,
        "fp" => loc::FP,
        _ => match parse_register(name) {
            Some(number) if offset == 0 => loc::REGISTER + number,
            _ => return Err(expected("`cfa+N`, `sp+N` or `fp+N`", text)),
        },
    };
    Ok((kind, narrow(offset, text)?))
}

/// Parses the location of rbx; returns the three bits of [`flags::RBX_SHIFT`].
fn parse_rbx(text: &str) -> Result<u8, WrongForm> {
    match parse_sum(text)? {
        ("same", 0) => Ok(flags::RBX_SAME),
        ("cfa", offset @ (-16 | -24 | -32 | -40 | -48 | -56)) => Ok((offset / -8) as u8),
        _ => Err(expected("`same`, or `cfa-N` with N from 16 to 56", text)),
    }
}

/// Writes a rule that is no run ([`UnwindRule::after`]) in the form that [`parse_rule`] reads.
pub(crate) fn write_rule(out: &mut impl Write, rule: &UnwindRule, arch: Arch) -> fmt::Result {
    let entry = entry(arch);
    let UnwindRule { cfa_kind, fp_kind, ra_kind, flags, cfa_offset, fp_offset, ra_offset } = *rule;
    let is_plain = |plain: UnwindRule| UnwindRule { flags: 0, ..*rule } == plain;
    let (fp, ra) = match rule.unsupported_reason() {
        _ if is_plain(UnwindRule::NONE) => {
            out.write_str("none")?;
            (UnwindRule::NONE, UnwindRule::NONE)
        }
        _ if is_plain(UnwindRule::OUTERMOST) => {
            out.write_str("stop")?;
            (UnwindRule::OUTERMOST, UnwindRule::OUTERMOST)
        }
        Some(why) => {
            write!(out, "unsupported={}", why.as_str())?;
            (UnwindRule::NONE, UnwindRule::NONE)
        }
        None => {
            write_frame(out, cfa_kind, cfa_offset)?;
            (entry, entry)
        }
    };
    if (fp_kind, fp_offset) != (fp.fp_kind, fp.fp_offset) {
        out.write_str(" fp=")?;
        match fp_kind {
            loc::SAME => out.write_str("same")?,
            loc::UNDEFINED => out.write_str("lost")?,
            _ => write_location(out, fp_kind, fp_offset)?,
        }
    }
    if (ra_kind, ra_offset) != (ra.ra_kind, ra.ra_offset) {
        out.write_str(" ra=")?;
        match ra_kind {
            loc::UNDEFINED => out.write_str("none")?,
            LR if arch == Arch::Aarch64 => out.write_str("lr")?,
            _ => write_location(out, ra_kind, ra_offset)?,
        }
    }
    for (_, word) in WORDS.iter().filter(|(flag, _)| flags & flag != 0) {
        write!(out, " {word}")?;
    }
    match rule.rbx() {
        0 => Ok(()),
        flags::RBX_SAME => out.write_str(" rbx=same"),
        slot => write!(out, " rbx=cfa-{}", u32::from(slot) * 8),
    }
}

fn write_frame(out: &mut impl Write, kind: u8, offset: i32) -> fmt::Result {
    let (at, plus) = (offset >> 8, offset & 0xff);
    match kind {
        cfa::SP => write!(out, "sp{offset:+}"),
        cfa::FP => write!(out, "fp{offset:+}"),
        cfa::SP_DEREF => write!(out, "*(sp{at:+}){plus:+}"),
        cfa::FP_DEREF => write!(out, "*(fp{at:+}){plus:+}"),
        cfa::PLT => write!(out, "plt{offset:+}"),
        _ => write!(out, "r{}{offset:+}", kind.wrapping_sub(cfa::REGISTER)),
    }
}

fn write_location(out: &mut impl Write, kind: u8, offset: i32) -> fmt::Result {
    match kind {
        loc::CFA => write!(out, "cfa{offset:+}"),
        loc::SP => write!(out, "sp{offset:+}"),
        loc::FP => write!(out, "fp{offset:+}"),
        _ => write!(out, "r{}", kind.wrapping_sub(loc::REGISTER)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> impl Strategy<Value = UnwindRule> {
        let frame = prop_oneof![
            (prop_oneof![Just(cfa::SP), Just(cfa::FP), cfa::REGISTER..cfa::REGISTER + 32], any::<i32>()),
            (prop_oneof![Just(cfa::SP_DEREF), Just(cfa::FP_DEREF)], any::<i32>()),
            (Just(cfa::PLT), 0..=16),
        ];
        let location = || {
            prop_oneof![
                (loc::CFA..=loc::FP, any::<i32>()),
                (loc::REGISTER..loc::REGISTER + 32, Just(0)),
                Just((loc::UNDEFINED, 0)),
            ]
        };
        (frame, prop_oneof![Just((loc::SAME, 0)), location()], location(), 0..=0x7f_u8).prop_map(
            |((cfa_kind, cfa_offset), (fp_kind, fp_offset), (ra_kind, ra_offset), flags)| UnwindRule {
                cfa_kind,
                fp_kind,
                ra_kind,
                flags,
                cfa_offset,
                fp_offset,
                ra_offset,
            },
        )
    }

    #[track_caller]
    fn round_trip(rule: UnwindRule, arch: Arch) {
        let mut text = String::new();
        write_rule(&mut text, &rule, arch).unwrap();
        assert_eq!(parse_rule(&text, arch), Ok(rule), "{text}");
    }

    proptest! {
        #[test]
        fn every_rule_has_a_text(rule in rules()) {
            round_trip(rule, Arch::X86_64);
        }

        #[test]
        fn no_text_panics(text in "[ a-z0-9+=*()-]{0,40}") {
            let _ = parse_rule(&text, Arch::X86_64);
        }
    }

    #[test]
    fn rules_of_fixed_form_have_short_texts() {
        for (rule, text) in [
            (UnwindRule::NONE, "none"),
            (UnwindRule::OUTERMOST, "stop"),
            (UnwindRule::X86_64_ENTRY, "sp+8"),
            (UnwindRule::x86_64_plt(11), "plt+11"),
            (UnwindRule::unsupported(Unsupported::Offset), "unsupported=offset_too_large"),
            (UnwindRule::X86_64_SIGNAL, "*(sp+160)+0 fp=sp+120 ra=sp+168 signal"),
            (UnwindRule::FRAME_POINTER, "fp+16 fp=cfa-16 guessed"),
        ] {
            let mut written = String::new();
            write_rule(&mut written, &rule, Arch::X86_64).unwrap();
            assert_eq!(written, text);
            round_trip(rule, Arch::X86_64);
        }
        let signed = UnwindRule { flags: flags::RA_SIGNED, ra_offset: -8, ..UnwindRule::FRAME_POINTER };
        for rule in [entry(Arch::Aarch64), UnwindRule::AARCH64_SIGNAL, UnwindRule::NONE, signed] {
            round_trip(rule, Arch::Aarch64);
        }
    }

    #[test]
    fn registers_beyond_the_last_are_refused() {
        for text in [
            "r32+8",
            "r+8",
            "r-1",
            "r999+0",
            "sp+8 fp=r32",
            "sp+8 ra=r3+1",
            "plt+17",
            "sp+8 rbx=cfa-8",
            "none+1",
        ] {
            assert!(parse_rule(text, Arch::X86_64).is_err(), "{text}");
        }
        assert!(parse_rule("sp+8 rbx=same", Arch::Aarch64).is_err());
    }
}
