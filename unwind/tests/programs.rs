//! Programs that the tests build in the ways that software is shipped. Each must unwind from its innermost function through all
//! of its own functions to the outermost frame.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Files, Symbols, Tables, capture, compile, start, until};
use gannet_elf::{BuildId, DebugLink};
use gannet_unwind::build::{BuildOptions, BuiltTable, DebugFiles, build_file};
use gannet_unwind::limits::TableLimits;
use gannet_unwind::unwind::{TableSource, UnwindEnd, UnwoundStack};

/// Sixty functions deep: plain ones, some with alloca, some with aligned locals (which move the stack pointer to a
/// multiple of 32 and address through another register), all of them free to use rbp for anything.
fn deep_c() -> String {
    let mut source = String::from(
        "#include <alloca.h>\n#include <string.h>\nvolatile long sink, n = 3;\ntypedef double v4 __attribute__((vector_size(32)));\n\
         __attribute__((noinline)) long spin(long a) { for (;;) { for (int i = 0; i < 1000; i++) sink += a * i; \
         __asm__ volatile(\"xor %%ebp, %%ebp\" ::: \"rbp\", \"rbx\", \"r12\"); } return a; }\n",
    );
    for i in (0..60).rev() {
        let callee = if i == 59 { "spin".to_owned() } else { format!("deep{:02}", i + 1) };
        let body = match i % 5 {
            1 => format!(
                "char *p = alloca(n * {i} + 16); memset(p, a, n); sink += p[1]; long r = {callee}(a + 1) + p[0];"
            ),
            2 => format!(
                "v4 v[4]; for (int i = 0; i < 4; i++) v[i] = (v4){{a, n, i, 1}}; __asm__ volatile(\"\" :: \"m\"(v)); \
                 long r = {callee}(a + 1); __asm__ volatile(\"\" : \"+m\"(v)); r += v[n & 3][1];"
            ),
            3 => format!(
                "char big[{}]; __asm__ volatile(\"\" :: \"r\"(big) : \"memory\"); long r = {callee}(a + 2); r += big[n];",
                i * 200
            ),
            4 => format!(
                "__asm__ volatile(\"mov $1, %%ebp\" ::: \"rbp\", \"rbx\", \"r12\", \"r13\", \"r14\", \"r15\"); long r = {callee}(a) + n;"
            ),
            _ => format!("long r = {callee}(a * 3) * n;"),
        };
        writeln!(
            source,
            "__attribute__((noinline)) long deep{i:02}(long a) {{ {body} sink += r; return r + 1; }}"
        )
        .unwrap();
    }
    source.push_str("int main(void) { return deep00(1) & 1; }\n");
    source
}

fn deep_names() -> Vec<String> {
    let chain = (0..60).rev().map(|i| format!("deep{i:02}"));
    std::iter::once("spin".to_owned()).chain(chain).chain(["main".to_owned()]).collect()
}

/// Names of the program's own frames, innermost first; `?` for those of libraries.
fn names(unwound: &UnwoundStack, tables: &Tables, symbols: &Symbols, exe: &Path) -> Vec<String> {
    let exe = exe.to_str().unwrap();
    let name = |pc: u64, exact: bool| {
        let address = if exact { pc } else { pc - 1 };
        let own = tables.iter().any(|(m, _, _)| m.path == exe && m.start <= address && address < m.end);
        let (_, bias) = tables.find(address)?;
        // An unlikely part that the compiler moved away belongs to its function.
        own.then(|| Some(symbols.name(address.wrapping_sub(bias))?.trim_end_matches(".cold").to_owned()))
            .flatten()
    };
    unwound.frames.iter().map(|frame| name(frame.pc, frame.exact).unwrap_or_else(|| "?".to_owned())).collect()
}

/// Runs a program, stops it 20 times in its innermost function, and compares the names of its frames.
#[track_caller]
fn check(exe: &Path, symbols_of: &Path, expected: &[String], complete: bool) {
    let symbols = Symbols::of(symbols_of);
    let mut files = Files::default();
    let running = start(&mut Command::new(exe));
    let mut good = 0;
    let mut last = String::new();
    let leaf = &expected[0];
    for attempt in 0.. {
        let process = until(|| capture(running.0.id()));
        let tables = Tables::of(&process, &mut files);
        let stacks: Vec<UnwoundStack> = process.threads.iter().map(|thread| thread.unwind(&tables)).collect();
        let mut reached = false;
        for unwound in &stacks {
            let found = names(unwound, &tables, &symbols, exe);
            let own: Vec<&String> = found.iter().filter(|name| expected.contains(name)).collect();
            if own.first() != Some(&leaf) && !reached {
                last = format!("{found:?}, {:?}", unwound.end);
                continue;
            }
            reached = true;
            if found.contains(leaf) {
                assert_eq!(own, expected.iter().collect::<Vec<_>>(), "{found:#?} {:?}", unwound.end);
                assert!(!complete || unwound.end == UnwindEnd::Complete, "{found:?} {:?}", unwound.end);
                assert!(unwound.frames.iter().all(|frame| !frame.guessed), "{found:?}");
            }
        }
        good += u32::from(reached);
        if good == 20 {
            return;
        }
        assert!(attempt < 2000, "{} never was in {leaf}: {last}", exe.display());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn build_c(directory: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let source = directory.join("deep.c");
    fs::write(&source, deep_c()).unwrap();
    let exe = directory.join(name);
    compile(
        Command::new("gcc")
            .args(["-O2", "-fomit-frame-pointer", "-mavx2", "-w"])
            .args(flags)
            .arg(&source)
            .arg("-o")
            .arg(&exe),
    );
    exe
}

/// Returns the directory of the linkers that rustc brings.
fn lld_directory() -> PathBuf {
    let output = Command::new("rustc").args(["--print", "target-libdir"]).output().unwrap();
    let libdir = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    libdir.parent().unwrap().join("bin/gcc-ld")
}

/// Checks each way of linking C, and a program without section headers (R48, R53).
#[rstest::rstest]
#[case::pie(&[])]
#[case::fixed_address(&["-no-pie"])]
#[case::static_fixed_address(&["-static", "-no-pie"])]
#[case::static_pie(&["-static-pie"])]
#[case::no_separate_code(&["-Wl,-z,noseparate-code"])]
#[case::without_eh_frame_hdr(&["-Wl,--no-eh-frame-hdr"])]
#[case::without_section_headers(&["-Wl,--strip-all"])]
#[case::control_flow_protection(&["-fcf-protection=full", "-Wl,-z,ibtplt"])]
fn c_without_frame_pointers_is_complete(#[case] flags: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let exe = build_c(directory.path(), "deep", flags);
    let strip = flags.contains(&"-Wl,--strip-all");
    if strip {
        let named = build_c(directory.path(), "named", &[]);
        drop_section_headers(&exe);
        check(&exe, &named, &deep_names(), true);
    } else {
        check(&exe, &exe, &deep_names(), true);
    }
}

/// Removes the section headers, as some packers and firmware tools do.
fn drop_section_headers(exe: &Path) {
    let mut bytes = fs::read(exe).unwrap();
    bytes[40..48].fill(0);
    bytes[58..64].fill(0);
    fs::write(exe, bytes).unwrap();
}

/// Checks segments whose addresses differ from their offsets (R47).
#[test]
fn c_linked_by_lld_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let search = format!("-B{}", lld_directory().display());
    let exe = build_c(directory.path(), "deep", &[&search, "-fuse-ld=lld"]);
    let fixed = build_c(directory.path(), "fixed", &[&search, "-fuse-ld=lld", "-no-pie"]);
    check(&exe, &exe, &deep_names(), true);
    check(&fixed, &fixed, &deep_names(), true);
}

/// Checks calls between two executable segments (R47).
#[test]
fn code_in_several_segments_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let object = directory.path().join("deep.o");
    let source = directory.path().join("deep.c");
    fs::write(&source, deep_c()).unwrap();
    // Every other function goes to a section far away, with a writable section between, so that it gets a segment of
    // its own.
    let text = deep_c().replace("long deep1", "__attribute__((section(\"far\"))) long deep1");
    fs::write(&source, text).unwrap();
    compile(
        Command::new("gcc")
            .args(["-O2", "-fomit-frame-pointer", "-mavx2", "-w", "-c"])
            .arg(&source)
            .arg("-o")
            .arg(&object),
    );
    let exe = directory.path().join("deep");
    compile(
        Command::new("gcc")
            .arg(&object)
            .args(["-no-pie", "-Wl,--section-start=far=0x40000000"])
            .arg("-o")
            .arg(&exe),
    );
    let built =
        build_file(&File::open(&exe).unwrap(), &BuildOptions::new("deep", &TableLimits::default())).unwrap();
    assert_eq!(built.segments.as_slice().iter().filter(|segment| segment.executable).count(), 2);
    check(&exe, &exe, &deep_names(), true);
}

/// Checks `.debug_frame`, plain and compressed (R53).
#[rstest::rstest]
#[case::plain("-gz=none")]
#[case::compressed("-gz=zlib")]
#[case::compressed_the_old_way("-gz=zlib-gnu")]
fn debug_frame_serves_where_eh_frame_is_missing(#[case] compression: &str) {
    let directory = tempfile::tempdir().unwrap();
    let flags = ["-g", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", compression];
    let exe = build_c(directory.path(), "deep", &flags);
    let built =
        build_file(&File::open(&exe).unwrap(), &BuildOptions::new("deep", &TableLimits::default())).unwrap();
    assert!(built.report.debug_frame_functions >= 62, "{:?}", built.report);
    check(&exe, &exe, &deep_names(), true);
}

#[derive(Debug)]
struct Beside(PathBuf);

impl DebugFiles for Beside {
    fn open(&self, _: Option<&BuildId>, link: Option<&DebugLink>) -> Option<File> {
        let name = String::from_utf8(link?.name.clone()).ok()?;
        File::open(self.0.join(name)).ok()
    }
}

/// Checks that a debug file with another checksum is ignored (R53).
#[test]
fn only_the_own_debug_file_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let flags = ["-g", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-Wl,--build-id=none"];
    let exe = build_c(directory.path(), "deep", &flags);
    let debug = directory.path().join("deep.debug");
    compile(Command::new("objcopy").arg("--only-keep-debug").arg(&exe).arg(&debug));
    compile(
        Command::new("objcopy")
            .arg("--strip-debug")
            .arg(format!("--add-gnu-debuglink={}", debug.display()))
            .arg(&exe),
    );
    let limits = TableLimits::default();
    let beside = Beside(directory.path().to_owned());
    let build = |options: BuildOptions<'_>| -> BuiltTable {
        build_file(&File::open(&exe).unwrap(), &options).unwrap()
    };
    assert_eq!(build(BuildOptions::new("deep", &limits)).report.debug_frame_functions, 0);
    let with = BuildOptions { debug_files: Some(&beside), ..BuildOptions::new("deep", &limits) };
    assert!(build(with).report.debug_frame_functions >= 62);
    // Another byte changes the checksum.
    let mut bytes = fs::read(&debug).unwrap();
    bytes.push(0);
    fs::write(&debug, bytes).unwrap();
    assert_eq!(build(with).report.debug_frame_functions, 0);
}

/// Checks unwinding from a signal handler to the interrupted function (R48).
#[test]
fn a_signal_handler_on_its_own_stack_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("signal.c");
    let text = "#include <signal.h>\n#include <stdlib.h>\nvolatile long sink; volatile int *null;\n\
        __attribute__((noinline)) void spin(int s) { for (;;) { sink += s; } }\n\
        __attribute__((noinline)) void handler(int s, siginfo_t *i, void *c) { spin(s); sink++; }\n\
        __attribute__((noinline)) int faults(int a) { return *null + a; }\n\
        __attribute__((noinline)) int caller(int a) { char b[100]; __asm__ volatile(\"\" :: \"r\"(b) : \"memory\"); return faults(a) + b[3]; }\n\
        int main(void) { stack_t s = { .ss_sp = malloc(1 << 16), .ss_size = 1 << 16 }; sigaltstack(&s, 0);\n\
        struct sigaction a = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK }; sigaction(SIGSEGV, &a, 0);\n\
        return caller(2) + 1; }\n";
    fs::write(&source, text).unwrap();
    let expected = ["spin", "handler", "faults", "caller", "main"].map(str::to_owned);
    for flags in [&["-O2"][..], &["-O2", "-static"]] {
        let exe = directory.path().join("signal");
        compile(
            Command::new("gcc")
                .args(flags)
                .args(["-fomit-frame-pointer", "-w"])
                .arg(&source)
                .arg("-o")
                .arg(&exe),
        );
        // The copied stack is that of the handler. To unwind further, the test copies the main stack as well.
        check_alternate(&exe, &expected);
    }
}

/// Checks as [`check`] does, with a copy of each of the two stacks: the alternate one is on the heap.
#[track_caller]
fn check_alternate(exe: &Path, expected: &[String]) {
    use gannet_elf::Arch;
    use gannet_unwind::unwind::{ThreadSnapshot, unwind_stack};
    use std::os::unix::fs::FileExt;
    let symbols = Symbols::of(exe);
    let mut files = Files::default();
    let running = start(&mut Command::new(exe));
    let unwound = until(|| {
        let process = capture(running.0.id())?;
        let tables = Tables::of(&process, &mut files);
        let thread = &process.threads[0];
        // Unwind the handler's stack first; it ends at the first address in the main stack.
        let first = thread.unwind(&tables);
        if !names(&first, &tables, &symbols, exe).contains(&expected[0]) {
            return None;
        }
        let UnwindEnd::StackMissing { address } = first.end else { return None };
        // One copy that spans both stacks would have terabytes.
        let memory = File::open(format!("/proc/{}/mem", running.0.id())).ok()?;
        let mut upper = vec![0; 64 << 10];
        let read = memory.read_at(&mut upper, address & !7).ok()?;
        upper.truncate(read);
        let last = first.frames.last()?;
        // Continue at the interrupted frame, whose stack pointer is in the signal frame.
        let ucontext_rsp = thread.registers[7];
        let stack = &thread.stack;
        let find = |value: u64| stack.chunks_exact(8).position(|word| word == value.to_le_bytes());
        let rip_at = find(last.pc)?;
        let rsp = u64::from_le_bytes(stack[rip_at * 8 - 8..rip_at * 8].try_into().unwrap());
        let rbp = u64::from_le_bytes(stack[rip_at * 8 - 48..rip_at * 8 - 40].try_into().unwrap());
        assert!(rsp > 0 && ucontext_rsp > 0);
        let mut registers = [0; 16];
        (registers[7], registers[6]) = (rsp, rbp);
        let skip = (rsp - (address & !7)).min(upper.len() as u64) as usize;
        let snapshot = ThreadSnapshot {
            arch: Arch::X86_64,
            pc: last.pc,
            registers: &registers,
            stack_start: rsp,
            stack: &upper[skip..],
            unread: &[],
        };
        let second = unwind_stack(&snapshot, &tables, 100);
        let mut all = names(&first, &tables, &symbols, exe);
        all.pop();
        all.extend(names(&second, &tables, &symbols, exe));
        Some((all, second.end, last.exact))
    });
    let own: Vec<&String> = unwound.0.iter().filter(|name| expected.contains(name)).collect();
    assert_eq!(own, expected.iter().collect::<Vec<_>>(), "{:?}", unwound.0);
    assert_eq!(unwound.1, UnwindEnd::Complete);
    assert!(unwound.2, "the address is that of the interrupted instruction");
}

/// Checks C++ (R48).
#[test]
fn cpp_with_exceptions_and_virtual_calls_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("virtual.cc");
    let text = "#include <stdexcept>\n#include <vector>\n#include <string>\nvolatile long sink;\n\
        extern \"C\" __attribute__((noinline)) long spin(long a) { for (;;) sink += a; return a; }\n\
        struct Base { virtual long run(long n, Base *next) = 0; virtual ~Base() {} };\n\
        extern \"C\" long odd(long, Base*, Base*); extern \"C\" long even(long, Base*, Base*);\n\
        struct Odd : Base { long run(long n, Base *next) override { std::string s(n * 7, 'x'); return odd(n, next, this) + s.size(); } };\n\
        struct Even : Base { long run(long n, Base *next) override { std::vector<long> v(n + 1); v[0] = even(n, next, this); return v[0]; } };\n\
        extern \"C\" __attribute__((noinline)) long odd(long n, Base *next, Base *self) { try { return next->run(n - 1, self) + 1; } catch (std::runtime_error &e) { return 3; } }\n\
        extern \"C\" __attribute__((noinline)) long even(long n, Base *next, Base *self) { if (n < 3) { try { throw std::runtime_error(\"x\"); } catch (std::exception &e) { return spin(n) + 1; } } return next->run(n - 1, self) + 2; }\n\
        int main() { Odd o; Even e; return odd(9, &e, &o) & 1; }\n";
    fs::write(&source, text).unwrap();
    let exe = directory.path().join("virtual");
    compile(Command::new("g++").args(["-O2", "-fomit-frame-pointer", "-w"]).arg(&source).arg("-o").arg(&exe));
    let expected: Vec<String> = ["spin", "even", "odd", "even", "odd", "even", "odd", "even", "odd", "main"]
        .map(str::to_owned)
        .into();
    check(&exe, &exe, &expected, true);
}

/// Checks Rust, in all threads (R47, R48).
#[test]
fn rust_with_threads_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("threads.rs");
    let text = "use std::hint::black_box;\n\
        #[no_mangle] #[inline(never)] pub fn spin(n: u64) -> u64 { let mut a = n; loop { a = black_box(a.wrapping_mul(3)); } }\n\
        #[no_mangle] #[inline(never)] pub fn second(n: u64) -> u64 { let v = black_box(vec![n; 10]); spin(v[3]) + v[2] }\n\
        #[no_mangle] #[inline(never)] pub fn first(n: u64) -> u64 { let s = black_box(format!(\"{n}\")); second(s.len() as u64) + s.len() as u64 }\n\
        fn main() { let t: Vec<_> = (0..3).map(|n| std::thread::spawn(move || first(n))).collect(); first(7); for t in t { t.join().unwrap(); } }\n";
    fs::write(&source, text).unwrap();
    let expected = ["spin", "second", "first"].map(str::to_owned);
    // lld is rustc's own choice here; bfd is what other distributions use.
    for (name, flags) in [
        ("lld", &["-Clink-arg=-Wl,--icf=all"][..]),
        ("bfd", &["-Clinker-features=-lld", "-Zunstable-options"]),
    ] {
        let exe = directory.path().join(name);
        let mut command = Command::new("rustc");
        if name == "lld" {
            command
                .arg(format!("-Clink-arg=-B{}", lld_directory().display()))
                .arg("-Clink-arg=-fuse-ld=lld")
                .args(flags);
        } else {
            command.arg("-Clink-arg=-fuse-ld=bfd").env("RUSTC_BOOTSTRAP", "1").args(flags);
        }
        compile(command.args(["-O", "--edition=2021"]).arg(&source).arg("-o").arg(&exe));
        check(&exe, &exe, &expected, true);
    }
}

/// Checks stripped Go programs (R53).
#[test]
fn go_is_complete_by_its_own_function_table() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("main.go");
    let text = "package main\nimport \"strings\"\nvar sink int\n\
        //go:noinline\nfunc spin(n int) int { for { sink += n } }\n\
        //go:noinline\nfunc second(n int) int { var b [3000]byte; b[n] = 1; r := spin(n); return r + int(b[n+1]) }\n\
        //go:noinline\nfunc first(s string) int { r := second(len(s)); return r + strings.Count(s, \"a\") }\n\
        func main() { go first(\"abc\"); first(\"abcd\") }\n";
    fs::write(&source, text).unwrap();
    let expected = ["main.spin", "main.second", "main.first"].map(str::to_owned);
    let named = directory.path().join("named");
    let build = |exe: &Path, flags: &[&str]| {
        let mut command = Command::new("go");
        command.env("GO111MODULE", "off").env("CGO_ENABLED", "0").current_dir(directory.path());
        compile(command.arg("build").args(flags).arg("-o").arg(exe).arg(&source));
    };
    build(&named, &[]);
    check(&named, &named, &expected, true);
    let stripped = directory.path().join("stripped");
    build(&stripped, &["-ldflags=-s -w"]);
    let built =
        build_file(&File::open(&stripped).unwrap(), &BuildOptions::new("go", &TableLimits::default()))
            .unwrap();
    assert!(
        built.report.go_functions > 1000 && built.report.debug_frame_functions == 0,
        "{:?}",
        built.report
    );
    check(&stripped, &named, &expected, true);
    let pie = directory.path().join("pie");
    build(&pie, &["-buildmode=pie"]);
    check(&pie, &pie, &expected, true);
}
