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
