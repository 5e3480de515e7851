//! Helpers of the kernel tests: small programs, and recordings of them.

pub(crate) mod cgroup;
pub(crate) mod cpu;
pub(crate) mod life;
pub(crate) mod proven;

use std::{
    collections::{BTreeMap, HashMap},
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, Child, Command},
    thread,
    time::Duration,
};

use gannet_agent::{
    engine::EngineOptions, governor::Budgets, kernel::KernelOptions, rules::Deny, tables::TableSources,
};
use gannet_proto::{
    pprof,
    profiles::{Location, Profile, Sample},
    rules::Caps,
};

/// The variable that names a directory of compiled programs. Test machines of other kernels have no compiler and get the
/// programs of this one; a missing program is compiled into the directory.
const PROGRAMS: &str = "GANNET_TEST_PROGRAMS";

/// Returns a variable of the environment that a script prints the value of.
#[track_caller]
pub(crate) fn required(variable: &str, script: &str) -> String {
    env::var(variable).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| {
        panic!("{variable} is not set: run make test, or set it to the output of {script}")
    })
}

/// Returns options of an engine that ends no window by itself, with tables and without limits.
pub(crate) fn engine_options() -> EngineOptions {
    EngineOptions {
        start_labels: None,
        node: "here".into(),
        kernel: KernelOptions::default(),
        window: Duration::from_secs(3600),
        caps: Caps { ttl_above_hz: u32::MAX, ..Caps::default() },
        deny: Deny::default(),
        budgets: Budgets::default(),
        tables: Some(TableSources::default()),
    }
}

/// The language of a test program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Language {
    C,
    Cpp,
    Rust,
    Go,
}

/// Compiles a C program (or, with `-shared`, a library) by `gcc -O2` and `flags`, and returns its path. As shipped software it
/// has no frame pointers, unless the flags add them. The compiler runs in a directory within that of the program.
pub(crate) fn program(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    program_in(Language::C, name, source, flags)
}

/// Compiles a program of any language with these flags of its compiler, and returns its path.
pub(crate) fn program_in(language: Language, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let mut hash = DefaultHasher::new();
    (language, source, flags).hash(&mut hash);
    let all = env::var_os(PROGRAMS)
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs"), PathBuf::from);
    let directory = all.join(format!("{:016x}", hash.finish()));
    let done = directory.join(name);
    if done.exists() {
        return done;
    }
    fs::create_dir_all(&directory).unwrap();
    // Other tests may compile it too: under its name stands only a complete program.
    let work = directory.join(format!(".{name}.{}.{:?}", process::id(), thread::current().id()));
    fs::create_dir_all(&work).unwrap();
    let built = work.join(name);
    compile(language, source, flags, &work, &built);
    fs::rename(&built, &done).unwrap();
    fs::remove_dir_all(&work).unwrap();
    done
}

fn compile(language: Language, source: &str, flags: &[&str], work: &Path, output: &Path) {
    let (compiler, ending, standard, package): (_, _, &[&str], _) = match language {
        Language::C => {
            let flags = &["-O2", "-g", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-w"];
            ("gcc", "c", flags, "gcc libc6-dev")
        }
        Language::Cpp => {
            let flags = &["-O2", "-g", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-w"];
            ("g++", "cc", flags, "g++")
        }
        Language::Rust => ("rustc", "rs", &["-O", "-g", "--edition=2021"], "rustup"),
        Language::Go => ("go", "go", &["build"], "golang-go"),
    };
    let file = work.join(format!("source.{ending}"));
    fs::write(&file, source).unwrap();
    let mut command = Command::new(compiler);
    command.args(standard).current_dir(work);
    match language {
        // The linker wants libraries after their users.
        Language::C | Language::Cpp => command.arg("-o").arg(output).arg(&file).args(flags),
        Language::Rust => command.args(flags).arg("-o").arg(output).arg(&file),
        Language::Go => command
            .env("GO111MODULE", "off")
            .env("CGO_ENABLED", "0")
            .env("GOCACHE", work.join("cache"))
            .args(flags)
            .arg("-o")
            .arg(output)
            .arg(&file),
    };
    let done = command.output().unwrap_or_else(|error| {
        panic!("{compiler} compiles this test's program: {error}; apt-get install {package}")
    });
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
}

/// Returns the agent to test: the one beside the compiled programs, else the one that cargo built.
pub(crate) fn agent() -> PathBuf {
    let beside = env::var_os(PROGRAMS).map(|directory| Path::new(&directory).join("gannet-agent"));
    beside.filter(|path| path.exists()).unwrap_or_else(|| env!("CARGO_BIN_EXE_gannet-agent").into())
}

/// Lets a child end with the thread that starts it: a test that fails in another thread, or that is killed, drops nothing.
pub(crate) fn end_with_test(command: &mut Command) -> &mut Command {
    let parent = process::id();
    let end = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The test may have ended before the call.
        let is_orphan =
            rustix::process::getppid().is_none_or(|now| now.as_raw_nonzero().get().unsigned_abs() != parent);
        if is_orphan { Err(std::io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
    };
    // SAFETY: both system calls may be made between fork and exec, and nothing allocates.
    unsafe { command.pre_exec(end) }
}

/// A child that is killed when this is dropped. It ends with the thread that started it too.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        end_with_test(command);
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The output of `gannet-agent record`.
#[derive(Debug)]
#[expect(dead_code, reason = "failing tests print all counts")]
pub(crate) struct Recording {
    /// Stacks, root first, with their samples. Before the root stands the command name of the process. Inlined functions are
    /// frames like others.
    pub(crate) stacks: Vec<(Vec<String>, u64)>,
    /// The same stacks with nanoseconds, on the CPU or blocked.
    pub(crate) nanoseconds: Vec<(Vec<String>, u64)>,
    pub(crate) taken: u64,
    pub(crate) delivered: u64,
    pub(crate) lost: BTreeMap<String, u64>,
    pub(crate) ticks: u64,
    /// The profile as it was written.
    pub(crate) profile: Profile,
    /// The limits that the governor had lowered at the end, and why.
    pub(crate) governed: Option<String>,
    /// Its standard error.
    pub(crate) log: String,
}

/// Returns how many times slower than a real machine this one is; the runner of emulated machines sets it. Tests sample at a
/// rate that is lower by this factor for a time that is longer by it, and so get the same number of samples.
pub(crate) fn slower() -> u32 {
    env::var("GANNET_TEST_SLOWER").map_or(1, |text| text.parse().unwrap())
}

/// Returns C source of `count` unused functions, so that building the unwind table takes a while.
pub(crate) fn idle_functions(count: u32) -> String {
    format!(
        "__asm__(\".pushsection .bulk, \\\"ax\\\"\\n.rept {count}\\n.cfi_startproc\\nnop\\n\
         .cfi_def_cfa_offset 16\\nnop\\n.cfi_endproc\\n.endr\\n.popsection\");\n"
    )
}

/// A program that makes a page in the middle of its stack unreadable, and then computes for ever in `spin`: `protect` forbids
/// access to the page, `drop` takes it out of the memory, `keep` leaves it. Between `spin` and the page are some 50 frames, behind
/// it at least 20. A raw sample holds all of it.
const HOLE: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
__attribute__((noinline)) long spin(void) { for (volatile long i = 0;; i++) ; }
__attribute__((noinline)) long leaf(const char *how) {
	volatile char here;
	char *page = (char *)(((unsigned long)&here + 12288) & ~4095UL);
	if (!strcmp(how, "protect") && mprotect(page, 4096, PROT_NONE)) abort();
	if (!strcmp(how, "drop") && madvise(page, 4096, MADV_DONTNEED)) abort();
	return spin();
}
__attribute__((noinline)) long recurse(long depth, const char *how) {
	volatile char pad[200];
	pad[0] = depth;
	return (depth ? recurse(depth - 1, how) : leaf(how)) + pad[0];
}
int main(int c, char **v) { return recurse(80, v[1]); }
"#;

/// Starts programs whose stacks have a page that cannot be read, compiled with these flags, and one whose stack is complete.
pub(crate) fn with_holes(name: &str, flags: &[&str]) -> [Running; 3] {
    let file = program(name, HOLE, flags);
    ["protect", "drop", "keep"].map(|how| Running::start(Command::new(&file).arg(how)))
}

/// The flags of a program of musl libc, which the compiler driver of musl-tools adds.
pub(crate) const MUSL: [&str; 2] = ["-specs", "/usr/lib/x86_64-linux-musl/musl-gcc.specs"];

/// One sample of this number may be odd.
const ODD_ONE_OF: u64 = 1000;

/// Reports whether too many samples are odd. Some hundreds of samples do not tell one of a thousand from none.
pub(crate) fn too_many_odd(odd: u64, all: u64) -> bool {
    odd > 1 && odd * ODD_ONE_OF > all
}

/// The flags of a program of musl libc with frame pointers and without information about frames.
pub(crate) const MUSL_WITHOUT_TABLES: [&str; 6] = [
    "-specs",
    "/usr/lib/x86_64-linux-musl/musl-gcc.specs",
    "-static",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
    "-fno-omit-frame-pointer",
];

/// Returns a command that runs `gannet-agent top` on a terminal, which python3 makes, presses q when its screen shows these words,
/// and fails if it does not.
pub(crate) fn on_a_screen(words: &[&str]) -> Command {
    const SCREEN: &str = include_str!("../../data/screen.py");
    let mut command = Command::new("python3");
    command.args(["-c", SCREEN]).args(words).arg("--").arg(agent()).arg("top");
    command
}

/// Runs `gannet-agent record` at this rate with these arguments, and reads its output.
#[track_caller]
pub(crate) fn record(hz: u32, arguments: &[&str]) -> Recording {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out.pb.gz");
    let mut command = Command::new(agent());
    if slower() > 1 {
        // Beside a busy program it would get a few hundredths of an emulated CPU.
        let first = || {
            // SAFETY: it takes numbers alone.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -19) };
            Ok(())
        };
        // SAFETY: setpriority may be called between fork and exec.
        unsafe { command.pre_exec(first) };
    }
    let output = end_with_test(&mut command)
        .args(["record", "--json", "--hz", &hz.to_string(), "-o"])
        .arg(&out)
        .args(arguments)
        .output()
        .unwrap();
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{log}");
    Recording::read(&text, &fs::read(&out).unwrap(), log.into_owned())
}

/// Runs [`record`] for `seconds`, of processes that already run.
#[track_caller]
pub(crate) fn record_for(seconds: u32, hz: u32, arguments: &[&str]) -> Recording {
    let duration = format!("{}s", seconds * slower());
    record(hz / slower(), &[&["--duration", &duration], arguments].concat())
}

impl Recording {
    #[track_caller]
    pub(crate) fn read(printed: &str, profile: &[u8], log: String) -> Self {
        let account: serde_json::Value =
            serde_json::from_str(printed.lines().find(|line| line.starts_with('{')).unwrap()).unwrap();
        let number = |name: &str| account[name].as_u64().unwrap();
        let lost: BTreeMap<String, u64> = account["lost"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(reason, count)| (reason.clone(), count.as_u64().unwrap()))
            .collect();
        let (taken, delivered) = (number("taken"), number("delivered"));
        let profile = pprof::decode(profile, 1 << 30).unwrap();
        // The kernel's count against the samples in the file.
        assert_eq!(pprof::samples(&profile), delivered, "{account}");
        assert_eq!(account["unaccounted"].as_i64(), Some(0), "{account}");
        assert_eq!(taken, delivered + lost.values().sum::<u64>(), "{account}");
        let names = functions(&profile);
        let values = |index: usize| {
            let samples = profile.sample.iter();
            samples.map(|sample| (frames(&profile, &names, sample), sample.value[index] as u64)).collect()
        };
        Self {
            stacks: values(0),
            nanoseconds: values(1),
            taken,
            delivered,
            lost,
            ticks: number("ticks"),
            governed: account["governed"].as_str().map(str::to_owned),
            log,
            profile,
        }
    }

    /// Returns of the samples in `function` the number of complete ones, and of all.
    pub(crate) fn share(&self, function: &str, is_complete: impl Fn(&[String]) -> bool) -> (u64, u64) {
        let inside = self.stacks.iter().filter(|(stack, _)| stack.iter().any(|name| name == function));
        inside
            .fold((0, 0), |(good, all), (stack, n)| (good + if is_complete(stack) { *n } else { 0 }, all + n))
    }

    /// Returns the stacks in `function` that are not complete.
    pub(crate) fn odd_ones(
        &self,
        function: &str,
        is_complete: impl Fn(&[String]) -> bool,
    ) -> Vec<&(Vec<String>, u64)> {
        self.stacks
            .iter()
            .filter(|(stack, _)| stack.iter().any(|name| name == function) && !is_complete(stack))
            .collect()
    }
}

/// Returns the functions of each location, outermost first.
fn functions(profile: &Profile) -> HashMap<u64, Vec<String>> {
    let names: HashMap<u64, &String> = profile
        .function
        .iter()
        .map(|function| (function.id, &profile.string_table[function.name as usize]))
        .collect();
    let of = |location: &Location| {
        if location.line.is_empty() {
            return vec![format!("{:#x}", location.address)];
        }
        location.line.iter().rev().map(|line| names[&line.function_id].clone()).collect()
    };
    profile.location.iter().map(|location| (location.id, of(location))).collect()
}

/// Returns the command name, then the functions, root first.
fn frames(profile: &Profile, functions: &HashMap<u64, Vec<String>>, sample: &Sample) -> Vec<String> {
    let text = |index: i64| profile.string_table[index as usize].clone();
    let comm = sample.label.iter().find(|label| text(label.key) == "comm").map(|label| text(label.str));
    let frames = sample.location_id.iter().rev().flat_map(|id| functions[id].iter().cloned());
    std::iter::once(comm.unwrap_or_default()).chain(frames).collect()
}

/// Reports whether a stack contains these functions in this order, root first; others may stand between them.
pub(crate) fn in_order(stack: &[String], names: &[&str]) -> bool {
    let mut stack = stack.iter();
    names.iter().all(|name| stack.any(|frame| frame == name))
}

/// Returns how often a stack contains a function.
pub(crate) fn times(stack: &[String], name: &str) -> usize {
    stack.iter().filter(|frame| *frame == name).count()
}

/// Reports whether a stack is marked as incomplete.
pub(crate) fn is_marked(stack: &[String]) -> bool {
    stack
        .iter()
        .any(|frame| ["[truncated", "[broken", "[unreadable"].iter().any(|mark| frame.starts_with(mark)))
}
