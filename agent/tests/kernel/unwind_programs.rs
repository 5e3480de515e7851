//! Programs that are built in the ways that software is shipped. The agent records them side by side, and every stack must hold
//! every function of its program. Needs root, a kernel with BTF, and compilers for C, C++, Rust and Go.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use crate::common::{
    Language, MUSL, Recording, Running, in_order, is_marked, program, program_in, record_for, slower,
    too_many_odd,
};

/// A running program, its innermost function, and the functions that its stacks must hold from the root on.
struct Case {
    /// Its name.
    what: &'static str,
    running: Running,
    leaf: &'static str,
    chain: Vec<String>,
    /// It runs on a stack of its own.
    elsewhere: bool,
}

impl Case {
    fn of(what: &'static str, mut command: Command, leaf: &'static str, chain: &[&str]) -> Self {
        let running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::null()));
        let chain = chain.iter().map(|name| (*name).to_owned()).collect();
        Self { what, running, leaf, chain, elsewhere: what == "signal" }
    }

    fn is_whole(&self, stack: &[String]) -> bool {
        let chain: Vec<&str> = self.chain.iter().map(String::as_str).collect();
        in_order(stack, &chain) && !is_marked(stack)
    }

    /// Returns the fault of its stacks, if they have one.
    fn fault(&self, recording: &Recording, least: u64) -> Option<String> {
        let mine = recording
            .stacks
            .iter()
            .filter(|(stack, _)| stack.iter().any(|name| name == self.leaf))
            // Other programs have the functions of this one, too.
            .filter(|(stack, _)| self.leaf != "spin" || stack[0] == self.what);
        let (good, all) = mine.clone().fold((0, 0), |(good, all), (stack, n)| {
            (good + if self.is_whole(stack) { *n } else { 0 }, all + n)
        });
        // The first samples come with a copy of the thread's current stack: below a handler on another stack they have the
        // mark of a stack that is cut.
        let first =
            |stack: &[String]| self.elsewhere && stack[1] == "[truncated]" && stack.contains(&self.chain[4]);
        let cut: u64 = mine.clone().filter(|(stack, _)| first(stack)).map(|(_, n)| n).sum();
        let good = if cut * 4 < all { good + cut } else { good };
        let odd: Vec<_> = mine.filter(|(stack, _)| !self.is_whole(stack) && !first(stack)).take(3).collect();
        (all < least || too_many_odd(all - good, all))
            .then(|| format!("{}: {good} of {all}: {odd:?}", self.what))
    }
}

#[track_caller]
fn check(cases: &[Case], seconds: u32, least: u64) {
    let pids: Vec<String> = cases.iter().map(|case| case.running.0.id().to_string()).collect();
    // A dozen programs that spin leave the agent little of a small machine, and their first samples come with their stacks of
    // up to 24 KiB: the default ring has room for 85 of them.
    let mut arguments = vec!["--ring-bytes", "16MiB", "--pid"];
    arguments.extend(pids.iter().map(String::as_str));
    let recording = record_for(seconds, 299, &arguments);
    assert_eq!(recording.lost.values().sum::<u64>(), 0, "{:?}", recording.lost);
    let faults: Vec<String> = cases.iter().filter_map(|case| case.fault(&recording, least)).collect();
    assert!(faults.is_empty(), "{}\n{}", faults.join("\n"), recording.log);
}

/// See there: sixty functions, a0 to l4.
const DEEP: &str = include_str!("../../benches/deep.c");

fn deep_chain() -> Vec<String> {
    let letters = ["a", "b", "c", "d", "e", "f", "g", "h", "i_", "j", "k", "l"];
    let functions = letters.iter().flat_map(|letter| (0..5).map(move |n| format!("{letter}{n}")));
    ["_start", "main"].map(str::to_owned).into_iter().chain(functions).chain(["spin".to_owned()]).collect()
}

fn deep(what: &'static str, flags: &[&str]) -> Case {
    let file = program(what, DEEP, flags);
    let mut case = Case::of(what, Command::new(file), "spin", &[]);
    case.chain = deep_chain();
    case
}

/// A program that never touches pages in the middle of its stack, so that they do not exist.
const HOLES: &str = "volatile long sink;\n\
    __attribute__((noinline)) long hole_spin(long n) { for (;;) sink += n; }\n\
    __attribute__((noinline)) long hole(long n) { char room[18000]; __asm__ volatile(\"\" :: \"r\"(room) : \"memory\"); return hole_spin(n) + room[n]; }\n\
    int main(void) { return hole(1) + 1; }\n";

/// Checks each way of linking C (R48, R53).
#[test]
fn c_without_frame_pointers_is_complete() {
    let cases = [
        deep("deep-pie", &[]),
        deep("deep-fixed", &["-no-pie"]),
        deep("deep-static", &["-static", "-no-pie"]),
        deep("deep-static-pie", &["-static-pie"]),
        deep("deep-no-header", &["-Wl,--no-eh-frame-hdr"]),
        // A C library without frame information.
        deep("deep-musl", &MUSL),
        deep("deep-musl-fixed", &[&MUSL[..], &["-static"]].concat()),
        Case::of(
            "holes",
            Command::new(program("holes", HOLES, &["-O1", "-fno-stack-clash-protection"])),
            "hole_spin",
            &["_start", "main", "hole", "hole_spin"],
        ),
    ];
    check(&cases, 8, 60);
}

/// A program that calls functions of the C library for the first time, again and again: it restores the linkage table.
const LAZY: &str = "#define ALL F(abs) F(labs) F(llabs) F(ffs) F(ffsl) F(ffsll) F(toupper) F(tolower) F(htonl) F(htons) \\\n\
    F(ntohl) F(ntohs) F(isalnum) F(isalpha) F(iscntrl) F(isdigit) F(isgraph) F(islower) F(isprint) F(ispunct) F(isspace) \\\n\
    F(isupper) F(isxdigit) F(isblank)\n\
    #define F(name) long name(long);\nALL\n\
    #undef F\n#define F(name) r += name(7);\n\
    enum { ENTRIES = 24 };\nextern void *volatile _GLOBAL_OFFSET_TABLE_[];\nstatic void *first[ENTRIES];\n\
    __attribute__((noinline)) long lazy_calls(long r) { ALL return r; }\n\
    int main(void) { for (int i = 0; i < ENTRIES; i++) first[i] = _GLOBAL_OFFSET_TABLE_[3 + i];\n\
    for (;;) { for (int i = 0; i < ENTRIES; i++) _GLOBAL_OFFSET_TABLE_[3 + i] = first[i]; lazy_calls(1); } }\n";

/// Checks the dynamic linker, which aligns its stack during a look-up and finds its frame by rbx (R48, R53).
#[test]
fn stacks_through_the_dynamic_linker_are_complete() {
    let lazy = program("lazy", LAZY, &["-no-pie", "-fplt", "-fno-builtin", "-Wl,-z,lazy,-z,norelro"]);
    let running = Running::start(&mut Command::new(lazy));
    let pid = running.0.id().to_string();
    let recording = record_for(6, 199, &["--pid", &pid]);
    let all: u64 = recording.stacks.iter().map(|(_, count)| count).sum();
    let whole = |stack: &[String]| in_order(stack, &["_start", "main"]) && !is_marked(stack);
    let (good, _) = recording.share("main", whole);
    let odd: Vec<_> = recording.stacks.iter().filter(|(stack, _)| !whole(stack)).take(3).collect();
    // The caller's callee is the linker.
    let below = |stack: &[String]| stack.iter().skip_while(|name| *name != "lazy_calls").count() > 1;
    let (inside, _) = recording.share("lazy_calls", below);
    assert!(
        all >= 400 && inside * 2 > all,
        "{inside} inside the linker, of {all}: {odd:?} {:?}",
        recording.lost
    );
    assert!(!too_many_odd(all - good, all), "{good} of {all}: {odd:?}");
}

const VIRTUAL: &str = r#"
#include <dlfcn.h>
#include <cstdlib>
#include <ctime>
#include <stdexcept>
#include <string>
#include <vector>
volatile long sink;
extern "C" __attribute__((noinline)) long cpp_spin(long a) { for (int i = 0; i < 20000; i++) sink += a * i; return a; }
struct Base { virtual long run(long n, Base *next) = 0; virtual ~Base() {} };
extern "C" long cpp_odd(long, Base *, Base *);
extern "C" long cpp_even(long, Base *, Base *);
struct Odd : Base { long run(long n, Base *next) override { std::string s(n * 7, 'x'); return cpp_odd(n, next, this) + s.size(); } };
struct Even : Base { long run(long n, Base *next) override { std::vector<long> v(n + 1); v[0] = cpp_even(n, next, this); return v[0]; } };
extern "C" __attribute__((noinline)) long cpp_odd(long n, Base *next, Base *self) { try { return next->run(n - 1, self) + 1; } catch (std::runtime_error &e) { return 3; } }
extern "C" __attribute__((noinline)) long cpp_even(long n, Base *next, Base *self) {
	if (n < 3) { try { throw std::runtime_error("x"); } catch (std::exception &e) { return cpp_spin(n) + 1; } }
	return next->run(n - 1, self) + 2;
}
int main(int count, char **words) {
	Odd o; Even e;
	void *library = 0;
	for (time_t begun = time(0);;) {
		sink += cpp_odd(9, &e, &o);
		if (!library && time(0) - begun > atoi(words[2])) {
			library = dlopen(words[1], RTLD_NOW);
			if (!library) return 1;
		}
		if (library) { auto f = (long (*)(long))dlsym(library, "plugin_outer"); sink += f(300); }
	}
}
"#;

const PLUGIN: &str = "volatile long sink;\n\
    __attribute__((noinline)) long plugin_spin(long n) { for (long i = 0; i < n * 100; i++) sink += i; return sink; }\n\
    __attribute__((noinline)) long plugin_outer(long n) { long r = plugin_spin(n); return r + 1; }\n";

const THREADS: &str = "use std::hint::black_box;\n\
    #[no_mangle] #[inline(never)] pub fn PREFIX_spin(n: u64) -> u64 { let mut a = n; loop { a = black_box(a.wrapping_mul(3)); } }\n\
    #[no_mangle] #[inline(never)] pub fn PREFIX_second(n: u64) -> u64 { let v = black_box(vec![n; 10]); PREFIX_spin(v[3]) + v[2] }\n\
    #[no_mangle] #[inline(never)] pub fn PREFIX_first(n: u64) -> u64 { let s = black_box(format!(\"{n}\")); PREFIX_second(s.len() as u64) + s.len() as u64 }\n\
    fn main() { let t: Vec<_> = (0..3).map(|n| std::thread::spawn(move || PREFIX_first(n))).collect(); for t in t { t.join().unwrap(); } }\n";

const GO: &str = "package main\n\nimport \"strings\"\n\nvar sink int\n\n\
    //go:noinline\nfunc spin(n int) int {\n\tfor {\n\t\tsink += n\n\t}\n}\n\n\
    //go:noinline\nfunc second(n int) int {\n\tvar b [3000]byte\n\tb[n] = 1\n\tr := spin(n)\n\treturn r + int(b[n+1])\n}\n\n\
    //go:noinline\nfunc first(s string) int { r := second(len(s)); return r + strings.Count(s, \"a\") }\n\n\
    func main() { go first(\"abc\"); first(\"abcd\") }\n";

/// Checks C++, Rust and Go, and a library that is opened during the recording (R47, R48, R53).
#[test]
fn other_languages_are_complete() {
    let plugin = program("plugin.so", PLUGIN, &["-shared", "-fPIC"]);
    let cpp = program_in(Language::Cpp, "cpp-virtual", VIRTUAL, &["-ldl", "-rdynamic"]);
    let mut with_plugin = Command::new(cpp);
    // In the middle of the recording.
    with_plugin.arg(&plugin).arg((3 * slower()).to_string());
    let rust = |name: &'static str, prefix: &str, flags: &[&str]| {
        Command::new(program_in(Language::Rust, name, &THREADS.replace("PREFIX", prefix), flags))
    };
    let go = Command::new(program_in(Language::Go, "go-plain", GO, &[]));
    let cpp_case = Case::of(
        "cpp-virtual",
        with_plugin,
        "cpp_spin",
        &[
            "_start", "main", "cpp_odd", "cpp_even", "cpp_odd", "cpp_even", "cpp_odd", "cpp_even", "cpp_odd",
            "cpp_even", "cpp_spin",
        ],
    );
    let cases = [
        cpp_case,
        // The linker of the compiler, and that of most distributions.
        Case::of(
            "rust-own",
            rust("rust-own", "own", &[]),
            "own_spin",
            &["clone3", "own_first", "own_second", "own_spin"],
        ),
        Case::of(
            "rust-bfd",
            rust("rust-bfd", "bfd", &["-Clink-arg=-fuse-ld=bfd"]),
            "bfd_spin",
            &["clone3", "bfd_first", "bfd_second", "bfd_spin"],
        ),
        Case::of("go-plain", go, "main.spin", &["runtime.goexit", "main.first", "main.second", "main.spin"]),
    ];
    let pids: Vec<String> = cases.iter().map(|case| case.running.0.id().to_string()).collect();
    let mut arguments = vec!["--pid"];
    arguments.extend(pids.iter().map(String::as_str));
    let recording = record_for(9, 499, &arguments);
    let mut faults: Vec<String> = cases.iter().filter_map(|case| case.fault(&recording, 30)).collect();
    let whole = |stack: &[String]| {
        in_order(stack, &["_start", "main", "plugin_outer", "plugin_spin"]) && !is_marked(stack)
    };
    let (good, all) = recording.share("plugin_spin", whole);
    if all < 10 || too_many_odd(all - good, all) {
        faults.push(format!("plugin: {good} of {all}: {:?}", recording.odd_ones("plugin_spin", whole)));
    }
    assert!(faults.is_empty(), "{}\n{}", faults.join("\n"), recording.log);
}

const SIGNAL: &str = "#include <signal.h>\n#include <stdlib.h>\nvolatile long sink; volatile int *null;\n\
    __attribute__((noinline)) void signal_spin(int s) { for (;;) { sink += s; } }\n\
    __attribute__((noinline)) void handler(int s, siginfo_t *i, void *c) { signal_spin(s); sink++; }\n\
    __attribute__((noinline)) int faults(int a) { return *null + a; }\n\
    __attribute__((noinline)) int caller(int a) { char b[100]; __asm__ volatile(\"\" :: \"r\"(b) : \"memory\"); return faults(a) + b[3]; }\n\
    int main(void) { stack_t s = { .ss_sp = malloc(1 << 16), .ss_size = 1 << 16 }; sigaltstack(&s, 0);\n\
    struct sigaction a = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK }; sigaction(SIGSEGV, &a, 0);\n\
    return caller(2) + 1; }\n";

const CLOCK: &str = "#include <time.h>\nvolatile long sink;\n\
    __attribute__((noinline)) long clock_inner(void) { struct timespec t; for (int i = 0; i < 1000; i++) { clock_gettime(CLOCK_MONOTONIC, &t); sink += t.tv_nsec; } return sink; }\n\
    __attribute__((noinline)) long clock_outer(void) { long r = clock_inner(); return r + 1; }\n\
    int main(void) { for (;;) sink += clock_outer(); }\n";

/// Code made at run time: `push rbp; mov rbp, rsp; call rdi; pop rbp; ret`, between two functions of the program.
const JIT: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
volatile long sink;
__attribute__((noinline)) long jit_spin(void) { for (int i = 0; i < 100000; i++) sink += i; return sink; }
__attribute__((noinline)) long jit_outer(long (*code)(long (*)(void))) { long r = code(jit_spin); return r + 1; }
int main(void) {
	unsigned char bytes[] = { 0x55, 0x48, 0x89, 0xe5, 0xff, 0xd7, 0x5d, 0xc3 };
	unsigned char *code = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char path[64];
	memcpy(code + 64, bytes, sizeof(bytes));
	snprintf(path, sizeof(path), "/tmp/perf-%d.map", getpid());
	FILE *map = fopen(path, "w");
	fprintf(map, "%lx %x jitted_code\n", (unsigned long)code + 64, 8);
	fclose(map);
	for (;;) sink += jit_outer((void *)(code + 64));
}
"#;

/// A program that executes itself from memory that no directory names.
const MEMFD: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
volatile long sink;
__attribute__((noinline)) long memfd_spin(long n) { for (;;) sink += n; }
__attribute__((noinline)) long memfd_outer(long n) { long r = memfd_spin(n); return r + 1; }
int main(int count, char **words, char **environment) {
	static char buffer[65536];
	long got;
	if (count > 1)
		return memfd_outer(3) == 42;
	int from = open("/proc/self/exe", O_RDONLY), to = memfd_create("inner", 0);
	while ((got = read(from, buffer, sizeof(buffer))) > 0)
		if (write(to, buffer, got) != got) return 1;
	char *arguments[] = { "inner", "again", 0 }, path[32];
	fexecve(to, arguments, environment);
	/* A kernel 5.10 did not find it (ENOENT). */
	snprintf(path, sizeof(path), "/proc/self/fd/%d", to);
	return execve(path, arguments, environment);
}
"#;

const SIMPLE: &str = "volatile long sink;\n\
    __attribute__((noinline)) long PREFIX_spin(long n) { for (;;) sink += n; }\n\
    __attribute__((noinline)) long PREFIX_outer(long n) { long r = PREFIX_spin(n); return r + 1; }\n\
    int main(void) { return PREFIX_outer(3) == 42; }\n";

fn simple(name: &str, prefix: &str, flags: &[&str]) -> std::path::PathBuf {
    program(name, &SIMPLE.replace("PREFIX", prefix), flags)
}

/// A program in a mount namespace of its own, on a file system that no other process sees.
fn elsewhere(program: &Path, place: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg("mount -t tmpfs none \"$1\" && cp \"$0\" \"$1/hidden\" && exec \"$1/hidden\"");
    command.arg(program).arg(place);
    let alone = || {
        // SAFETY: system calls without memory of ours but the constant strings.
        let failed = unsafe {
            libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec it only makes the two system calls above.
    unsafe { command.pre_exec(alone) };
    command
}

/// Checks code made at run time, programs without a file, and other mount namespaces (R53, R54).
#[test]
fn unusual_programs_are_complete() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("place");
    fs::create_dir(&place).unwrap();
    let deleted = directory.path().join("deleted");
    fs::copy(simple("gone", "gone", &[]), &deleted).unwrap();
    let far = SIMPLE.replace("PREFIX", "far").replace(
        "__attribute__((noinline)) long far_outer",
        "__attribute__((noinline, section(\"far\"))) long far_outer",
    );
    let far = program("far", &far, &["-no-pie", "-Wl,--section-start=far=0x40000000"]);
    let plain = |file: &Path| Command::new(file);
    let cases = [
        Case::of(
            "signal",
            plain(&program("signal", SIGNAL, &[])),
            "signal_spin",
            &["_start", "main", "caller", "faults", "handler", "signal_spin"],
        ),
        Case::of(
            "clock",
            plain(&program("clock", CLOCK, &[])),
            "clock_inner",
            &["_start", "main", "clock_outer", "clock_inner"],
        ),
        Case::of(
            "jit",
            plain(&program("jit", JIT, &[])),
            "jit_spin",
            &["_start", "main", "jit_outer", "jitted_code", "jit_spin"],
        ),
        Case::of(
            "memfd",
            plain(&program("memfd", MEMFD, &[])),
            "memfd_spin",
            &["_start", "main", "memfd_outer", "memfd_spin"],
        ),
        Case::of("deleted", plain(&deleted), "gone_spin", &["_start", "main", "gone_outer", "gone_spin"]),
        Case::of(
            "hidden",
            elsewhere(&simple("hidden", "hidden", &[]), &place),
            "hidden_spin",
            &["_start", "main", "hidden_outer", "hidden_spin"],
        ),
        Case::of("far", plain(&far), "far_spin", &["_start", "main", "far_outer", "far_spin"]),
    ];
    fs::remove_file(&deleted).unwrap();
    check(&cases, 9, 30);
    let map = format!("/tmp/perf-{}.map", cases[2].running.0.id());
    fs::remove_file(map).unwrap();
}

/// Checks that no 32-bit stack is guessed (R54).
#[test]
fn a_32_bit_program_has_a_mark_in_place_of_its_stack() {
    let flags = ["-m32", "-nostdlib", "-static", "-g0"];
    let file = program("narrow", "void _start(void) { for (;;) ; }\n", &flags);
    let running = Running::start(&mut Command::new(file));
    let recording = record_for(2, 199, &["--pid", &running.0.id().to_string()]);
    let (named, all) = recording.share("[32-bit program]", |_| true);
    assert!(all >= 20 && named == all, "{recording:?}");
    assert_eq!(all, recording.delivered, "{recording:?}");
}
