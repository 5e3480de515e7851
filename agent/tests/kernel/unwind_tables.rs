//! Large tables, and tables made from instructions. They are the same on each kernel, and take minutes on an emulated machine. Needs
//! root, a kernel with BTF, gcc and musl-tools.

use std::process::Command;

use crate::common::{MUSL, Running, in_order, is_marked, program, record_for, too_many_odd};

/// A program that is in the C library most of the time: in functions that make calls, save registers and have local data.
const IN_MUSL: &str = r#"
#include <stdio.h>
#include <string.h>
static char from[1 << 16], to[1 << 16];
__attribute__((noinline)) long writes(long n) {
	char text[64];
	snprintf(text, sizeof(text), "%ld %f", n, 1.5 * n);
	memcpy(to, from, sizeof(to));
	return n + text[0] + to[n];
}
__attribute__((noinline)) long again(long n) { return n ? again(n - 1) + 1 : writes(7); }
int main() { for (;;) again(20); }
"#;

/// Checks code without frame information: its instructions give the rules (R53).
#[test]
fn inside_musl_stacks_are_complete() {
    for (name, flags) in [("in-musl", &MUSL[..]), ("in-musl-static", &[&MUSL[..], &["-static"]].concat())] {
        let running = Running::start(&mut Command::new(program(name, IN_MUSL, flags)));
        let pid = running.0.id().to_string();
        let recording = record_for(6, 199, &["--pid", &pid]);
        let (mut whole, mut all, mut inside, mut odd) = (0, 0, 0, Vec::new());
        for (stack, count) in &recording.stacks {
            all += count;
            let rooted = stack[1] == "_start" && in_order(stack, &["_start", "main"]);
            if rooted && !is_marked(stack) {
                whole += count;
            } else {
                odd.push(stack);
            }
            inside +=
                if stack.iter().skip_while(|frame| *frame != "writes").count() > 1 { *count } else { 0 };
        }
        assert!(inside * 10 >= all * 8 && all >= 400, "{name}: {inside} of {all}");
        assert!(!too_many_odd(all - whole, all), "{name}: {whole} of {all}: {odd:?}");
    }
}

/// A third of a million functions of three rows each; neighbouring functions differ.
fn million() -> String {
    String::from(
        "volatile long sink;\n\
         __attribute__((noinline)) long million_spin(long n) { for (long i = 0; i < n; i++) sink += i; return sink; }\n\
         __asm__(\".text\\n.altmacro\\n.set n, 0\\n.rept 340000\\n.cfi_startproc\\nsub $((n % 50) * 16 + 24), %rsp\\n\"\n\
         \".cfi_adjust_cfa_offset (n % 50) * 16 + 24\\nnop\\nadd $((n % 50) * 16 + 24), %rsp\\n\"\n\
         \".cfi_adjust_cfa_offset -((n % 50) * 16 + 24)\\nret\\n.cfi_endproc\\n.set n, n + 1\\n.endr\\n\"\n\
         \".globl million_last\\n.type million_last, @function\\nmillion_last:\\n.cfi_startproc\\nsub $88, %rsp\\n.cfi_adjust_cfa_offset 88\\n\"\n\
         \"call million_spin@PLT\\nadd $88, %rsp\\n.cfi_adjust_cfa_offset -88\\nret\\n.cfi_endproc\\n.size million_last, .-million_last\\n\");\n",
    )
}

/// Checks a table of the largest size in the kernel (R50).
#[test]
fn a_library_of_a_million_rows_unwinds() {
    let library = program("million.so", &million(), &["-g0", "-shared", "-fPIC"]);
    let host = program(
        "million-host",
        "#include <dlfcn.h>\nvolatile long sink;\nint main(int c, char **v) { void *l = dlopen(v[1], RTLD_NOW);\n\
         long (*f)(long) = l ? (long (*)(long))dlsym(l, \"million_last\") : 0; if (!f) return 1;\n\
         for (;;) { long r = f(1000000); sink += r; } }\n",
        &["-ldl"],
    );
    let running = Running::start(Command::new(host).arg(library));
    let recording = record_for(4, 199, &["--pid", &running.0.id().to_string()]);
    let whole = |stack: &[String]| in_order(stack, &["_start", "main", "million_last", "million_spin"]);
    let (good, all) = recording.share("million_spin", whole);
    assert!(all >= 50 && good == all, "{good} of {all}: {:?}", recording.odd_ones("million_spin", whole));
}
