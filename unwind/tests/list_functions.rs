//! Rows of interpreters' loops in real files.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails at once")]

use std::fs::File;

use gannet_unwind::{
    build::{BuildOptions, build_file},
    format::flags,
    limits::TableLimits,
};

/// Checks that the loop of the system's CPython is marked, its cold part too, and no other function.
#[test]
fn the_loop_of_an_interpreter_is_marked() {
    let path = "/usr/bin/python3.11";
    let file = File::open(path).unwrap();
    let limits = TableLimits::default();
    let elf = gannet_elf::Elf::parse(&file, &limits.elf()).unwrap();
    let symbols = elf.symbols(b".dynsym").unwrap();
    let of = |wanted: &str| {
        symbols
            .iter()
            .map_while(Result::ok)
            .find(|symbol| symbols.name(symbol, 100).is_some_and(|name| name == wanted.as_bytes()))
            .unwrap()
    };
    let name = "_PyEval_EvalFrameDefault";
    let build = |names: &[&str]| {
        let options = BuildOptions { list_functions: names, runs: true, ..BuildOptions::new(path, &limits) };
        build_file(&file, &options).unwrap().table
    };
    let marked = |table: &gannet_unwind::table::UnwindTable, address| {
        table.lookup(address).unwrap().flags & flags::LIST != 0
    };
    let table = build(&[name]);
    let hot = of(name);
    for address in [hot.address, hot.address + 100, hot.address + hot.size - 1] {
        assert!(marked(&table, address), "{address:#x}");
    }
    let other = of("PyGILState_GetThisThreadState");
    assert!(!marked(&table, other.address));
    let code: u64 = elf.code().iter().map(|(start, end)| end - start).sum();
    let in_loop = elf
        .code()
        .into_iter()
        .flat_map(|(start, end)| (start..end).step_by(8))
        .filter(|address| table.lookup(*address).is_some_and(|rule| rule.flags & flags::LIST != 0))
        .count() as u64
        * 8;
    assert!(in_loop > hot.size && in_loop < hot.size * 2, "{in_loop} of {code}, {} hot", hot.size);
    let plain = build(&[]);
    assert!(plain.rules().iter().all(|rule| rule.flags & flags::LIST == 0));
}

/// Checks that the loop of a stripped Ruby is found by the table of its instructions. Needs `libruby3.1` of Debian 12, which has
/// no name for it but one for its caller.
#[test]
fn a_loop_without_a_name_is_found_by_its_table() {
    let path = "/usr/lib/x86_64-linux-gnu/libruby-3.1.so.3.1";
    let file = File::open(path).unwrap();
    let limits = TableLimits::default();
    let build = |tables: &[&str]| {
        let options = BuildOptions { list_tables: tables, runs: true, ..BuildOptions::new(path, &limits) };
        build_file(&file, &options).unwrap().table
    };
    let elf = gannet_elf::Elf::parse(&file, &limits.elf()).unwrap();
    let table = build(&["ruby_run_node"]);
    let is_marked = |address: u64| table.lookup(address).is_some_and(|rule| rule.flags & flags::LIST != 0);
    let section = elf.section(b".data.rel.ro").unwrap();
    let entries = elf.section(b".rela.dyn").map(|section| elf.section_data(section).unwrap()).unwrap();
    let in_loop = entries
        .chunks_exact(24)
        .map(|entry| [0, 16].map(|at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap())))
        .filter(|[place, _]| (section.vaddr..section.vaddr + section.bytes).contains(place))
        .filter(|[_, target]| is_marked(*target))
        .count();
    // Each instruction, and the same with tracing.
    assert!((180..260).contains(&in_loop), "{in_loop} addresses lead there");
    let code = elf.code().into_iter().flat_map(|(start, end)| start..end);
    let bytes = code.filter(|address| is_marked(*address)).count();
    assert!((10_000..30_000).contains(&bytes), "{bytes} bytes of code");
    for tables in [&[][..], &["no_such_function"][..]] {
        assert!(build(tables).rules().iter().all(|rule| rule.flags & flags::LIST == 0));
    }
}
