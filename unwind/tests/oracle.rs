//! Compares tables with gimli's own evaluation of call frame information, address by address, on real files. Generated files
//! test the limits.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs;
use std::path::PathBuf;

use gannet_elf::Arch;
use gannet_unwind::build::{BuildFault, BuildOptions, build_bytes};
use gannet_unwind::format::{UnwindRule, cfa, deref_offset, loc};
use gannet_unwind::limits::{LimitExceeded, TableLimits, TableQuantity};
use gannet_unwind::table_builder::TableBuilder;
use gimli::{
    BaseAddresses, CfaRule, EhFrame, EndianSlice, LittleEndian, RegisterRule, UnwindContext, UnwindSection,
};
use object::{Object, ObjectSection};

fn real_files() -> Vec<PathBuf> {
    let wanted = [
        "/usr/lib/x86_64-linux-gnu/libc.so.6",
        "/usr/lib/aarch64-linux-gnu/libc.so.6",
        "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
        "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        "/usr/lib/x86_64-linux-gnu/libm.so.6",
        "/usr/bin/bash",
        "/usr/bin/perl",
        "/proc/self/exe",
    ];
    let found: Vec<PathBuf> = wanted.into_iter().map(PathBuf::from).filter(|path| path.exists()).collect();
    assert!(found.len() >= 4, "only {found:?} of {wanted:?} are here: install the usual programs");
    found
}

/// Returns gimli's row in the terms of a rule; `None` if a rule cannot express it.
fn expected(row: &gimli::UnwindTableRow<usize>, fp_above: &mut bool) -> Option<(u8, i32, u8, i32)> {
    let CfaRule::RegisterAndOffset { register, offset } = *row.cfa() else { return None };
    let (kind, offset) = match register.0 {
        7 => (cfa::SP, offset),
        6 => (cfa::FP, offset),
        other => (cfa::REGISTER + other as u8, offset),
    };
    let (mut fp_kind, mut fp_offset) = match row.register(gimli::Register(6)) {
        None | Some(RegisterRule::SameValue) => (loc::SAME, 0),
        Some(RegisterRule::Offset(offset)) => (loc::CFA, offset),
        Some(RegisterRule::Undefined) => (loc::UNDEFINED, 0),
        _ => return None,
    };
    if fp_kind == loc::CFA {
        let below = kind == cfa::SP && offset + fp_offset < 0;
        if below && *fp_above {
            (fp_kind, fp_offset) = (loc::SAME, 0);
        }
        *fp_above |= !below;
    }
    if row.register(gimli::Register(16)) == Some(RegisterRule::Undefined) {
        return Some((cfa::SP, 0, loc::SAME, 0));
    }
    // Rules cannot express a stack pointer of its own, as in setcontext.
    if !matches!(row.register(gimli::Register(7)), None | Some(RegisterRule::SameValue)) {
        return None;
    }
    Some((kind, offset as i32, fp_kind, fp_offset as i32))
}

/// Checks every row of every function of real files (R48).
#[test]
fn rules_agree_with_gimli_at_every_edge_of_every_function() {
    let limits = TableLimits { time: None, ..TableLimits::default() };
    for path in real_files() {
        let bytes = fs::read(&path).unwrap();
        let built = build_bytes(&bytes, &BuildOptions::new("oracle", &limits)).unwrap();
        let with_runs =
            build_bytes(&bytes, &BuildOptions { runs: true, ..BuildOptions::new("oracle", &limits) })
                .unwrap()
                .table;
        assert!(with_runs.rows() < built.table.rows());
        let file = object::File::parse(&*bytes).unwrap();
        if built.table.arch() != Arch::X86_64 {
            continue;
        }
        let section = file.section_by_name(".eh_frame").unwrap();
        let eh_frame = EhFrame::from(EndianSlice::new(section.data().unwrap(), LittleEndian));
        let bases = BaseAddresses::default().set_eh_frame(section.address());
        let mut context = UnwindContext::new();
        let mut entries = eh_frame.entries(&bases);
        let (mut compared, mut starts, mut ends) = (0, Vec::new(), Vec::new());
        while let Some(entry) = entries.next().unwrap() {
            let gimli::CieOrFde::Fde(partial) = entry else { continue };
            let fde = partial.parse(EhFrame::cie_from_offset).unwrap();
            if fde.len() == 0 || fde.initial_address() == 0 {
                continue;
            }
            starts.push(fde.initial_address());
            ends.push(fde.end_address());
            let mut rows = fde.rows(&eh_frame, &bases, &mut context).unwrap();
            let mut fp_above = false;
            while let Some(row) = rows.next_row().unwrap() {
                let (start, end) = (row.start_address(), row.end_address().min(fde.end_address()));
                let Some(expected) = expected(row, &mut fp_above).filter(|_| start < end) else { continue };
                for vaddr in [start, end - 1, start.midpoint(end)] {
                    let rule = built.table.lookup(vaddr).unwrap();
                    assert_eq!(
                        with_runs.lookup(vaddr),
                        Some(rule),
                        "with runs, {} at {vaddr:#x}",
                        path.display()
                    );
                    let found = (rule.cfa_kind, rule.cfa_offset, rule.fp_kind, rule.fp_offset);
                    assert_eq!(found, expected, "{} at {vaddr:#x}", path.display());
                    compared += 1;
                }
            }
        }
        starts.sort_unstable();
        // Behind each function, unless another begins there, only linkage tables and trampolines have rules.
        let mut gaps = 0;
        for end in ends {
            if starts.binary_search(&end).is_err() {
                let rule = built.table.lookup(end).unwrap_or(UnwindRule::NONE);
                let known = [
                    UnwindRule::NONE,
                    UnwindRule::OUTERMOST,
                    UnwindRule::X86_64_ENTRY,
                    UnwindRule::X86_64_SIGNAL,
                ];
                assert!(known.contains(&rule), "{} behind {end:#x}: {rule:?}", path.display());
                gaps += 1;
            }
        }
        println!("{}: {compared} addresses and {gaps} ends agree", path.display());
        assert!(compared > 1000);
    }
}

/// An ELF file with this `.eh_frame` and code from 0x1000000 on.
fn elf(machine: u16, eh_frame: &[u8], code_bytes: u64) -> Vec<u8> {
    let names = b"\0.eh_frame\0.shstrtab\0";
    let eh_frame_at = 64 + 2 * 56_u64;
    let names_at = eh_frame_at + eh_frame.len() as u64;
    let sections_at = (names_at + names.len() as u64).next_multiple_of(8);
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend_from_slice(&value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    half(&mut bytes, 3);
    half(&mut bytes, machine);
    word(&mut bytes, 1);
    for value in [0, 64, sections_at] {
        long(&mut bytes, value);
    }
    word(&mut bytes, 0);
    for value in [64, 56, 2, 64, 3, 2] {
        half(&mut bytes, value);
    }
    for (flags, vaddr, size) in [(4, 0, names_at), (5, 0x100_0000, code_bytes)] {
        word(&mut bytes, 1);
        word(&mut bytes, flags);
        for value in [0, vaddr, vaddr, names_at, size, 4096] {
            long(&mut bytes, value);
        }
    }
    bytes.extend_from_slice(eh_frame);
    bytes.extend_from_slice(names);
    bytes.resize(sections_at as usize, 0);
    let empty = [0; 64];
    bytes.extend_from_slice(&empty);
    for (name, kind, vaddr, at, size) in
        [(1, 1, eh_frame_at, eh_frame_at, eh_frame.len()), (11, 3, 0, names_at, names.len())]
    {
        word(&mut bytes, name);
        word(&mut bytes, kind);
        for value in [2, vaddr, at, size as u64] {
            long(&mut bytes, value);
        }
        word(&mut bytes, 0);
        word(&mut bytes, 0);
        for value in [8, 0] {
            long(&mut bytes, value);
        }
    }
    bytes
}

/// An entry of `.eh_frame`: length, then the rest, padded.
fn entry(id: u32, body: &[u8]) -> Vec<u8> {
    let length = (4 + body.len()).next_multiple_of(4);
    let mut bytes = (length as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(4 + length, 0);
    bytes
}

/// A CIE with absolute addresses, and FDEs for `(start, length, instructions)`.
fn eh_frame(cie: &[u8], functions: &[(u64, u64, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = entry(0, cie);
    for (start, length, instructions) in functions {
        let mut body = start.to_le_bytes().to_vec();
        body.extend_from_slice(&length.to_le_bytes());
        // Augmentation data, of no length.
        body.push(0);
        body.extend_from_slice(instructions);
        let id = bytes.len() as u32 + 4;
        bytes.extend(entry(id, &body));
    }
    bytes
}

/// Version 1, "zR", code factor 1, data factor -8, return address 16, absolute addresses; CFA = rsp + 8, ra at -8.
const CIE_X86_64: &[u8] = b"\x01zR\0\x01\x78\x10\x01\x00\x0c\x07\x08\x90\x01";
/// Code factor 4, return address x30; CFA = sp.
const CIE_AARCH64: &[u8] = b"\x01zR\0\x04\x78\x1e\x01\x00\x0c\x1f\x00";
const CODE: u64 = 0x100_0000;

fn table_of(machine: u16, cie: &[u8], functions: &[(u64, u64, Vec<u8>)]) -> gannet_unwind::build::BuiltTable {
    let bytes = elf(machine, &eh_frame(cie, functions), 1 << 30);
    build_bytes(&bytes, &BuildOptions::new("made", &TableLimits::default())).unwrap()
}

/// Checks that nothing is cut, and that each limit has its own error (R50).
#[test]
fn a_library_of_a_million_rows_has_all_of_them() {
    // 20,000 functions of 64 rows: one every 2 bytes, each another depth.
    let functions: Vec<_> = (0..20_000_u64)
        .map(|n| {
            let instructions = (0..64_u8).flat_map(|i| [0x0e, 8 + i % 8 * 8 + (n % 2) as u8, 0x42]).collect();
            (CODE + n * 128, 128, instructions)
        })
        .collect();
    let built = table_of(62, CIE_X86_64, &functions);
    assert!(built.table.rows() >= 1_280_000, "{} rows", built.table.rows());
    for (start, _, _) in functions.iter().step_by(97) {
        for i in 0..64 {
            let odd = (start - CODE) / 128 % 2;
            let rule = built.table.lookup(start + i * 2 + 1).unwrap();
            assert_eq!(u64::from(rule.cfa_offset as u32), 8 + i % 8 * 8 + odd);
        }
    }
    let bytes = elf(62, &eh_frame(CIE_X86_64, &functions), 1 << 30);
    let limits = TableLimits { rows: 1_000_000, ..TableLimits::default() };
    let error = build_bytes(&bytes, &BuildOptions::new("libhuge.so", &limits)).unwrap_err();
    assert!(
        error.to_string().starts_with("libhuge.so: 1000001 rows are over the limit of 1000000"),
        "{error}"
    );
    let limits = TableLimits { functions: 100, ..TableLimits::default() };
    let error = build_bytes(&bytes, &BuildOptions::new("libhuge.so", &limits)).unwrap_err();
    let expected = LimitExceeded::TooLarge { what: TableQuantity::Functions, limit: 100, found: 101 };
    assert_eq!(error.fault, BuildFault::LimitExceeded(expected));
    let limits = TableLimits { section_bytes: 1000, ..TableLimits::default() };
    let error = build_bytes(&bytes, &BuildOptions::new("libhuge.so", &limits)).unwrap_err();
    assert!(matches!(
        error.fault,
        BuildFault::LimitExceeded(LimitExceeded::TooLarge { what: TableQuantity::SectionBytes, .. })
    ));
    let limits = TableLimits { time: Some(std::time::Duration::ZERO), ..TableLimits::default() };
    let error = build_bytes(&bytes, &BuildOptions::new("libhuge.so", &limits)).unwrap_err();
    assert!(matches!(error.fault, BuildFault::LimitExceeded(LimitExceeded::TimedOut { .. })), "{error}");
    let cancel = std::sync::atomic::AtomicBool::new(true);
    let options = BuildOptions { cancel: Some(&cancel), ..BuildOptions::new("libhuge.so", &limits) };
    assert_eq!(
        build_bytes(&bytes, &options).unwrap_err().fault,
        BuildFault::LimitExceeded(LimitExceeded::Cancelled)
    );
}

/// Checks overlapping, repeated, dropped and unsorted entries (R48).
#[test]
fn entries_in_any_order_have_one_meaning() {
    let depth = |n: u8| vec![0x0e, n];
    let functions = [
        (CODE + 0x300, 0x100, depth(24)),
        (CODE + 0x100, 0x100, depth(16)),
        // Repeats the start of the one before, and is longer: it wins.
        (CODE + 0x100, 0x180, depth(32)),
        // Begins within it: from here on this entry holds.
        (CODE + 0x200, 0x20, depth(40)),
        (0, 0x100, depth(48)),
        (CODE + 0x500, 0, depth(56)),
        (0x5000, 0x10, depth(64)),
    ];
    let mut reversed = functions.clone();
    reversed.reverse();
    let built = table_of(62, CIE_X86_64, &functions);
    assert_eq!(table_of(62, CIE_X86_64, &reversed).table.lines(), {
        // Rules are numbered by address, so the order of entries leaves no trace.
        built.table.lines()
    });
    let at = |vaddr: u64| built.table.lookup(CODE + vaddr).map(|rule| rule.cfa_offset);
    assert_eq!([0xff, 0x100, 0x1ff, 0x200, 0x21f].map(at), [0, 32, 32, 40, 40].map(Some));
    assert_eq!([0x220, 0x2ff, 0x300, 0x3ff, 0x400].map(at), [0, 0, 24, 24, 0].map(Some));
    assert_eq!(at(0x500), Some(0));
    assert_eq!((built.report.oddities.dropped, built.report.oddities.overlapping), (3, 2));
}

/// Checks the expressions that compilers make, and the reasons for other ones (R48).
#[test]
fn expressions_of_compilers_become_rules() {
    // breg6 -8; deref and rbp at breg6 0: realigned. breg7 160; deref; plus_uconst 8: assembly of OpenSSL.
    let realigned = vec![0x0f, 3, 0x76, 0x78, 0x06, 0x10, 6, 2, 0x76, 0];
    let openssl = vec![0x0f, 6, 0x77, 0xa0, 0x01, 0x06, 0x23, 8];
    let plt = vec![0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22];
    let strange = vec![0x0f, 2, 0x31, 0x96];
    let undefined = vec![0x07, 16];
    let in_register = vec![0x0d, 10, 0x09, 16, 5];
    let far = vec![0x0c, 7, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f];
    let broken = vec![0x0b];
    let all = [realigned, openssl, plt, strange, undefined, in_register, far, broken];
    let functions: Vec<_> = (0..).zip(all).map(|(n, code)| (CODE + n * 16, 16, code)).collect();
    let built = table_of(62, CIE_X86_64, &functions);
    let at = |n: u64| built.table.lookup(CODE + n * 16).unwrap();
    let realigned = at(0);
    assert_eq!((realigned.cfa_kind, realigned.cfa_offset), (cfa::FP_DEREF, deref_offset(-8, 0).unwrap()));
    assert_eq!((realigned.fp_kind, realigned.fp_offset), (loc::FP, 0));
    assert_eq!((at(1).cfa_kind, at(1).cfa_offset), (cfa::SP_DEREF, deref_offset(160, 8).unwrap()));
    assert_eq!(at(2), UnwindRule::x86_64_plt(11));
    assert_eq!(at(3).unsupported_reason().unwrap().as_str(), "cfa_expression");
    assert!(at(4).is_outermost());
    assert_eq!((at(5).cfa_kind, at(5).ra_kind), (cfa::REGISTER + 10, loc::REGISTER + 5));
    assert_eq!(at(6).unsupported_reason().unwrap().as_str(), "offset_too_large");
    assert_eq!(at(7).unsupported_reason().unwrap().as_str(), "malformed_entry");
    assert_eq!(built.report.unsupported_rows, 3);
}

#[test]
fn aarch64_frames_links_and_signatures_become_rules() {
    // A leaf; paciasp; stp x29, x30, [sp, #-32]!; mov x29, sp; ...; ldp; autiasp; ret
    let framed = vec![
        0x41, 0x2d, 0x41, 0x0e, 32, 0x9d, 4, 0x9e, 3, 0x41, 0x0d, 29, 0x48, 0x0c, 31, 0, 0xdd, 0xde, 0x41,
        0x2d,
    ];
    let functions = [(CODE, 8, vec![]), (CODE + 16, 64, framed)];
    let built = table_of(183, CIE_AARCH64, &functions);
    assert_eq!(built.table.arch(), Arch::Aarch64);
    let at = |n: u64| built.table.lookup(CODE + n).unwrap();
    let leaf = UnwindRule { cfa_kind: cfa::SP, ra_kind: loc::REGISTER + 30, ..UnwindRule::NONE };
    assert_eq!(at(4), leaf);
    assert_eq!(at(8), UnwindRule::NONE);
    assert_eq!(at(16), leaf);
    assert_eq!(at(20), UnwindRule { flags: gannet_unwind::format::flags::RA_SIGNED, ..leaf });
    let saved = at(24);
    assert_eq!((saved.cfa_kind, saved.cfa_offset), (cfa::SP, 32));
    assert_eq!(
        (saved.fp_kind, saved.fp_offset, saved.ra_kind, saved.ra_offset),
        (loc::CFA, -32, loc::CFA, -24)
    );
    assert_eq!((at(28).cfa_kind, at(28).cfa_offset), (cfa::FP, 32));
    assert_eq!(at(60), UnwindRule { flags: gannet_unwind::format::flags::RA_SIGNED, ..leaf });
    assert_eq!(at(64), leaf);
}

/// Checks the trampoline of musl, which no frame information describes (R53).
#[test]
fn a_signal_trampoline_is_found_by_its_instructions() {
    let mut bytes = elf(62, &eh_frame(CIE_X86_64, &[(CODE, 16, vec![])]), 1 << 20);
    // The file's code is where its section names end.
    let code_at = bytes.len() as u64;
    bytes[64 + 56 + 8..64 + 56 + 16].copy_from_slice(&code_at.to_le_bytes());
    let mut code = vec![0x90; 4096];
    code[2000..2009].copy_from_slice(&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05]);
    bytes.extend(code);
    let size = 4096_u64.to_le_bytes();
    bytes[64 + 56 + 32..64 + 56 + 40].copy_from_slice(&size);
    let built = build_bytes(&bytes, &BuildOptions::new("musl", &TableLimits::default())).unwrap();
    assert_eq!(built.report.signal_trampolines, 1);
    let at = |n: u64| built.table.lookup(CODE + n).unwrap();
    assert_eq!(
        [1998, 1999, 2000, 2008, 2009].map(at).map(|rule| rule == UnwindRule::X86_64_SIGNAL),
        [false, true, true, true, false]
    );
}

/// Checks a file without a path (R53).
#[test]
fn the_vdso_of_this_machine_becomes_a_table() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
    let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
    let memory = fs::File::open("/proc/self/mem").unwrap();
    let mut bytes = vec![0; (end - start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, start).unwrap();
    let built = build_bytes(&bytes, &BuildOptions::new("[vdso]", &TableLimits::default())).unwrap();
    assert!(built.report.eh_frame_functions > 3, "{:?}", built.report);
    assert_eq!(built.segments.bias(start, 0, 4096), Some(start));
}

#[test]
fn a_builder_alone_makes_the_same_table_as_a_file() {
    let functions = [(CODE + 0x10, 0x20, vec![0x44, 0x0e, 16])];
    let built = table_of(62, CIE_X86_64, &functions);
    let limits = TableLimits::default();
    let mut builder = TableBuilder::new(Arch::X86_64, CODE + 0x10, CODE + 0x30, &limits).unwrap();
    builder.push(CODE + 0x10, UnwindRule::x86_64_sp(8)).unwrap();
    builder.push(CODE + 0x14, UnwindRule::x86_64_sp(16)).unwrap();
    assert_eq!(builder.finish().unwrap(), built.table);
}
