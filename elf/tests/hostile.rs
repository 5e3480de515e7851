//! Files that are made to harm: any bytes give an answer or an error, soon and in little memory.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs::{self, File},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use gannet_elf::{ContentId, Data, Elf, ElfLimits, Headers};
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

/// Reads everything that the crate can read of a file.
fn read_all<'d>(data: impl Into<Data<'d>>) {
    let data = data.into();
    let limits = ElfLimits { section_bytes: 1 << 20, ..ElfLimits::default() };
    let start = Instant::now();
    let _ = Headers::read(data).map(|headers| headers.build_ids.text());
    if let Ok(elf) = Elf::parse(data, &limits) {
        let _ = (ContentId::of(&elf), elf.debug_link(), elf.section_fault());
        for (_, section) in elf.sections() {
            if let Ok(bytes) = elf.section_data(section) {
                assert!(bytes.len() as u64 <= limits.section_bytes);
            }
        }
        for table in [&b".symtab"[..], b".dynsym"] {
            for symbol in elf.symbols(table).iter().flat_map(|table| table.iter().take(10_000)).flatten() {
                let _ = elf.symbols(table).and_then(|table| table.name(&symbol, 100));
            }
        }
        for (start, end) in elf.code() {
            let _ = elf.bytes_at(start, end - start);
        }
        for segment in elf.segments().as_slice() {
            let _ = elf.segments().bias(segment.vaddr, segment.file_offset & !0xfff, 0x1000);
            let _ = elf.segments().vaddr_of_offset(segment.file_offset);
        }
        if let Ok(Some(Ok(table))) = elf.go_table(1 << 20) {
            for function in table.functions(elf.segments()).map_while(Result::ok).flatten() {
                if let Some(record) = table.record(&function) {
                    let _ = (table.name(&record, 100), table.stack_depths(&record).count());
                }
            }
        }
    }
    assert!(start.elapsed() < Duration::from_secs(8), "took {:?}", start.elapsed());
}

fn seed(flags: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("small.c"), directory.path().join("small"));
    fs::write(&source, "int main(int c, char **v) { return c; }").unwrap();
    let output = Command::new("gcc").args(flags).arg("-o").args([&path, &source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read(path).unwrap()
}

#[test]
fn changed_files_are_read_or_refused() {
    let seeds = [seed(&["-g", "-gz=zlib"]), seed(&["-g", "-gz=zlib-gnu"]), seed(&["-shared", "-fPIC"])];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 1500,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let value = prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff])];
    // Headers are at both ends of a file.
    let change = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4_u8, value);
    let input = (
        0..seeds.len(),
        prop::collection::vec(change, 1..24),
        prop::option::weighted(0.1, any::<prop::sample::Index>()),
    );
    runner
        .run(&input, |(seed, changes, cut)| {
            let mut bytes = seeds[seed].clone();
            let length = bytes.len();
            for (near, anywhere, place, value) in changes {
                let at = match place {
                    0 => near.index(64 + 56 * 14),
                    1 | 2 => length - 1 - near.index(64 * 40),
                    _ => anywhere.index(length),
                };
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(length));
            }
            read_all(&bytes);
            Ok(())
        })
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn bytes_that_are_no_file_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096), magic: bool) {
        let mut bytes = bytes;
        if magic && bytes.len() > 20 {
            bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            bytes[18..20].copy_from_slice(&[62, 0]);
        }
        read_all(&bytes);
    }
}

/// Checks that no memory is taken on a claim: every section of a sparse file claims half a terabyte.
#[test]
fn a_sparse_file_of_a_terabyte_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse");
    let mut bytes = seed(&["-g"]);
    let headers = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let names = headers + usize::from(u16::from_le_bytes([bytes[62], bytes[63]])) * 64;
    for at in (headers..bytes.len()).step_by(64).filter(|at| *at != names) {
        bytes[at + 32..at + 40].copy_from_slice(&(1_u64 << 39).to_le_bytes());
    }
    fs::write(&path, &bytes).unwrap();
    let file = File::options().write(true).read(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    read_all(&file);
    // Other tests run beside this one; half a terabyte would stand out.
    assert!(PEAK.load(Ordering::Relaxed) - before < 256 << 20);
}

#[test]
fn a_file_that_is_cut_while_it_is_read_gives_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut");
    fs::write(&path, seed(&["-g"])).unwrap();
    let file = File::options().write(true).read(true).open(&path).unwrap();
    let elf = Elf::parse(&file, &ElfLimits::default()).unwrap();
    let symbols = elf.symbols(b".symtab").unwrap();
    file.set_len(100).unwrap();
    assert!(elf.section_data(elf.section(b".text").unwrap()).is_err());
    let read: Vec<_> = symbols.iter().collect();
    assert!(read.len() == 1 && read[0].is_err(), "{read:?}");
    assert_eq!(ContentId::of(&elf), None);
}
