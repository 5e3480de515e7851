//! Runtimes whose functions have names only if the process lists them itself, in a perf map or a jitdump: .NET, Erlang and LuaJIT.
//! Perl is here too: it makes no code, and the agent reads nothing of its interpreter.
//!
//! The agent unwinds their frames as native ones. This module finds the version, and the reason why names are missing.

use gannet_elf::{Elf, Symbols};

use super::{Attachment, Detected, Memory, Runtime, RuntimeFile, WhyNot, numbers_of};

/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 8 << 20;
/// Bytes of constants in which a version is searched.
const MAX_CONSTANTS: u64 = 4 << 20;
const MAX_VERSION: usize = 24;

/// Symbols that BEAM exports for debuggers: its release, and from 24 on whether it compiles to machine code.
const ERLANG: [&str; 2] = ["etp_otp_release", "etp_beamasm"];
/// The numbers of Perl's version, of one byte each, and its loop.
const PERL: [&str; 4] = ["PL_revision", "PL_version", "PL_subversion", "Perl_runops_standard"];
/// The text before the version of LuaJIT.
const BEFORE_LUAJIT: &[u8] = b"LuaJIT ";

/// .NET Core from 3 on, and .NET.
pub(super) static DOTNET: Listed = Listed {
    name: "dotnet",
    mapping: "[dotnet]",
    files: &["libcoreclr.so"],
    detect: dotnet,
    // Before .NET 6 only the old prefix counts.
    unlisted: |detected| match detected.version.0 {
        1..6 => WhyNot::Unlisted("start it with COMPlus_PerfMapEnabled=1"),
        _ => WhyNot::Unlisted("start it with DOTNET_PerfMapEnabled=1"),
    },
};

/// BEAM, the virtual machine of Erlang and Elixir.
pub(super) static ERLANG_VM: Listed = Listed {
    name: "erlang",
    mapping: "[erlang]",
    files: &["beam"],
    detect: erlang,
    unlisted: |detected| match detected.addresses[..] {
        [1] => WhyNot::Unlisted("start it with +JPperf true"),
        // A build that interprets.
        _ => WhyNot::OnlyNative,
    },
};

/// `LuaJIT`, as a program and as a library of others.
pub(super) static LUAJIT: Listed = Listed {
    name: "luajit",
    mapping: "[luajit]",
    files: &["luajit", "libluajit"],
    detect: luajit,
    unlisted: |_| WhyNot::Unlisted("only builds with LUAJIT_USE_PERFTOOLS list it"),
};

/// The interpreter of Perl 5, as a program and as a library of others.
pub(super) static PERL_5: Listed = Listed {
    name: "perl",
    mapping: "[perl]",
    files: &["perl", "libperl.so"],
    detect: perl,
    unlisted: |_| WhyNot::OnlyNative,
};

/// A runtime whose functions have the names that the process lists.
#[derive(Debug)]
pub(super) struct Listed {
    name: &'static str,
    mapping: &'static str,
    /// How the names of its files begin. Others are not read for it.
    files: &'static [&'static str],
    /// Finds the version, by the symbols that the file exports.
    detect: fn(&Elf<'_>, &Symbols<'_>, &str) -> Option<Detected>,
    /// Why functions have no names if the process lists none.
    unlisted: fn(&Detected) -> WhyNot,
}

impl Listed {
    /// Reports whether a file may be this runtime, by its path in the process.
    pub(super) fn may_be(&self, path: &str) -> bool {
        let name = path.rsplit('/').next().unwrap_or_default();
        self.files.iter().any(|begin| name.starts_with(begin))
    }
}

impl Runtime for Listed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn mapping(&self) -> &'static str {
        self.mapping
    }

    fn has_frames(&self) -> bool {
        false
    }

    fn detect(&self, elf: &Elf<'_>, path: &str) -> Option<Detected> {
        let symbols = self.may_be(path).then(|| elf.symbols(b".dynsym")).flatten()?;
        (symbols.bytes() <= MAX_SYMBOL_BYTES).then(|| (self.detect)(elf, &symbols, path)).flatten()
    }

    fn attach(&self, file: &RuntimeFile, _: u64, _: &dyn Memory) -> Result<Attachment, WhyNot> {
        Ok(Attachment::Listed((self.unlisted)(&file.detected)))
    }
}

fn dotnet(_: &Elf<'_>, symbols: &Symbols<'_>, path: &str) -> Option<Detected> {
    let [start] = symbols.addresses_of(&["coreclr_initialize"]);
    start?;
    // The directory of a shared installation is named by the version. A program that brings its own runtime does not say it.
    let directory = path.rsplit('/').nth(1).unwrap_or_default();
    let version = Some(version_at(directory.as_bytes())).filter(|version| version == directory);
    Some(detected(version.unwrap_or_default(), Vec::new()))
}

fn erlang(elf: &Elf<'_>, symbols: &Symbols<'_>, _: &str) -> Option<Detected> {
    let [release, compiles] = symbols.addresses_of(&ERLANG);
    let release = elf.bytes_at(release?, MAX_VERSION as u64)?;
    let compiles = compiles.and_then(|at| elf.bytes_at(at, 4)).is_some_and(|flag| flag[..] != [0; 4]);
    Some(detected(version_at(&release), vec![compiles.into()]))
}

fn luajit(elf: &Elf<'_>, symbols: &Symbols<'_>, _: &str) -> Option<Detected> {
    let [set_mode] = symbols.addresses_of(&["luaJIT_setmode"]);
    set_mode?;
    let constants = elf.section(b".rodata");
    let text = constants.and_then(|section| elf.bytes_at(section.vaddr, section.bytes.min(MAX_CONSTANTS)));
    let text = text.unwrap_or_default();
    let mut versions = memchr::memmem::find_iter(&text, BEFORE_LUAJIT)
        .map(|at| version_at(&text[at + BEFORE_LUAJIT.len()..]));
    Some(detected(versions.find(|version| !version.is_empty()).unwrap_or_default(), Vec::new()))
}

fn perl(elf: &Elf<'_>, symbols: &Symbols<'_>, _: &str) -> Option<Detected> {
    let [revision, version, subversion, run] = symbols.addresses_of(&PERL);
    run?;
    let number = |at: Option<u64>| elf.bytes_at(at?, 1)?.first().copied();
    let numbers = [number(revision)?, number(version)?, number(subversion)?];
    Some(detected(numbers.map(|number| number.to_string()).join("."), Vec::new()))
}

fn detected(version_text: String, addresses: Vec<u64>) -> Detected {
    Detected { version: numbers_of(&version_text), version_text, addresses, layout: 0 }
}

/// Takes a version, such as `2.1.0-beta3`, from the begin of a text that a target wrote. Empty if there is none.
fn version_at(text: &[u8]) -> String {
    let is_part = |byte: &&u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let version = text.iter().take(MAX_VERSION).take_while(is_part).map(|byte| char::from(*byte));
    let version: String = version.collect();
    if version.starts_with(|first: char| first.is_ascii_digit()) { version } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_from_any_text() {
        for (text, version) in [
            ("2.1.0-beta3 -- Copyright", "2.1.0-beta3"),
            ("2.1.1700008891\0", "2.1.1700008891"),
            ("25\0", "25"),
            ("25", "25"),
            ("Copyright", ""),
            ("", ""),
            ("1\n2", "1"),
            ("1.2.3.4.5.6.7.8.9.10.11.12.13", "1.2.3.4.5.6.7.8.9.10.11."),
        ] {
            assert_eq!(version_at(text.as_bytes()), version);
        }
    }

    #[test]
    fn files_of_other_names_are_not_read() {
        assert!(DOTNET.may_be("/usr/share/dotnet/shared/Microsoft.NETCore.App/8.0.8/libcoreclr.so"));
        assert!(PERL_5.may_be("/usr/bin/perl5.36-x86_64-linux-gnu") && PERL_5.may_be("/lib/libperl.so.5.36"));
        assert!(LUAJIT.may_be("/usr/lib/libluajit-5.1.so.2.1.0 (deleted)"));
        assert!(ERLANG_VM.may_be("/usr/lib/erlang/erts-13.1.5/bin/beam.smp"));
        for path in ["/usr/lib/perl/helper", "/usr/bin/x-perl", "/", ""] {
            assert!(![&DOTNET, &ERLANG_VM, &LUAJIT, &PERL_5].iter().any(|runtime| runtime.may_be(path)));
        }
    }
}
