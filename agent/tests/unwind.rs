//! Needs root, a kernel with BTF, and gcc: whole stacks of programs that have no frame pointers, by the program itself.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on shall say so at once")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn compile(dir: &Path, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let file = dir.join(format!("{name}.c"));
    std::fs::write(&file, source).unwrap();
    let program = dir.join(name);
    let status = Command::new("gcc")
        .args(["-O2", "-g", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-fno-inline"])
        .arg(&file)
        .arg("-o")
        .arg(&program)
        .args(flags)
        .status()
        .unwrap();
    assert!(status.success(), "gcc is needed: apt-get install gcc");
    program
}

/// Records a command at 199 Hz and gives its stacks, each with its samples: `name;name;… nanoseconds` lines, parsed.
fn record(dir: &Path, command: &[&str]) -> Vec<(Vec<String>, u64)> {
    let out = dir.join("out.folded");
    let output = Command::new(env!("CARGO_BIN_EXE_gannet-agent"))
        .args(["record", "--hz", "199", "--json", "-o"])
        .arg(&out)
        .arg("--")
        .args(command)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let ledger: serde_json::Value =
        serde_json::from_str(text.lines().find(|line| line.starts_with('{')).unwrap()).unwrap();
    let lost: u64 = ledger["lost"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(
        ledger["taken"].as_u64().unwrap(),
        ledger["delivered"].as_u64().unwrap() + lost,
        "every sample is accounted for: {ledger}"
    );
    std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(|line| {
            let (stack, value) = line.rsplit_once(' ').unwrap();
            (
                stack.split(';').map(str::to_owned).collect(),
                value.parse::<u64>().unwrap() * 199 / 1_000_000_000,
            )
        })
        .collect()
}

/// The part of the samples inside of `leaf` whose callers are exactly `chain`, outermost first.
fn share(stacks: &[(Vec<String>, u64)], leaf: &str, whole: impl Fn(&[String]) -> bool) -> (u64, u64) {
    let inside = stacks.iter().filter(|(stack, _)| stack.iter().any(|name| name == leaf));
    inside.fold((0, 0), |(good, all), (stack, n)| (good + if whole(stack) { *n } else { 0 }, all + n))
}

const DEEP: &str = r"
#include <stdlib.h>
#define N(a, b) long a(long x) { char pad[40]; pad[x & 31] = x; long r = b(x + 1); return r + pad[x & 31]; }
long leaf(long x) { volatile long s = 0; for (int i = 0; i < 3000; i++) s += i * x; return s; }
N(f9, leaf) N(f8, f9) N(f7, f8) N(f6, f7) N(f5, f6) N(f4, f5) N(f3, f4) N(f2, f3) N(f1, f2)
long recurse(long depth, long x) { if (!depth) return f1(x); long r = recurse(depth - 1, x + 1); return r + depth; }
int main(int c, char **v) {
	long sum = 0, depth = atol(v[1]), times = atol(v[2]);
	for (long i = 0; i < times; i++) sum += recurse(depth, i);
	return sum == 42;
}
";

#[test]
fn r48_every_function_down_to_start_is_there_without_frame_pointers() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "deep", DEEP, &[]);
    let stacks = record(dir.path(), &[program.to_str().unwrap(), "40", "300000"]);
    let (good, all) = share(&stacks, "leaf", |stack| {
        let place = |name: &str| stack.iter().position(|frame| frame == name);
        place("_start").is_some_and(|start| start <= 1)
            && place("main") < place("recurse")
            && stack.iter().filter(|frame| *frame == "recurse").count() == 41
            && (1..9).all(|i| place(&format!("f{i}")) < place(&format!("f{}", i + 1)))
            && place("f9") < place("leaf")
    });
    assert!(all >= 50, "only {all} samples: {stacks:?}");
    assert_eq!(good, all, "{stacks:?}");
}

#[test]
fn r51_five_hundred_frames_are_whole_and_more_are_marked_as_cut() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "deep", DEEP, &[]);
    let whole = record(dir.path(), &[program.to_str().unwrap(), "480", "400000"]);
    let (good, all) = share(&whole, "leaf", |stack| {
        stack.iter().any(|frame| frame == "_start")
            && stack.iter().filter(|frame| *frame == "recurse").count() == 481
    });
    // The first samples come raw, with at most 24 KiB of stack: what is not whole there says so.
    let (marked, _) = share(&whole, "leaf", |stack| {
        stack.iter().any(|frame| frame.starts_with("[truncated") || frame.starts_with("[broken"))
    });
    assert!(
        all >= 20 && good * 10 >= all * 9 && good + marked == all,
        "{good} whole, {marked} cut, of {all}"
    );
    let cut = record(dir.path(), &[program.to_str().unwrap(), "700", "400000"]);
    let (marked, all) =
        share(&cut, "leaf", |stack| stack.iter().any(|frame| frame.starts_with("[truncated")));
    assert!(all >= 10 && marked == all, "{marked} of {all}");
}

#[test]
fn r14_a_library_that_is_opened_late_is_named_and_walked() {
    let dir = tempfile::tempdir().unwrap();
    let library = compile(
        dir.path(),
        "late.so",
        "long spin(long n) { volatile long s = 0; for (long i = 0; i < n; i++) s += i; return s; }\n\
         long plugin(long n) { long r = spin(n); return r + 1; }\n",
        &["-shared", "-fPIC"],
    );
    let program = compile(
        dir.path(),
        "host",
        r#"
#include <dlfcn.h>
#include <stdio.h>
long early(long n) { volatile long s = 0; for (long i = 0; i < n; i++) s += i; return s; }
int main(int c, char **v) {
	early(1500000000);
	void *library = dlopen(v[1], RTLD_NOW);
	long (*plugin)(long) = library ? (long (*)(long))dlsym(library, "plugin") : 0;
	if (!plugin) { puts(dlerror()); return 1; }
	return plugin(1500000000) == 42;
}
"#,
        &["-ldl"],
    );
    let stacks = record(dir.path(), &[program.to_str().unwrap(), library.to_str().unwrap()]);
    let (early, _) = share(&stacks, "early", |_| true);
    assert!(early >= 20, "the program was sampled before: {stacks:?}");
    let (good, all) = share(&stacks, "spin", |stack| {
        let place = |name: &str| stack.iter().position(|frame| frame == name);
        place("_start").is_some() && place("main") < place("plugin") && place("plugin") < place("spin")
    });
    assert!(all >= 20 && good == all, "{good} of {all}: {stacks:?}");
}
