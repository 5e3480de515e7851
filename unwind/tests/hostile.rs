//! Files that are made to harm: any bytes give a table or a typed error, soon and in little memory.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gannet_unwind::build::{BuildOptions, build_bytes, build_file};
use gannet_unwind::limits::TableLimits;
use object::{Object, ObjectSection};
use proptest::prelude::*;

/// Counts allocated bytes, so that a test can tell how much a file may cost.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn limits() -> TableLimits {
    TableLimits {
        section_bytes: 4 << 20,
        rows: 1 << 18,
        functions: 1 << 16,
        span_bytes: 256 << 20,
        time: Some(Duration::from_secs(2)),
        ..TableLimits::default()
    }
}

/// Builds a table and looks up addresses all over it.
#[track_caller]
fn survive(bytes: &[u8]) {
    let limits = limits();
    let start = Instant::now();
    let result = build_bytes(
        bytes,
        &BuildOptions { runs: bytes.len().is_multiple_of(2), ..BuildOptions::new("hostile", &limits) },
    );
    assert!(start.elapsed() < Duration::from_secs(8), "took {:?}", start.elapsed());
    match result {
        Ok(built) => {
            let (base, span) = (built.table.base(), u64::from(built.table.granules()) << 11);
            for part in 0..64 {
                let _ = built.table.lookup(base.wrapping_add(span / 64 * part));
            }
            let _ = built.table.lookup(base.wrapping_add(span));
            let stored = gannet_unwind::cache::encode(
                &built.content,
                &built.table,
                &built.segments,
                built.build_id.as_ref(),
            );
            assert!(gannet_unwind::cache::decode(&stored, &built.content).is_ok());
        }
        Err(error) => assert!(error.to_string().starts_with("hostile: "), "{error}"),
    }
}

/// Small real files of different kinds: C by bfd, a vDSO, Go.
fn seeds() -> Vec<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("small.c");
    fs::write(
        &source,
        "int f(int a){volatile char b[99];b[a]=1;return b[2];}int main(int c,char**v){return f(c);}",
    )
    .unwrap();
    let build = |name: &str, flags: &[&str]| {
        let exe = directory.path().join(name);
        let output = Command::new("gcc").args(flags).arg(&source).arg("-o").arg(&exe).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read(exe).unwrap()
    };
    vec![
        build("plain", &["-O2"]),
        build("debug", &["-O2", "-g", "-gz=zlib", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]),
        build("shared", &["-O2", "-shared", "-fPIC", "-Wl,-z,noseparate-code"]),
        go_like(),
    ]
}

/// A file with a function table in Go's form; its code is one segment of zeros.
fn go_like() -> Vec<u8> {
    let mut table = Vec::new();
    table.extend_from_slice(&0xffff_fff1_u32.to_le_bytes());
    table.extend_from_slice(&[0, 0, 1, 8]);
    for word in [3_u64, 0, 0x40_1000, 72, 0, 0, 100, 140] {
        table.extend_from_slice(&word.to_le_bytes());
    }
    table.resize(100, 0);
    table[72..85].copy_from_slice(b"runtime.main\0");
    table.extend_from_slice(&[0x02, 4, 0x20, 30, 0x1f, 1, 0]);
    table.resize(140, 0);
    for (at, record) in [(0_u32, 32_u32), (64, 32), (128, 32), (192, 0)] {
        table.extend_from_slice(&at.to_le_bytes());
        table.extend_from_slice(&record.to_le_bytes());
    }
    for word in [0_u32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] {
        table.extend_from_slice(&word.to_le_bytes());
    }
    let names = b"\0.gopclntab\0.shstrtab\0";
    let mut bytes = vec![0; 4096];
    bytes[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    bytes[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
    bytes[40..48].copy_from_slice(&2048_u64.to_le_bytes());
    for (at, value) in (52..64).step_by(2).zip([64_u16, 56, 1, 64, 3, 2]) {
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    bytes[64..72].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for (at, value) in (72..120).step_by(8).zip([0_u64, 0x40_1000, 0x40_1000, 4096, 4096, 4096]) {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes[512..512 + table.len()].copy_from_slice(&table);
    bytes[1500..1500 + names.len()].copy_from_slice(names);
    for (section, name, kind, at, size) in
        [(1, 1_u32, 1_u32, 512, table.len()), (2, 12, 3, 1500, names.len())]
    {
        let header = &mut bytes[2048 + section * 64..][..64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
    }
    bytes
}

#[test]
fn the_seeds_are_good_files() {
    let limits = limits();
    let built = seeds()
        .iter()
        .map(|bytes| build_bytes(bytes, &BuildOptions::new("seed", &limits)).unwrap())
        .collect::<Vec<_>>();
    assert!(built[0].report.eh_frame_functions > 1 && built[2].report.eh_frame_functions > 1);
    assert!(built[1].report.debug_frame_functions > 1, "{:?}", built[1].report);
    assert_eq!(built[3].report.go_functions, 3, "{:?}", built[3].report);
}

/// The parts of a file in which a change matters most: headers, notes, frame sections.
fn interesting(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut ranges = vec![(0, 64 + 56 * 13)];
    if let Ok(file) = object::File::parse(bytes) {
        let wanted =
            [".eh_frame", ".eh_frame_hdr", ".debug_frame", ".gopclntab", ".plt", ".note.gnu.build-id"];
        ranges.extend(wanted.iter().filter_map(|name| {
            let (start, size) = file.section_by_name(name)?.file_range()?;
            Some((start as usize, size as usize))
        }));
        ranges.push((bytes.len().saturating_sub(64 * 30), 64 * 30));
    }
    ranges.retain(|(start, size)| *size > 0 && start + size <= bytes.len());
    ranges
}

/// Checks damage of headers, notes and frame sections (R55).
#[test]
fn changed_files_give_a_table_or_an_error() {
    let seeds: Vec<_> = seeds().into_iter().map(|bytes| (interesting(&bytes), bytes)).collect();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 1500,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let change = (
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff])],
    );
    let input = (
        0..seeds.len(),
        prop::collection::vec(change, 1..24),
        prop::option::weighted(0.1, any::<prop::sample::Index>()),
    );
    runner
        .run(&input, |(seed, changes, cut)| {
            let (ranges, good) = &seeds[seed];
            let mut bytes = good.clone();
            for (range, at, value) in changes {
                let (start, size) = *range.get(ranges);
                bytes[start + at.index(size)] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(good.len()));
            }
            survive(&bytes);
            Ok(())
        })
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    /// Checks arbitrary bytes, with and without an ELF magic (R55).
    #[test]
    fn bytes_that_are_no_file_give_an_error(bytes in prop::collection::vec(any::<u8>(), 0..4096), magic: bool) {
        let mut bytes = bytes;
        if magic && bytes.len() > 20 {
            bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            bytes[18..20].copy_from_slice(&[62, 0]);
        }
        survive(&bytes);
    }
}

/// Checks that the claim of a size takes no memory (R55).
#[test]
fn a_sparse_file_of_a_terabyte_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse");
    let mut bytes = seeds().swap_remove(0);
    // The section of frame information claims half of it.
    let (index, count, headers) = {
        let file = object::File::parse(&*bytes).unwrap();
        let section = file.section_by_name(".eh_frame").unwrap();
        let headers = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
        (section.index().0, file.sections().count(), headers)
    };
    assert!(index < count + 1);
    bytes[headers + index * 64 + 32..][..8].copy_from_slice(&(1_u64 << 39).to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).read(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    PEAK.store(NOW.load(Ordering::Relaxed), Ordering::Relaxed);
    let before = PEAK.load(Ordering::Relaxed);
    let error = build_file(&file, &BuildOptions::new("sparse", &TableLimits::default())).unwrap_err();
    assert!(error.to_string().contains("bytes in one section"), "{error}");
    // Other tests run beside this one; half a terabyte would stand out.
    assert!(PEAK.load(Ordering::Relaxed) - before < 256 << 20);
}

/// Checks that 60,000 functions with one huge CIE take linear time (R55).
#[test]
fn shared_entries_are_not_read_once_per_function() {
    // A CIE of 2 MiB of instructions, and 100,000 functions that each refer to it.
    let mut eh_frame = Vec::new();
    let cie = [b"\x01zR\0\x01\x78\x10\x01\x00\x0c\x07\x08\x90\x01".as_slice(), &vec![0x0a; 2 << 20]].concat();
    eh_frame.extend(((cie.len() + 4) as u32).to_le_bytes());
    eh_frame.extend([0; 4]);
    eh_frame.extend(&cie);
    for n in 0..60_000_u64 {
        let id = eh_frame.len() as u32 + 4;
        eh_frame.extend(28_u32.to_le_bytes());
        eh_frame.extend(id.to_le_bytes());
        eh_frame.extend((0x1000 + n * 16).to_le_bytes());
        eh_frame.extend(16_u64.to_le_bytes());
        eh_frame.extend([0, 0x0a, 0x0a, 0x0a, 0x0b, 0x0b, 0x0b, 0]);
    }
    let mut bytes = seeds().swap_remove(3);
    bytes.truncate(2048 + 3 * 64);
    let at = bytes.len();
    bytes.extend(&eh_frame);
    // The section of Go's table becomes this one.
    bytes[1501..1511].copy_from_slice(b".eh_frame\0");
    bytes[2048 + 64 + 24..][..8].copy_from_slice(&(at as u64).to_le_bytes());
    bytes[2048 + 64 + 32..][..8].copy_from_slice(&(eh_frame.len() as u64).to_le_bytes());
    bytes[72 + 8..72 + 16].copy_from_slice(&0x1000_u64.to_le_bytes());
    for field in [96, 104] {
        bytes[field..field + 8].copy_from_slice(&(1_u64 << 24).to_le_bytes());
    }
    let start = Instant::now();
    survive(&bytes);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
}

/// Checks the peak of memory on a real library (R55).
#[test]
fn memory_stays_within_a_few_times_the_section() {
    let path = Path::new("/usr/lib/x86_64-linux-gnu/libstdc++.so.6");
    assert!(path.exists(), "libstdc++ is missing: install libstdc++6");
    let file = fs::File::open(path).unwrap();
    let limits = TableLimits { time: None, ..TableLimits::default() };
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let built = build_file(&file, &BuildOptions::new("libstdc++", &limits)).unwrap();
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    // Other tests of this file run beside this one and count too: the bound is loose, and still far below the file.
    let bound = built.report.eh_frame_bytes as usize * 6 + (64 << 20);
    assert!(peak < bound, "{peak} bytes at the peak, for {} of .eh_frame", built.report.eh_frame_bytes);
}
