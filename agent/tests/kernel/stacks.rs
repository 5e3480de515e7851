//! Complete stacks of programs without frame pointers, recorded by the agent's program. Needs root, a kernel with BTF, and gcc.

use crate::common::{
    MUSL_WITHOUT_TABLES, Running, in_order, is_marked, program, record, record_for, times, with_holes,
};

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

/// Checks 41 levels of recursion and a chain of calls, down to `_start` (R48).
#[test]
fn every_function_is_in_the_stack_without_frame_pointers() {
    let deep = program("deep", DEEP, &["-fno-inline"]);
    let recording = record(199, &["--", deep.to_str().unwrap(), "40", "600000"]);
    let chain = ["_start", "main", "recurse", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "leaf"];
    let complete = |stack: &[String]| in_order(stack, &chain) && times(stack, "recurse") == 41;
    let (good, all) = recording.share("leaf", complete);
    assert!(all >= 50, "only {all} samples: {recording:?}");
    assert_eq!(good, all, "{:?}", recording.odd_ones("leaf", complete));
}

/// Checks that 500 frames are complete, and that more are marked as cut (R51).
#[test]
fn deep_stacks_are_complete_up_to_the_limit_and_marked() {
    let deep = program("deep", DEEP, &["-fno-inline"]);
    let recording = record(199, &["--", deep.to_str().unwrap(), "480", "400000"]);
    let complete = |stack: &[String]| in_order(stack, &["_start", "main"]) && times(stack, "recurse") == 481;
    let (good, all) = recording.share("leaf", complete);
    // The first samples come raw: 24 KiB of stack are 250 frames of this program, and a stack that is cut has its mark.
    let cut =
        |stack: &[String]| stack.iter().any(|frame| frame == "[truncated]") && times(stack, "recurse") > 150;
    let (marked, _) = recording.share("leaf", cut);
    let odd = recording.odd_ones("leaf", |stack| complete(stack) || cut(stack));
    assert!(
        all >= 20 && good * 10 >= all * 9 && good + marked == all,
        "{good} complete, {marked} cut, of {all}: {odd:?}"
    );

    let recording = record(199, &["--", deep.to_str().unwrap(), "700", "400000"]);
    let (marked, all) = recording.share("leaf", |stack| stack.iter().any(|frame| frame == "[truncated]"));
    assert!(all >= 10 && marked == all, "{marked} of {all}");
    assert!(
        recording.stacks.iter().any(|(stack, _)| times(stack, "recurse") > 480),
        "cut at 512 frames, not before"
    );
}

/// Checks that a stack ends with a mark, and not as if it were complete, where BPF programs cannot read it: by rules of the
/// compiler, and by rules of the program's instructions.
#[test]
fn a_page_of_the_stack_that_cannot_be_read_ends_it_with_a_mark() {
    for (name, flags) in [("hole-rules", &[][..]), ("hole-musl", &MUSL_WITHOUT_TABLES[..])] {
        let running = with_holes(name, flags);
        let pids = running.each_ref().map(|running| running.0.id().to_string());
        let [protected, dropped, kept] = pids.each_ref().map(String::as_str);
        let recording = record_for(2, 199, &["--pid", protected, "--pid", dropped, "--pid", kept]);
        let ends_at_page = |stack: &[String]| {
            stack[1] == "[unreadable stack]"
                && in_order(stack, &["recurse", "leaf", "spin"])
                && (20..60).contains(&times(stack, "recurse"))
        };
        let complete = |stack: &[String]| {
            !is_marked(stack) && in_order(stack, &["main", "leaf", "spin"]) && times(stack, "recurse") == 81
        };
        let ((marked, all), (whole, _)) =
            (recording.share("spin", ends_at_page), recording.share("spin", complete));
        let odd = recording.odd_ones("spin", |stack| ends_at_page(stack) || complete(stack));
        assert!(marked >= 50 && whole >= 25 && marked + whole == all, "{name}: {all}: {odd:?}");
    }
}

/// Checks a library that the program opens after its first samples (R14).
#[test]
fn a_library_that_is_opened_late_is_named_and_unwound() {
    let library = program(
        "late.so",
        "long spin(long n) { volatile long s = 0; for (long i = 0; i < n; i++) s += i; return s; }\n\
         long plugin(long n) { long r = spin(n); return r + 1; }\n",
        &["-fno-inline", "-shared", "-fPIC"],
    );
    let host = program(
        "late-host",
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
        &["-fno-inline", "-ldl"],
    );
    let recording = record(199, &["--", host.to_str().unwrap(), library.to_str().unwrap()]);
    let (early, _) = recording.share("early", |_| true);
    assert!(early >= 20, "the program was sampled before: {recording:?}");
    let complete =
        |stack: &[String]| in_order(stack, &["_start", "main", "plugin", "spin"]) && !is_marked(stack);
    let (good, all) = recording.share("spin", complete);
    assert!(all >= 20 && good == all, "{good} of {all}: {:?}", recording.odd_ones("spin", complete));
}

/// Checks CPython as distributions ship it (R53).
#[test]
fn the_frames_of_an_interpreter_are_complete() {
    let running = Running::start(
        std::process::Command::new("python3")
            .args(["-c", "while True: sorted(range(1000), key=lambda n: -n)"]),
    );
    // The first program of the path may be a script that looks for the interpreter.
    std::thread::sleep(std::time::Duration::from_secs(2));
    let recording = record_for(4, 499, &["--pid", &running.0.id().to_string()]);
    let complete = |stack: &[String]| !is_marked(stack) && stack.iter().any(|name| name.starts_with("Py_"));
    let (good, all) = recording
        .stacks
        .iter()
        .fold((0, 0), |(good, all), (stack, n)| (good + if complete(stack) { *n } else { 0 }, all + n));
    let odd: Vec<_> = recording.stacks.iter().filter(|(stack, _)| !complete(stack)).take(3).collect();
    assert!(all >= 300 && (all - good) * 1000 <= all, "{good} of {all}: {odd:?}");
}
