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
//! trampoline. Numbers are decimal, or hexadecimal with `0x`. `rule_text` has the rarer forms, which [`write_text`] writes too.
use std::{
    collections::{HashMap, HashSet},
    fmt::{self, Write as _},
    sync::Arc,
};

use gannet_elf::{Arch, ContentId};

use crate::format::UnwindRule;
use crate::limits::{LimitExceeded, TableLimits, TableQuantity, at_most};
use crate::rule_text::{expected, parse_number, parse_rule, write_rule};

use crate::{
    table::UnwindTable,
    table_builder::{TableBuilder, TableBuilderError},
};

pub use crate::rule_text::WrongForm;

/// Supplied tables by content.
#[derive(Clone, Default, Debug)]
pub struct Overrides(HashMap<ContentId, Arc<UnwindTable>>);

impl Overrides {
    /// Returns the table for a file content on an architecture, if there is one.
    pub fn get(&self, content: &ContentId, arch: Arch) -> Option<&UnwindTable> {
        self.0.get(content).map(AsRef::as_ref).filter(|table| table.arch() == arch)
    }

    /// Returns whether there is a table for a file content.
    pub fn contains(&self, content: &ContentId) -> bool {
        self.0.contains_key(content)
    }

    /// Returns the number of tables.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there is no table.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a table; returns the one that it replaces.
    pub fn insert(&mut self, content: ContentId, table: UnwindTable) -> Option<Arc<UnwindTable>> {
        self.0.insert(content, Arc::new(table))
    }

    /// Adds the table that a text describes; returns the content of its file.
    pub fn insert_text(&mut self, text: &str, limits: &TableLimits) -> Result<ContentId, OverrideError> {
        let (content, table) = parse_text(text, limits)?;
        self.insert(content, table);
        Ok(content)
    }

    /// Returns the contents whose tables are only in one of the two, or differ.
    pub fn differences(&self, other: &Self) -> HashSet<ContentId> {
        let contents = self.0.keys().chain(other.0.keys());
        contents.filter(|content| self.0.get(content) != other.0.get(content)).copied().collect()
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
    #[error(transparent)]
    Form(#[from] WrongForm),
    /// Rows are out of order or too many.
    #[error(transparent)]
    TableBuilder(#[from] TableBuilderError),
    /// There are too many rows.
    #[error(transparent)]
    LimitExceeded(#[from] LimitExceeded),
}

/// Writes the text that [`Overrides::insert_text`] reads as this table. A line of `notes` becomes a comment.
pub fn write_text(content: &ContentId, table: &UnwindTable, notes: &[String]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = try_write_text(&mut text, content, table, notes);
    text
}

fn try_write_text(
    text: &mut String,
    content: &ContentId,
    table: &UnwindTable,
    notes: &[String],
) -> fmt::Result {
    for line in notes.iter().flat_map(|note| note.lines()) {
        writeln!(text, "# {line}")?;
    }
    let arch = match table.arch() {
        Arch::X86_64 => "x86_64",
        Arch::Aarch64 => "aarch64",
    };
    writeln!(text, "content {content}\narch {arch}")?;
    let mut rows = table.plain_rows().peekable();
    let mut end = table.end();
    while let Some((address, rule)) = rows.next() {
        if rows.peek().is_none() && rule == UnwindRule::NONE {
            end = address;
            break;
        }
        write!(text, "{address:#x} ")?;
        write_rule(text, &rule, table.arch())?;
        text.push('\n');
    }
    writeln!(text, "end {end:#x}")
}

fn wrong(form: &'static str, found: &str) -> OverrideFault {
    expected(form, found).into()
}

/// Parses a text; returns the content of its file, and the table.
pub fn parse_text(text: &str, limits: &TableLimits) -> Result<(ContentId, UnwindTable), OverrideError> {
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
                let id = rest.parse().map_err(|_| at(number)(wrong("a content id (32 hex digits)", rest)))?;
                content = Some(id);
            }
            ("arch", Some(_), None) => {
                arch = Some(match rest {
                    "x86_64" => Arch::X86_64,
                    "aarch64" => Arch::Aarch64,
                    _ => return Err(at(number)(wrong("x86_64 or aarch64", rest))),
                });
            }
            ("end", Some(content), Some(arch)) => {
                let end = parse_number(rest).map_err(|form| at(number)(form.into()))?;
                return lay_out(arch, &rows, end, limits)
                    .map(|table| (*content, table))
                    .map_err(|(line, error)| at(line.unwrap_or(number))(error.into()));
            }
            (address, Some(_), Some(arch)) => {
                let address = parse_number(address).map_err(|form| at(number)(form.into()))?;
                at_most(TableQuantity::Rows, limits.rows, rows.len() as u64 + 1)
                    .map_err(|exceeded| at(number)(exceeded.into()))?;
                rows.push((number, address, parse_rule(rest, arch).map_err(|form| at(number)(form.into()))?));
            }
            (word, None, _) => return Err(at(number)(wrong("`content` and a content id first", word))),
            (word, _, None) => return Err(at(number)(wrong("`arch` after `content`", word))),
        }
    }
    Err(at(last_line + 1)(wrong("`end` and the address behind the last function", "end of text")))
}

type RowError = (Option<usize>, TableBuilderError);

fn lay_out(
    arch: Arch,
    rows: &[(usize, u64, UnwindRule)],
    end: u64,
    limits: &TableLimits,
) -> Result<UnwindTable, RowError> {
    let start = rows.first().map_or(end, |(_, address, _)| *address);
    // As in tables of files: where a frame is found by rbx, each row is a rule of its own.
    let runs = rows.iter().all(|(_, _, rule)| rule.rbx() == 0);
    let mut builder = TableBuilder::new(arch, start, end, limits).map_err(|error| (None, error))?.runs(runs);
    for (line, address, rule) in rows {
        builder.push(*address, *rule).map_err(|error| (Some(*line), error))?;
    }
    builder.finish().map_err(|error| (None, error))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::build::{BuildOptions, build_file};
    use crate::format::{cfa, deref_offset, loc};

    const CONTENT: &str = "content 0123456789abcdef0123456789abcdef\narch x86_64\n";

    #[test]
    fn a_text_becomes_a_table() {
        let mut overrides = Overrides::default();
        let text = format!(
            "# broken by its linker\n{CONTENT}0x1000 sp+8\n0x1004 sp+0x10 fp=cfa-16 # pushed\n0x1010 *(fp-8)+8 fp=fp+0\n\
             0x1020 *(sp+160) fp=sp+120 ra=sp+168 signal\n0x1030 stop\n0x1040 none\n0x1050 fp+16 fp=lost\nend 0x1060\n"
        );
        let content = overrides.insert_text(&text, &TableLimits::default()).unwrap();
        let table = overrides.get(&content, Arch::X86_64).unwrap();
        assert!(overrides.get(&content, Arch::Aarch64).is_none());
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
            let error = parse_text(text, &TableLimits::default()).unwrap_err();
            assert_eq!(error.line, line, "{text}: {error}");
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    /// Checks that a user can write the table of a real file as text, and gets the same table from it.
    #[test]
    fn a_written_table_is_read_as_the_same_table() {
        let limits = TableLimits::default();
        // The dynamic linker has frames that are found by rbx.
        for path in ["/proc/self/exe", "/lib64/ld-linux-x86-64.so.2", "/bin/sh"] {
            let Ok(file) = File::open(path) else { continue };
            let mut tables = [true, false].map(|runs| {
                let options = BuildOptions { runs, ..BuildOptions::new(path, &limits) };
                let built = build_file(&file, &options).unwrap();
                let text = write_text(&built.content, &built.table, &["two\nlines".into()]);
                assert!(text.starts_with("# two\n# lines\ncontent "), "{path}");
                let (content, table) = parse_text(&text, &limits).unwrap();
                assert_eq!(content, built.content, "{path}");
                (built.table, table, text)
            });
            let [(built, read, text), (plain, ..)] = &mut tables;
            assert!(read.rows() > 100, "{path}");
            assert_eq!(built.rows(), read.rows(), "{path}");
            let rows = |table: &UnwindTable| table.plain_rows().collect::<Vec<_>>();
            assert!(rows(built) == rows(read) && rows(built) == rows(plain), "{path}");
            assert_eq!(&mut write_text(&content_of(text), read, &["two\nlines".into()]), text, "{path}");
            for (address, _) in built.plain_rows() {
                for address in [address.wrapping_sub(1), address, address + 1] {
                    let none = |rule: Option<UnwindRule>| rule.unwrap_or(UnwindRule::NONE);
                    assert_eq!(
                        none(built.lookup(address)),
                        none(read.lookup(address)),
                        "{path} {address:#x}"
                    );
                }
            }
        }
    }

    fn content_of(text: &str) -> ContentId {
        parse_text(text, &TableLimits::default()).unwrap().0
    }

    #[test]
    fn differences_are_new_removed_and_changed_tables() {
        let table =
            |rule: &str| parse_text(&format!("{CONTENT}0x10 {rule}\nend 0x20"), &TableLimits::default());
        let id = |n: u8| ContentId::from_bytes([n; 16]);
        let [mut former, mut now] = [Overrides::default(), Overrides::default()];
        for (content, before, after) in [
            (1, Some("sp+8"), Some("sp+8")),
            (2, Some("sp+8"), Some("sp+16")),
            (3, Some("sp+8"), None),
            (4, None, Some("sp+8")),
        ] {
            before.map(|rule| former.insert(id(content), table(rule).unwrap().1));
            after.map(|rule| now.insert(id(content), table(rule).unwrap().1));
        }
        let expected: HashSet<_> = [2, 3, 4].map(id).into();
        assert_eq!(former.differences(&now), expected);
        assert_eq!(now.differences(&former), expected);
        assert!(now.differences(&now).is_empty());
    }
}
