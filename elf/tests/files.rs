//! Real files against `object`, an independent reader; and files with the rare forms that the ELF format allows.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use gannet_elf::{Arch, Binding, Elf, ElfError, ElfLimits, ElfQuantity, GoLines, Headers, TooLarge};
use object::{Object, ObjectSection, ObjectSymbol};
use rstest::rstest;

fn compile(path: &Path, flags: &[&str]) {
    let source = path.with_extension("c");
    fs::write(&source, "int f(int a) { return a + 1; } int main(int c, char **v) { return f(c); }").unwrap();
    let output = Command::new("gcc").args(flags).arg("-o").args([path, &source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn tool(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn real_files() -> Vec<PathBuf> {
    let wanted = [
        "/usr/lib/x86_64-linux-gnu/libc.so.6",
        "/usr/lib/aarch64-linux-gnu/libc.so.6",
        "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
        "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        "/usr/bin/bash",
        "/usr/bin/perl",
        "/proc/self/exe",
    ];
    let found: Vec<PathBuf> = wanted.into_iter().map(PathBuf::from).filter(|path| path.exists()).collect();
    assert!(found.len() >= 4, "only {found:?} of {wanted:?} are here: install the usual programs");
    found
}

/// Checks everything that both readers report about a file.
#[track_caller]
fn compare(path: &Path) {
    let bytes = fs::read(path).unwrap();
    let theirs = object::File::parse(&*bytes).unwrap();
    let file = File::open(path).unwrap();
    for ours in [
        Elf::parse(&bytes, &ElfLimits::default()).unwrap(),
        Elf::parse(&file, &ElfLimits::default()).unwrap(),
    ] {
        assert_eq!(ours.build_id().map(gannet_elf::BuildId::as_bytes), theirs.build_id().unwrap());
        assert_eq!(ours.arch() == Arch::X86_64, theirs.architecture() == object::Architecture::X86_64);
        assert_eq!(ours.entry(), theirs.entry());
        let link = ours.debug_link().map(|link| (link.name, link.crc));
        assert_eq!(link, theirs.gnu_debuglink().unwrap().map(|(name, crc)| (name.to_vec(), crc)));
        let mut sections = 0;
        for section in theirs.sections() {
            let found = ours.section(section.name_bytes().unwrap()).unwrap();
            assert_eq!(found.vaddr, section.address());
            let data = ours.section_data(found).unwrap();
            if found.is_stored() {
                assert_eq!(&*data, &*section.uncompressed_data().unwrap(), "{}", section.name().unwrap());
            }
            sections += 1;
        }
        assert!(sections > 5);
        for (name, symbols) in [
            (&b".symtab"[..], theirs.symbols().collect::<Vec<_>>()),
            (b".dynsym", theirs.dynamic_symbols().collect()),
        ] {
            let Some(table) = ours.symbols(name) else {
                assert!(symbols.is_empty());
                continue;
            };
            // The other reader leaves the first, empty symbol out.
            let found: Vec<_> = table.iter().skip(1).map(Result::unwrap).collect();
            assert_eq!(found.len(), symbols.len());
            for (ours, theirs) in found.iter().zip(symbols) {
                assert_eq!((ours.address, ours.size), (theirs.address(), theirs.size()));
                assert_eq!(ours.is_defined, !theirs.is_undefined());
                assert_eq!(ours.binding == Binding::Weak, theirs.is_weak());
                let name = table.name(ours, 1 << 16).unwrap_or_default();
                assert_eq!(name, theirs.name_bytes().unwrap_or_default());
            }
        }
    }
}

#[test]
fn real_files_read_as_an_independent_reader_reads_them() {
    for path in real_files() {
        compare(&path);
    }
}

#[rstest]
#[case::debug_info(&["-g"])]
#[case::compressed(&["-g", "-gz=zlib"])]
#[case::compressed_before_section_flags(&["-g", "-gz=zlib-gnu"])]
#[case::without_build_id(&["-Wl,--build-id=none"])]
#[case::short_build_id(&["-Wl,--build-id=0x0123456789abcdef"])]
#[case::stripped(&["-s"])]
#[case::static_program(&["-static"])]
fn every_way_of_linking_reads_as_an_independent_reader_reads_it(#[case] flags: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    compile(&path, flags);
    compare(&path);
}

#[test]
fn debug_files_and_their_links_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let (path, debug) = (directory.path().join("program"), directory.path().join("program.debug"));
    compile(&path, &["-g"]);
    tool(Command::new("objcopy").arg("--only-keep-debug").args([&path, &debug]));
    tool(
        Command::new("objcopy")
            .arg("--strip-all")
            .arg(format!("--add-gnu-debuglink={}", debug.display()))
            .arg(&path),
    );
    compare(&path);
    compare(&debug);
    let (program, debug) = (File::open(&path).unwrap(), File::open(&debug).unwrap());
    let parsed = Elf::parse(&program, &ElfLimits::default()).unwrap();
    assert_eq!(parsed.debug_link().unwrap().crc, gannet_elf::checksum(&debug).unwrap());
    let debug = Elf::parse(&debug, &ElfLimits::default()).unwrap();
    assert_eq!(debug.build_id(), parsed.build_id());
    let text = debug.section(b".text").unwrap();
    assert!(!text.is_stored() && debug.section_data(text).unwrap().is_empty());
    assert!(debug.stored_section(b".text").is_none());
}

/// Checks that a program has its build id where only a section holds it, in both ways to read one.
#[test]
fn a_build_id_in_a_section_alone_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    compile(&path, &["-Wl,--build-id=0xabcdef01"]);
    let mut bytes = fs::read(&path).unwrap();
    // The program headers are at 64, 56 bytes each; type 4 is PT_NOTE.
    let count = usize::from(bytes[56]);
    for header in bytes[64..64 + count * 56].chunks_exact_mut(56).filter(|header| header[0] == 4) {
        header[0] = 0;
    }
    assert_eq!(Elf::parse(&bytes, &ElfLimits::default()).unwrap().build_ids().text(), "abcdef01");
    assert_eq!(Headers::read(&bytes).unwrap().build_ids.text(), "abcdef01");
}

/// A file of section headers alone, all of them empty but the last, which holds the names.
fn many_sections(count: u64, names_index: u64) -> Vec<u8> {
    let names = b"\0.names\0";
    let mut bytes = vec![0; 64 + 8];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[18] = 62;
    bytes[64..].copy_from_slice(names);
    bytes[40..48].copy_from_slice(&72_u64.to_le_bytes());
    bytes[58] = 64;
    let put = |bytes: &mut Vec<u8>, at: usize, value: u64, size: usize| {
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    };
    bytes.resize(72 + count as usize * 64, 0);
    if count < 0xff00 {
        put(&mut bytes, 60, count, 2);
    } else {
        put(&mut bytes, 72 + 32, count, 8);
    }
    if names_index < 0xff00 {
        put(&mut bytes, 62, names_index, 2);
    } else {
        put(&mut bytes, 62, 0xffff, 2);
        put(&mut bytes, 72 + 40, names_index, 4);
    }
    let header = 72 + names_index as usize * 64;
    put(&mut bytes, header, 1, 4);
    put(&mut bytes, header + 4, 3, 4);
    put(&mut bytes, header + 24, 64, 8);
    put(&mut bytes, header + 32, names.len() as u64, 8);
    bytes
}

/// Checks that the count of sections and the index of their names are read each on its own: either may not fit 16 bits.
#[rstest]
#[case::few(3, 2)]
#[case::many_and_names_first(0xff10, 1)]
#[case::many_and_names_last(0xff10, 0xff0f)]
fn numbers_that_do_not_fit_the_file_header_are_found(#[case] count: u64, #[case] names_index: u64) {
    let bytes = many_sections(count, names_index);
    let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
    assert_eq!(elf.section_fault(), None);
    assert_eq!(elf.section(b".names").unwrap().bytes, 8);
    let limits = ElfLimits { sections: 2, ..ElfLimits::default() };
    let error = Elf::parse(&bytes, &limits).unwrap_err();
    assert_eq!(error, ElfError::TooLarge(TooLarge { what: ElfQuantity::Sections, limit: 2, found: count }));
}

/// A file of program headers alone: the kernel runs programs with up to 1170 of them.
fn many_segments(count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 64 + usize::from(count) * 56];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[18] = 62;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56..58].copy_from_slice(&count.to_le_bytes());
    for (index, header) in bytes[64..].chunks_exact_mut(56).enumerate() {
        header[0] = 1;
        header[4] = 5;
        header[16..24].copy_from_slice(&(index as u64 * 0x1000).to_le_bytes());
        header[32] = 16;
        header[40] = 16;
    }
    bytes
}

#[test]
fn every_program_that_the_kernel_runs_is_read() {
    let bytes = many_segments(1170);
    assert_eq!(Headers::read(&bytes).unwrap().segments.as_slice().len(), 1170);
    for count in [1171, 0xffff] {
        let error = Headers::read(&many_segments(count)).unwrap_err();
        assert!(error.to_string().contains("program headers are over the limit of 1170"), "{error}");
    }
}

#[test]
fn damaged_section_headers_make_a_file_without_sections() {
    let good = many_sections(3, 2);
    let reach_out = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    for bytes in [reach_out(46, 1), reach_out(58, 40), reach_out(60, 200), reach_out(72 + 2 * 64 + 35, 1)] {
        let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
        assert!(elf.section_fault().is_some() && elf.sections().count() == 0);
    }
}

#[test]
fn files_of_another_kind_are_refused_with_their_kind() {
    let good = many_sections(3, 2);
    let error = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Elf::parse(&bytes, &ElfLimits::default()).unwrap_err().to_string()
    };
    assert_eq!(error(0, 0), "not an ELF file");
    assert!(error(4, 1).starts_with("32-bit ELF file: "));
    assert!(error(5, 2).starts_with("big-endian ELF file: "));
    assert!(error(18, 243).starts_with("ELF file for machine 243: "));
    assert!(Elf::parse(&good[..40], &ElfLimits::default()).is_err());
    assert_eq!(Elf::parse(&b"#!/bin/sh"[..], &ElfLimits::default()).unwrap_err(), ElfError::NotElf);
}

/// Checks that a compressed symbol table gives no names: read as a plain one it would give wrong ones.
#[test]
fn a_compressed_symbol_table_is_never_read_as_a_plain_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    compile(&path, &[]);
    let mut bytes = fs::read(&path).unwrap();
    let headers = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
    assert!(Elf::parse(&bytes, &ElfLimits::default()).unwrap().symbols(b".symtab").is_some());
    for header in bytes[headers..].chunks_exact_mut(64).filter(|header| header[4] == 2) {
        // SHF_COMPRESSED
        header[9] |= 8;
    }
    assert!(Elf::parse(&bytes, &ElfLimits::default()).unwrap().symbols(b".symtab").is_none());
}

/// A Go program that calls C, if wanted, so that the linker of C links it.
fn go_program(calls_c: bool) -> &'static str {
    if calls_c {
        "package main\n// static int one(void) { return 1; }\nimport \"C\"\nimport \"fmt\"\nfunc main() { fmt.Println(C.one()) }\n"
    } else {
        "package main\nimport \"fmt\"\nfunc main() { fmt.Println(1) }\n"
    }
}

fn build_go(path: &Path, calls_c: bool, flags: &[&str]) {
    let source = path.with_extension("go");
    fs::write(&source, go_program(calls_c)).unwrap();
    let cache = std::env::temp_dir().join("gannet-go-cache");
    let mut go = Command::new("go");
    go.arg("build")
        .args(flags)
        .arg("-o")
        .args([path, &source])
        .env("GOCACHE", cache)
        .env("GO111MODULE", "off");
    tool(&mut go);
}

/// Removes what Go 1.26 no longer writes: the start of the code, and the relocation that puts it there.
fn forget_text_start(bytes: &mut [u8]) {
    let text = symbol_address(bytes, b"runtime.text");
    let table = symbol_address(bytes, b"runtime.pclntab");
    let at = find(bytes, &[0xf0, 0xff, 0xff, 0xff, 0, 0, 1, 8])
        .or(find(bytes, &[0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8]));
    let header = &mut bytes[at.unwrap()..][24..32];
    if *header == text.to_le_bytes() {
        header.fill(0);
    }
    while let Some(at) = find(bytes, &[&(table + 24).to_le_bytes()[..], &8u64.to_le_bytes()].concat()) {
        bytes[at..at + 8].fill(0xff);
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn symbol_address(bytes: &[u8], name: &[u8]) -> u64 {
    let elf = Elf::parse(bytes, &ElfLimits::default()).unwrap();
    let symbols = elf.symbols(b".symtab").unwrap();
    let found =
        symbols.iter().map(Result::unwrap).find(|symbol| symbols.name(symbol, 100).as_deref() == Some(name));
    found.unwrap().address
}

/// Checks Go's function table against the symbol table of the same program, also without the start of the code in the
/// header, as Go writes it since 1.26.
#[rstest]
#[case::fixed_address(false, &[])]
#[case::position_independent(false, &["-buildmode=pie"])]
#[case::linked_with_c(true, &["-ldflags=-linkmode=external"])]
#[case::linked_with_c_position_independent(true, &["-buildmode=pie", "-ldflags=-linkmode=external"])]
fn the_function_table_of_go_agrees_with_its_symbols(
    #[case] calls_c: bool,
    #[case] flags: &[&str],
    #[values(false, true)] is_new: bool,
) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    build_go(&path, calls_c, flags);
    let mut bytes = fs::read(&path).unwrap();
    if is_new {
        forget_text_start(&mut bytes);
    }
    let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
    assert!(elf.build_ids().go.as_ref().is_some_and(|id| id.contains('/')), "{:?}", elf.build_ids());
    let table = elf.go_table(u64::MAX).unwrap().unwrap().unwrap();
    let functions: BTreeMap<u64, Vec<u8>> = table
        .functions(elf.segments())
        .map(|function| function.unwrap().unwrap())
        .map(|function| (function.start, table.name(&table.record(&function).unwrap(), 1 << 16).to_vec()))
        .collect();
    let symbols = elf.symbols(b".symtab").unwrap();
    let (mut same, mut other) = (0, Vec::new());
    for symbol in symbols.iter().map(Result::unwrap).filter(|symbol| symbol.is_function && symbol.is_defined)
    {
        let name = symbols.name(&symbol, 1 << 16).unwrap();
        // The symbol says by which convention an assembly function is called; the table does not.
        let plain = name.strip_suffix(b".abi0").unwrap_or(&name);
        match functions.get(&symbol.address) {
            Some(found) if found == plain => same += 1,
            Some(found) => other.push(format!("{} {}", found.escape_ascii(), name.escape_ascii())),
            None => {}
        }
    }
    assert!(same > 1000 && other.len() * 100 < same, "{same} names agree, not {other:?}");
}

/// Checks that names are given up where the start of the code is nowhere: guessed, they would be those of other functions.
#[test]
fn a_table_of_go_without_the_start_of_its_code_gives_no_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    build_go(&path, true, &["-ldflags=-linkmode=external"]);
    let mut bytes = fs::read(&path).unwrap();
    forget_text_start(&mut bytes);
    let table = symbol_address(&bytes, b"runtime.pclntab").to_le_bytes();
    while let Some(at) = find(&bytes, &table) {
        bytes[at..at + 8].fill(0);
    }
    let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
    let fault = elf.go_table(u64::MAX).unwrap().unwrap().unwrap_err();
    assert!(fault.0.contains("start of the Go code"), "{fault}");
}

/// A program that prints its own stack of inlined calls: where it is in `main.outer`, then function, file and line of each.
const INLINED: &str = r#"package main

import (
	"fmt"
	"runtime"
)

//go:noinline
func leaf() {
	pcs := make([]uintptr, 16)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	text := ""
	for {
		frame, more := frames.Next()
		text += fmt.Sprintf("%s %s %d\n", frame.Function, frame.File, frame.Line)
		if !more || frame.Func != nil {
			fmt.Printf("%d\n%s", pcs[0]-1-frame.Entry, text)
			return
		}
	}
}

func inner() {
	leaf()
}

func middle() {

	inner()
}

//go:noinline
func outer() {
	middle()
}

func main() { outer() }
"#;

/// Checks the functions and lines at an address against those that the program itself prints, with Go's own reader.
/// `GANNET_TEST_GO` is the compiler to test; one before 1.20 writes no such lines.
#[rstest]
#[case::fixed_address("", &[])]
#[case::stripped_position_independent("", &["-buildmode=pie", "-ldflags=-s -w"])]
#[case::linked_with_c_position_independent("import \"C\"", &["-buildmode=pie", "-ldflags=-linkmode=external -s -w"])]
fn inlined_calls_of_go_have_the_lines_that_go_prints(#[case] more: &str, #[case] flags: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let (path, source) = (directory.path().join("program"), directory.path().join("program.go"));
    fs::write(&source, INLINED.replacen("\n\n", &format!("\n{more}\n"), 1)).unwrap();
    let mut go = Command::new(std::env::var_os("GANNET_TEST_GO").unwrap_or_else(|| "go".into()));
    go.env("GOCACHE", std::env::temp_dir().join("gannet-go-cache")).env("GO111MODULE", "off");
    tool(go.arg("build").args(flags).arg("-o").args([&path, &source]));
    let printed = String::from_utf8(Command::new(&path).output().unwrap().stdout).unwrap();
    let (offset, expected) = printed.split_once('\n').unwrap();
    assert_eq!(expected.lines().count(), 3, "{printed}");

    let file = fs::File::open(&path).unwrap();
    let elf = Elf::parse(&file, &ElfLimits::default()).unwrap();
    let Some(lines) = GoLines::of(&elf, u64::MAX).unwrap() else {
        let header = elf.go_table(u64::MAX).unwrap().unwrap();
        let version = elf.section_data(elf.section(b".go.buildinfo").unwrap()).unwrap();
        assert!(header.is_ok() && find(&version, b"go1.1").is_some(), "a new Go without lines");
        return;
    };
    let lines = lines.unwrap();
    let table = elf.go_table(u64::MAX).unwrap().unwrap().unwrap();
    let functions = table.functions(elf.segments()).map(|function| function.unwrap().unwrap());
    let outer = functions
        .into_iter()
        .find(|function| table.name(&table.record(function).unwrap(), 100) == b"main.outer")
        .unwrap();
    let found = lines.at(outer.start + offset.parse::<u64>().unwrap(), 1 << 16).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let shown = found.iter().map(|at| format!("{} {} {}\n", text(&at.name), text(&at.file), at.line));
    assert_eq!(shown.collect::<String>(), expected);
    for line in &found {
        let begins = format!("func {}(", text(&line.name).strip_prefix("main.").unwrap());
        let at = INLINED.lines().position(|line| line.starts_with(&begins)).unwrap() as u32 + 1;
        assert_eq!(line.start_line, at, "{}", text(&line.name));
    }
    assert!(lines.at(outer.start - 1, 100).is_none_or(|other| other != found));
    assert_eq!(lines.at(u64::MAX, 100), None);
}

/// Checks that functions are found by name as a search over all symbols finds them, wherever the name stands in the table.
#[test]
fn functions_are_found_by_their_names() {
    let bytes = fs::read("/proc/self/exe").unwrap();
    let file = fs::File::open("/proc/self/exe").unwrap();
    let elf = Elf::parse(&file, &ElfLimits::default()).unwrap();
    let in_memory = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
    let symbols = elf.symbols(b".symtab").unwrap();
    let mut by_name: BTreeMap<Vec<u8>, BTreeSet<u64>> = BTreeMap::new();
    for symbol in symbols.iter().map(Result::unwrap).filter(|symbol| symbol.is_function && symbol.is_defined)
    {
        let name = symbols.name(&symbol, 1 << 16).unwrap();
        by_name.entry(name).or_default().insert(symbol.address);
    }
    let names: Vec<&str> = by_name.keys().filter_map(|name| std::str::from_utf8(name).ok()).collect();
    assert!(names.len() > 1000, "{}", names.len());
    for name in names.iter().step_by(names.len() / 50) {
        let expected = &by_name[name.as_bytes()];
        assert_eq!(&symbols.functions_named(&[name]), expected, "{name}");
        assert_eq!(&in_memory.symbols(b".symtab").unwrap().functions_named(&["no", name]), expected);
        let [no, address] = symbols.addresses_of(&["no", name]);
        assert!(no.is_none() && expected.contains(&address.unwrap()), "{name}");
        // A part of a name is no name.
        assert!(symbols.functions_named(&[&format!("{name}:")]).is_empty());
    }
}
