//! The kernel's own symbols, with those of modules and BPF programs, as `/proc/kallsyms` shows them.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    time::{Duration, Instant},
};

use super::symbol_table::{SymbolTable, SymbolTableBuilder};

/// The 200,000 functions of a kernel take 7 MB.
const MAX_TABLE_BYTES: usize = 64 << 20;
/// Modules and BPF programs come and go.
const RELOAD_AFTER: Duration = Duration::from_secs(60);

/// The reason why kernel frames have no names.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KallsymsError {
    #[error("cannot read /proc/kallsyms, kernel frames have no names: {0}")]
    Unreadable(#[from] io::Error),
    #[error(
        "/proc/kallsyms shows no addresses: kernel frames have no names; \
         give the agent CAP_SYSLOG, or set kernel.kptr_restrict to 1 or 0"
    )]
    Restricted,
    #[error("/proc/kallsyms is larger than any kernel's, kernel frames have no names")]
    TooLarge,
}

/// Kernel symbols, read at the first use and again once they are old.
#[derive(Debug, Default)]
pub(crate) struct Kallsyms {
    table: SymbolTable,
    read_at: Option<Instant>,
    warned: bool,
}

/// A kernel function.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelSymbol<'a> {
    pub(crate) name: &'a str,
    /// The module that it belongs to, or `bpf`; empty for the kernel itself.
    pub(crate) module: &'a str,
}

impl Kallsyms {
    /// Reads the symbols if they are old. Returns whether it read them. Logs an error once.
    pub(crate) fn refresh(&mut self) -> bool {
        if self.read_at.is_some_and(|at| at.elapsed() < RELOAD_AFTER) {
            return false;
        }
        self.read_at = Some(Instant::now());
        match File::open("/proc/kallsyms").map_err(Into::into).and_then(|file| parse(BufReader::new(file))) {
            Ok(table) => self.table = table,
            Err(error) if !self.warned => {
                self.warned = true;
                tracing::warn!("{error}");
            }
            Err(_) => {}
        }
        true
    }

    pub(crate) fn find(&self, address: u64) -> Option<KernelSymbol<'_>> {
        let text = std::str::from_utf8(self.table.find(address)?).ok()?;
        let (name, module) = text.split_once('\t').unwrap_or((text, ""));
        Some(KernelSymbol { name, module: module.trim_start_matches('[').trim_end_matches(']') })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }
}

fn parse(mut text: impl BufRead) -> Result<SymbolTable, KallsymsError> {
    let mut builder = SymbolTableBuilder::new(MAX_TABLE_BYTES);
    let mut line = Vec::new();
    loop {
        line.clear();
        if text.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        // `ffffffff81000000 T name\t[module]`
        let mut words = line.trim_ascii_end().splitn(3, |byte| *byte == b' ');
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Some(address) =
            std::str::from_utf8(address).ok().and_then(|hex| u64::from_str_radix(hex, 16).ok())
        else {
            continue;
        };
        // A hidden address is zero. Upper case marks a global symbol, whose name takes precedence over its aliases.
        let rank = match kind {
            b"T" => 2,
            b"W" | b"w" => 0,
            b"t" => 1,
            _ => continue,
        };
        if address != 0 {
            builder.push(address, 0, name, rank).map_err(|_| KallsymsError::TooLarge)?;
        }
    }
    if builder.is_empty() { Err(KallsymsError::Restricted) } else { Ok(builder.finish()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 t startup_64_alias
ffffffff81001000 T do_syscall_64
ffffffff81002000 D jiffies
ffffffffc0001000 t nf_conntrack_in\t[nf_conntrack]
ffffffffc0002000 t bpf_prog_6deef7357e7b4530_sample\t[bpf]
";

    #[test]
    fn kernel_modules_and_bpf_programs_have_names() {
        let kallsyms = Kallsyms { table: parse(TEXT.as_bytes()).unwrap(), ..Kallsyms::default() };
        for (address, expected) in [
            (0xffff_ffff_8100_0010, Some(("_stext", ""))),
            (0xffff_ffff_8100_2010, Some(("do_syscall_64", ""))),
            (0xffff_ffff_c000_1004, Some(("nf_conntrack_in", "nf_conntrack"))),
            (0xffff_ffff_c000_2004, Some(("bpf_prog_6deef7357e7b4530_sample", "bpf"))),
            (0xffff_ffff_80ff_ffff, None),
        ] {
            let expected = expected.map(|(name, module)| KernelSymbol { name, module });
            assert_eq!(kallsyms.find(address), expected, "{address:#x}");
        }
    }

    #[test]
    fn hidden_addresses_give_an_error_that_names_the_cure() {
        let hidden = "0000000000000000 T _stext\n0000000000000000 T do_syscall_64\n";
        let error = parse(hidden.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("CAP_SYSLOG") && error.contains("kptr_restrict"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = parse(text.as_slice());
        }
    }
}
