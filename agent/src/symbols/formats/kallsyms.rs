//! The kernel's own symbols, with those of modules and BPF programs, as `/proc/kallsyms` shows them.
//!
//! Where the kernel can, it names single addresses (see [`KernelNamer`](crate::model::KernelNamer)). Elsewhere the file is read,
//! once, because the kernel formats all of its symbols again for each reading, which takes a tenth of a second. BPF programs and
//! trampolines that come and go are known by events, and `/proc/modules` says whether modules came or went.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, BufRead, BufReader, Read as _},
    time::{Duration, Instant},
};

use super::symbol_table::{SymbolTable, SymbolTableBuilder};
use crate::model::{
    KernelName, KernelSymbolChange, KernelSymbolLog, KernelSymbolPosition, KernelSymbolRange,
};

/// The 200,000 functions of a kernel take 7 MB.
const MAX_TABLE_BYTES: usize = 64 << 20;
/// The time between two readings while events say what changes.
const RELOAD_AFTER: Duration = Duration::from_secs(30);
/// The time between two readings without events: modules and BPF programs come and go.
const RELOAD_WITHOUT_EVENTS_AFTER: Duration = Duration::from_secs(60);
/// The samples of a window may be named this long after they were taken.
const WINDOW_TIME: Duration = Duration::from_secs(30);
/// Functions that are known by events.
const MAX_MADE: usize = 8192;
/// A node has some hundred modules of 60 bytes each.
const MAX_MODULES_BYTES: u64 = 1 << 20;

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

/// Kernel symbols: asked for one by one, or read at the first use, and again where events do not say what has changed.
#[derive(Debug)]
pub(crate) struct KernelSymbols {
    log: &'static KernelSymbolLog,
    position: KernelSymbolPosition,
    /// Empty while single addresses can be named.
    table: SymbolTable,
    read_at: Option<Instant>,
    /// The modules at the last reading.
    modules: u64,
    /// Functions made since the last reading, by first address, and functions gone since then.
    made: BTreeMap<u64, MadeSymbol>,
    /// The time of the last refresh.
    now: Instant,
    warned: bool,
}

/// A function that an event reported.
#[derive(Debug)]
struct MadeSymbol {
    end: u64,
    name: String,
    module: String,
    /// When it went. It keeps its name, because samples of it may wait for names.
    gone: Option<Instant>,
    /// Until then, a sample may be one of another function that was here before.
    doubtful_until: Option<Instant>,
}

/// A kernel function.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelSymbol<'a> {
    pub(crate) name: Cow<'a, str>,
    /// The module that it belongs to, or `bpf`; empty for the kernel itself.
    pub(crate) module: Cow<'a, str>,
}

impl KernelSymbols {
    pub(crate) fn new(log: &'static KernelSymbolLog) -> Self {
        Self {
            log,
            position: KernelSymbolPosition::default(),
            table: SymbolTable::default(),
            read_at: None,
            modules: 0,
            made: BTreeMap::new(),
            now: Instant::now(),
            warned: false,
        }
    }

    /// Learns what has changed, and reads all symbols if that is not known otherwise. Logs an error once.
    pub(crate) fn refresh(&mut self) -> Refreshed {
        if self.log.has_namer() {
            return self.follow(Instant::now());
        }
        let read =
            || File::open("/proc/kallsyms").map_err(Into::into).and_then(|file| parse(BufReader::new(file)));
        self.refresh_by(Instant::now(), loaded_modules(), read)
    }

    /// Learns which functions came and went, while single addresses can be named.
    fn follow(&mut self, now: Instant) -> Refreshed {
        self.now = now;
        match self.log.since(&mut self.position) {
            Some(changes) if changes.is_empty() => return Refreshed::Unchanged,
            Some(changes) => changes.into_iter().for_each(|change| self.apply(change)),
            None => {
                self.made.clear();
                self.position = self.log.end();
            }
        }
        self.made.retain(|_, symbol| {
            symbol.gone.is_none_or(|gone| now.saturating_duration_since(gone) < WINDOW_TIME)
        });
        if self.made.len() > MAX_MADE {
            self.made.clear();
        }
        Refreshed::Changed
    }

    fn refresh_by(
        &mut self,
        now: Instant,
        modules: u64,
        read: impl FnOnce() -> Result<SymbolTable, KallsymsError>,
    ) -> Refreshed {
        self.now = now;
        let changes = self.log.since(&mut self.position);
        let is_known = changes.is_some() && self.position.is_followed();
        let mut refreshed = Refreshed::Unchanged;
        for change in changes.into_iter().flatten() {
            self.apply(change);
            refreshed = Refreshed::Changed;
        }
        if self.made.len() > MAX_MADE {
            self.made.retain(|_, symbol| symbol.gone.is_none());
        }
        let is_current = is_known && modules == self.modules && self.made.len() <= MAX_MADE;
        let pause =
            if is_known || self.log.end().is_followed() { RELOAD_AFTER } else { RELOAD_WITHOUT_EVENTS_AFTER };
        let was_read = |at: Instant| is_current || now.saturating_duration_since(at) < pause;
        if self.read_at.is_some_and(was_read) {
            return refreshed;
        }
        self.read_at = Some(now);
        // Before reading: a change in the meantime is applied again, which does no harm.
        self.position = self.log.end();
        self.modules = modules;
        self.made.clear();
        match read() {
            Ok(table) => self.table = table,
            Err(error) if !self.warned => {
                self.warned = true;
                tracing::warn!("{error}");
            }
            Err(_) => {}
        }
        Refreshed::Read
    }

    fn apply(&mut self, change: KernelSymbolChange) {
        match change {
            KernelSymbolChange::Added(range) => self.add(range),
            KernelSymbolChange::Removed(range) => self.remove(range),
        }
    }

    fn add(&mut self, range: KernelSymbolRange) {
        let KernelSymbolRange { start, bytes, name, module } = range;
        let end = start.saturating_add(u64::from(bytes));
        let first = self.made.range(..=start).next_back().filter(|(_, former)| former.end > start);
        let first = first.map_or(start, |(start, _)| *start);
        let overlapped: Vec<u64> = self.made.range(first..end.max(start)).map(|(start, _)| *start).collect();
        let mut doubtful_until = None;
        for former in overlapped.into_iter().filter_map(|start| self.made.remove(&start)) {
            let is_recent =
                former.gone.is_none_or(|gone| self.now.saturating_duration_since(gone) < WINDOW_TIME);
            if former.name != name && is_recent {
                doubtful_until = Some(self.now + WINDOW_TIME);
            }
        }
        let symbol = MadeSymbol { end, name, module: module.to_owned(), gone: None, doubtful_until };
        self.made.insert(start, symbol);
    }

    fn remove(&mut self, range: KernelSymbolRange) {
        if let Some(symbol) = self.made.get_mut(&range.start).filter(|symbol| symbol.name == range.name) {
            symbol.gone = Some(self.now);
        } else {
            let start = range.start;
            self.add(range);
            if let Some(symbol) = self.made.get_mut(&start) {
                symbol.gone = Some(self.now);
            }
        }
    }

    /// Returns the function at each address.
    pub(crate) fn find_all(&self, addresses: &[u64]) -> Vec<Option<KernelSymbol<'_>>> {
        let unknown: Vec<u64> =
            addresses.iter().copied().filter(|address| self.made_at(*address).is_none()).collect();
        let mut asked = self.log.names(&unknown).map(Vec::into_iter);
        let mut find = |address: u64| match (self.made_at(address), &mut asked) {
            (Some(symbol), _) => self.unless_doubtful(symbol),
            (None, Some(asked)) => asked
                .next()
                .flatten()
                .map(|KernelName { name, module }| KernelSymbol { name: name.into(), module: module.into() }),
            (None, None) => symbol_at(&self.table, address),
        };
        addresses.iter().map(|address| find(*address)).collect()
    }

    /// Returns the function that events reported at this address.
    fn made_at(&self, address: u64) -> Option<&MadeSymbol> {
        self.made
            .range(..=address)
            .next_back()
            .map(|(_, symbol)| symbol)
            .filter(|symbol| address < symbol.end)
    }

    fn unless_doubtful<'a>(&self, symbol: &'a MadeSymbol) -> Option<KernelSymbol<'a>> {
        let is_doubtful = symbol.doubtful_until.is_some_and(|until| self.now < until);
        (!is_doubtful)
            .then(|| KernelSymbol { name: (&*symbol.name).into(), module: (&*symbol.module).into() })
    }

    pub(crate) fn bytes(&self) -> usize {
        let made = self.made.values().map(|symbol| size_of::<MadeSymbol>() + symbol.name.len());
        self.table.bytes() + made.sum::<usize>()
    }
}

/// The work that [`KernelSymbols::refresh`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refreshed {
    Unchanged,
    /// Events changed some symbols.
    Changed,
    /// All symbols were read.
    Read,
}

fn symbol_at(table: &SymbolTable, address: u64) -> Option<KernelSymbol<'_>> {
    let text = std::str::from_utf8(table.find(address)?).ok()?;
    let (name, module) = text.split_once('\t').unwrap_or((text, ""));
    Some(KernelSymbol {
        name: name.into(),
        module: module.trim_start_matches('[').trim_end_matches(']').into(),
    })
}

/// Returns a number that changes when a module comes or goes.
fn loaded_modules() -> u64 {
    let mut text = Vec::new();
    // A kernel without modules has no such file.
    let _ = File::open("/proc/modules").and_then(|file| file.take(MAX_MODULES_BYTES).read_to_end(&mut text));
    number_of_modules(&text)
}

fn number_of_modules(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for line in text.split(|byte| *byte == b'\n') {
        // `name bytes users dependents state address`: the users change all the time.
        let words = line.split(|byte| *byte == b' ').enumerate();
        words.filter(|(column, _)| matches!(column, 0 | 1 | 5)).for_each(|(_, word)| word.hash(&mut hasher));
    }
    hasher.finish()
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
    use crate::model::KernelNamer;

    const TEXT: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 t startup_64_alias
ffffffff81001000 T do_syscall_64
ffffffff81002000 D jiffies
ffffffffc0001000 t nf_conntrack_in\t[nf_conntrack]
ffffffffc0002000 t bpf_prog_6deef7357e7b4530_sample\t[bpf]
";

    const BPF: u64 = 0xffff_ffff_c000_2000;

    fn log() -> &'static KernelSymbolLog {
        Box::leak(Box::default())
    }

    /// Refreshes at this second with [`TEXT`], and returns what was done.
    fn refresh(kallsyms: &mut KernelSymbols, begin: Instant, seconds: u64, modules: u64) -> Refreshed {
        kallsyms.refresh_by(begin + Duration::from_secs(seconds), modules, || parse(TEXT.as_bytes()))
    }

    fn add(log: &KernelSymbolLog, start: u64, bytes: u32, name: &str) {
        log.push(KernelSymbolChange::Added(range(start, bytes, name)));
    }

    fn range(start: u64, bytes: u32, name: &str) -> KernelSymbolRange {
        KernelSymbolRange { start, bytes, name: name.to_owned(), module: "bpf" }
    }

    fn find(kallsyms: &KernelSymbols, address: u64) -> Option<KernelSymbol<'_>> {
        kallsyms.find_all(&[address]).pop().flatten()
    }

    fn name_at(kallsyms: &KernelSymbols, address: u64) -> Option<String> {
        find(kallsyms, address).map(|symbol| symbol.name.into_owned())
    }

    #[test]
    fn kernel_modules_and_bpf_programs_have_names() {
        let mut kallsyms = KernelSymbols::new(log());
        refresh(&mut kallsyms, Instant::now(), 0, 0);
        for (address, expected) in [
            (0xffff_ffff_8100_0010, Some(("_stext", ""))),
            (0xffff_ffff_8100_2010, Some(("do_syscall_64", ""))),
            (0xffff_ffff_c000_1004, Some(("nf_conntrack_in", "nf_conntrack"))),
            (0xffff_ffff_c000_2004, Some(("bpf_prog_6deef7357e7b4530_sample", "bpf"))),
            (0xffff_ffff_80ff_ffff, None),
        ] {
            let expected = expected.map(|(name, module): (&str, &str)| KernelSymbol {
                name: name.into(),
                module: module.into(),
            });
            assert_eq!(find(&kallsyms, address), expected, "{address:#x}");
        }
    }

    #[test]
    fn symbols_are_read_again_only_if_events_do_not_tell_the_change() {
        let (log, begin) = (log(), Instant::now());
        let mut kallsyms = KernelSymbols::new(log);
        let at = |kallsyms: &mut KernelSymbols, seconds, modules| refresh(kallsyms, begin, seconds, modules);
        assert_eq!(at(&mut kallsyms, 0, 1), Refreshed::Read);
        assert_eq!(at(&mut kallsyms, 59, 1), Refreshed::Unchanged);
        assert_eq!(at(&mut kallsyms, 60, 1), Refreshed::Read, "without events, time decides");
        log.missed();
        assert_eq!(at(&mut kallsyms, 89, 1), Refreshed::Unchanged);
        assert_eq!(at(&mut kallsyms, 90, 1), Refreshed::Read, "events begin");
        assert_eq!(at(&mut kallsyms, 3600, 1), Refreshed::Unchanged);
        add(log, BPF + 0x100, 0x40, "bpf_prog_1_new");
        assert_eq!(at(&mut kallsyms, 3600, 1), Refreshed::Changed);
        assert_eq!(at(&mut kallsyms, 3600, 2), Refreshed::Read, "another module");
        log.missed();
        assert_eq!(at(&mut kallsyms, 3629, 2), Refreshed::Unchanged);
        assert_eq!(at(&mut kallsyms, 3630, 2), Refreshed::Read, "the kernel lost events");
        (0..=MAX_MADE as u64).for_each(|index| {
            add(log, BPF + index * 64, 64, "bpf_prog_2_many");
            assert_ne!(at(&mut kallsyms, 3640, 2), Refreshed::Read);
        });
        assert_eq!(at(&mut kallsyms, 3660, 2), Refreshed::Read, "too many to remember");
        assert_eq!(at(&mut kallsyms, 7200, 2), Refreshed::Unchanged);
    }

    #[test]
    fn a_program_has_its_name_from_its_first_to_its_last_sample() {
        let (log, begin) = (log(), Instant::now());
        log.missed();
        let mut kallsyms = KernelSymbols::new(log);
        refresh(&mut kallsyms, begin, 0, 0);
        add(log, BPF + 0x100, 0x40, "bpf_prog_1_new");
        assert_eq!(refresh(&mut kallsyms, begin, 10, 0), Refreshed::Changed);
        assert_eq!(name_at(&kallsyms, BPF + 0x13f).as_deref(), Some("bpf_prog_1_new"));
        assert_eq!(find(&kallsyms, BPF + 0x100).map(|symbol| symbol.module), Some("bpf".into()));
        assert_eq!(name_at(&kallsyms, BPF + 0xff).as_deref(), Some("bpf_prog_6deef7357e7b4530_sample"));
        log.push(KernelSymbolChange::Removed(range(BPF + 0x100, 0x40, "bpf_prog_1_new")));
        refresh(&mut kallsyms, begin, 20, 0);
        assert_eq!(name_at(&kallsyms, BPF + 0x100).as_deref(), Some("bpf_prog_1_new"));
    }

    #[test]
    fn an_address_that_two_functions_had_in_one_window_has_no_name() {
        for (former, name) in [(BPF + 0x80, "made since"), (BPF, "read from the file")] {
            let (log, begin) = (log(), Instant::now());
            log.missed();
            let mut kallsyms = KernelSymbols::new(log);
            refresh(&mut kallsyms, begin, 0, 0);
            let gone = if former == BPF { "bpf_prog_6deef7357e7b4530_sample" } else { "bpf_prog_1_former" };
            if former != BPF {
                add(log, former, 0x80, gone);
            }
            log.push(KernelSymbolChange::Removed(range(former, 0x100, gone)));
            add(log, BPF + 0xc0, 0x80, "bpf_prog_2_new");
            refresh(&mut kallsyms, begin, 10, 0);
            assert_eq!(name_at(&kallsyms, BPF + 0xc0).as_deref(), None, "{name}");
            refresh(&mut kallsyms, begin, 40, 0);
            assert_eq!(name_at(&kallsyms, BPF + 0xc0).as_deref(), Some("bpf_prog_2_new"), "{name}");
            // The same program again.
            log.push(KernelSymbolChange::Removed(range(BPF + 0xc0, 0x80, "bpf_prog_2_new")));
            add(log, BPF + 0xc0, 0x80, "bpf_prog_2_new");
            refresh(&mut kallsyms, begin, 50, 0);
            assert_eq!(name_at(&kallsyms, BPF + 0xc0).as_deref(), Some("bpf_prog_2_new"), "{name}");
        }
    }

    /// Names each address below 100 after itself.
    #[derive(Debug)]
    struct Namer;

    impl KernelNamer for Namer {
        fn names(&mut self, addresses: &[u64]) -> io::Result<Vec<Option<KernelName>>> {
            let name =
                |address| KernelName { name: format!("function_{address}"), module: "module".to_owned() };
            Ok(addresses.iter().map(|address| (*address < 100).then(|| name(*address))).collect())
        }
    }

    #[test]
    fn a_namer_is_asked_for_what_no_event_told() {
        let (log, begin) = (log(), Instant::now());
        log.set_namer(Box::new(Namer));
        let mut kallsyms = KernelSymbols::new(log);
        assert_eq!(kallsyms.follow(begin), Refreshed::Unchanged, "nothing has changed");
        add(log, 40, 8, "bpf_prog_1_new");
        log.push(KernelSymbolChange::Removed(range(60, 8, "bpf_prog_2_there_before")));
        assert_eq!(kallsyms.follow(begin), Refreshed::Changed);
        let names = |kallsyms: &KernelSymbols, addresses: &[u64]| -> Vec<Option<String>> {
            let found = kallsyms.find_all(addresses).into_iter();
            found.map(|symbol| symbol.map(|symbol| symbol.name.into_owned())).collect()
        };
        let wanted = [
            Some("function_7"),
            Some("bpf_prog_1_new"),
            None,
            Some("bpf_prog_2_there_before"),
            Some("function_48"),
        ];
        let wanted = wanted.map(|name| name.map(str::to_owned));
        assert_eq!(names(&kallsyms, &[7, 47, 100, 67, 48]), wanted);
        log.push(KernelSymbolChange::Removed(range(40, 8, "bpf_prog_1_new")));
        kallsyms.follow(begin + WINDOW_TIME / 2);
        assert_eq!(
            names(&kallsyms, &[47]),
            [Some("bpf_prog_1_new".to_owned())],
            "its samples wait for names"
        );
        add(log, 1000, 8, "bpf_prog_3_other");
        kallsyms.follow(begin + 2 * WINDOW_TIME);
        assert_eq!(
            names(&kallsyms, &[47]),
            [Some("function_47".to_owned())],
            "later it is what is there now"
        );
        log.missed();
        assert_eq!(kallsyms.follow(begin + 2 * WINDOW_TIME), Refreshed::Changed);
        assert_eq!(names(&kallsyms, &[1000]), [None], "what events told before a gap may be wrong");
    }

    #[test]
    fn a_module_that_comes_or_goes_changes_the_number() {
        let text = "ext4 100 3 jbd2,mbcache, Live 0xffffffffc0000000\nfuse 50 1 - Live 0xffffffffc0100000\n";
        let number = |text: &str| number_of_modules(text.as_bytes());
        assert_eq!(number(text), number(&text.replace("100 3 jbd2", "100 4 jbd2")), "another user");
        for (from, to) in [("fuse", "nfs"), ("fuse 50", "fuse 60"), ("c0100000", "c0200000"), ("ext4", "")] {
            assert_ne!(number(text), number(&text.replace(from, to)), "{from}");
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
