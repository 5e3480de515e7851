//! Symbols of real programs: the tests compile and run them, and look up addresses that the programs report of themselves. They
//! need root, as the agent does: it opens other processes' mappings through `/proc/PID/map_files`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    num::NonZeroUsize,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use gannet_agent::{
    model::{Image, MappedFile, Mapping, MappingKind, ProcessKey, SampleKind, StackEnd, StackMarks},
    process::{FileMapping, FileTable},
    profile::{RawProcess, RawProfile, RawStack},
    symbols::{DebugCost, Symbolizer, SymbolizerConfig},
};
use gannet_proto::{pprof, profiles::Profile};
use proptest::prelude::*;
use rstest::rstest;

/// Reports addresses inside of its functions as `name address`, then waits for the end of its input.
const C_PROGRAM: &str = r#"
#include <stdio.h>
#include <unistd.h>
#if defined(__x86_64__)
#define HERE(p) __asm__ volatile("lea 0(%%rip), %0" : "=r"(p))
#else
#define HERE(p) __asm__ volatile("adr %0, ." : "=r"(p))
#endif
void *in_inner, *in_leaf, *in_outer, *in_far, *in_last;
volatile int sink;
static inline __attribute__((always_inline)) void inner(void) { void *p; HERE(p); sink++; in_inner = p; sink++; }
__attribute__((noinline)) void holder(void) { sink++; inner(); sink++; }
__attribute__((noinline)) void leaf(void) { void *p; HERE(p); in_leaf = p; in_outer = __builtin_return_address(0); sink++; }
__attribute__((noinline)) void outer(void) { leaf(); sink++; }
#ifdef FAR
__attribute__((noinline, section(".far_text")))
#else
__attribute__((noinline))
#endif
void far_away(void) { void *p; HERE(p); in_far = p; sink++; }
__attribute__((noinline, noreturn)) void report(void) {
    in_last = __builtin_return_address(0);
    printf("inner %p\nleaf %p\nouter %p\nfar_away %p\nends_with_a_call %p\n", in_inner, in_leaf, in_outer, in_far, in_last);
    fflush(stdout);
    char c;
    while (read(0, &c, 1) > 0) {}
    _exit(0);
}
__attribute__((noinline)) void ends_with_a_call(void) { report(); }
__attribute__((noinline)) void comes_next(void) { sink++; }
int main(int argc, char **argv) {
    if (argc > 1) comes_next();
    holder(); outer(); far_away(); ends_with_a_call();
}
"#;

const RUST_PROGRAM: &str = r#"
use std::{arch::asm, io::Read};
fn here() -> usize {
    let place: usize;
    #[cfg(target_arch = "x86_64")]
    unsafe { asm!("lea {}, [rip]", out(reg) place) };
    #[cfg(target_arch = "aarch64")]
    unsafe { asm!("adr {}, .", out(reg) place) };
    place
}
mod shop {
    pub struct Cart<T>(pub T);
    impl<T: Copy> Cart<T> {
        #[inline(never)]
        pub fn checkout(&self) -> (usize, T) { (price(), self.0) }
    }
    #[inline(always)]
    pub fn price() -> usize { let place = super::here(); std::hint::black_box(place) }
}
fn main() {
    let (place, _) = std::hint::black_box(shop::Cart(7u32)).checkout();
    println!("checkout {place:#x}");
    let _ = std::io::stdin().read(&mut [0]);
}
"#;

struct Program {
    child: Child,
    path: PathBuf,
    addresses: BTreeMap<String, u64>,
    _directory: tempfile::TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn run_tool(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[track_caller]
fn compile_c(flags: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("program.c"), directory.path().join("program"));
    fs::write(&source, C_PROGRAM).unwrap();
    run_tool(
        Command::new("gcc")
            .args(["-O2", "-fno-optimize-sibling-calls", "-falign-functions=1", "-fno-reorder-functions"])
            .args(["-fno-toplevel-reorder", "-fomit-frame-pointer"])
            .args(flags)
            .arg("-o")
            .args([&path, &source]),
    );
    (directory, path)
}

#[track_caller]
fn start(directory: tempfile::TempDir, path: PathBuf) -> Program {
    let mut child = Command::new(&path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut addresses = BTreeMap::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        let (name, address) = line.split_once(' ').unwrap();
        addresses.insert(name.to_owned(), u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap());
        if name == "ends_with_a_call" || name == "checkout" {
            break;
        }
    }
    Program { child, path, addresses, _directory: directory }
}

#[track_caller]
fn start_c(flags: &[&str]) -> Program {
    let (directory, path) = compile_c(flags);
    start(directory, path)
}

fn key(pid: u32) -> ProcessKey {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let ticks: u64 =
        stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
    ProcessKey { tgid: pid, start_boottime_ns: ticks * 10_000_000 + 3_000_000 }
}

fn table() -> FileTable {
    FileTable::new(NonZeroUsize::new(64).unwrap())
}

/// Returns the executable mappings of a live process.
fn image(pid: u32, files: &mut FileTable) -> Arc<Image> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut mappings = Vec::new();
    for line in maps.lines() {
        let mut words = line.splitn(6, ' ');
        let (range, flags, offset, device, inode, name) = (
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap_or_default().trim(),
        );
        if !flags.contains('x') || name == "[vsyscall]" {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = range.split_once('-').map(|(start, end)| (hex(start), hex(end))).unwrap();
        let (major, minor) = device.split_once(':').map(|(major, minor)| (hex(major), hex(minor))).unwrap();
        let kind = match (name, inode.parse::<u64>().unwrap()) {
            ("[vdso]", _) => MappingKind::Vdso,
            (_, 0) => MappingKind::Anon,
            (path, inode) => MappingKind::File(files.open(&FileMapping {
                parent: 0,
                tgid: pid,
                start,
                end,
                path: path.trim_end_matches(" (deleted)"),
                dev: libc::makedev(major as u32, minor as u32),
                inode,
            })),
        };
        mappings.push(Mapping { start, end, offset: hex(offset), kind });
    }
    Arc::new(Image { mappings })
}

fn stack(kernel: &[u64], user: &[u64], end: StackEnd) -> RawStack {
    RawStack {
        tid: 12,
        thread: "worker".into(),
        kernel: kernel.to_vec(),
        user: user.to_vec(),
        end,
        marks: StackMarks::default(),
        state: 0,
        labels: None,
        count: 3,
        value_ns: 30_000_000,
    }
}

fn raw(key: ProcessKey, image: Arc<Image>, stacks: Vec<RawStack>) -> RawProfile {
    RawProfile {
        kind: SampleKind::OnCpu,
        period_ns: 10_000_000,
        start: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        duration: Duration::from_secs(10),
        processes: vec![RawProcess {
            key,
            comm: "program".into(),
            container_id: String::new(),
            pod_uid: "4f1c".into(),
            image,
            interpreter: None,
            start_labels: None,
            stacks,
        }],
        comments: vec!["rule: test".into()],
    }
}

#[track_caller]
fn symbolize(symbolizer: &Symbolizer, raw: RawProfile) -> Profile {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(symbolizer.symbolize(raw)).unwrap()
}

fn config() -> SymbolizerConfig {
    // In a test, `/proc/self/exe` is not the agent.
    let reader = PathBuf::from(env!("CARGO_BIN_EXE_gannet-agent"));
    SymbolizerConfig { debug_reader: Some(reader), ..SymbolizerConfig::default() }
}

fn new_symbolizer() -> Symbolizer {
    Symbolizer::start(config()).unwrap()
}

fn text(profile: &Profile, index: i64) -> &str {
    &profile.string_table[usize::try_from(index).unwrap()]
}

/// Returns the names of each frame of the only sample, leaf first; those of one frame innermost first.
#[track_caller]
fn names(profile: &Profile) -> Vec<Vec<String>> {
    let [sample] = profile.sample.as_slice() else { panic!("{} samples", profile.sample.len()) };
    let function = |id: u64| profile.function.iter().find(|function| function.id == id).unwrap().name;
    sample
        .location_id
        .iter()
        .map(|id| {
            let location = profile.location.iter().find(|location| location.id == *id).unwrap();
            location.line.iter().map(|line| text(profile, function(line.function_id)).to_owned()).collect()
        })
        .collect()
}

#[track_caller]
fn names_of(program: &Program, user: &[u64]) -> Vec<Vec<String>> {
    let pid = program.child.id();
    let image = image(pid, &mut table());
    names(&symbolize(&new_symbolizer(), raw(key(pid), image, vec![stack(&[], user, StackEnd::Complete)])))
}

/// Checks each way of linking, which gives code other addresses and offsets.
#[rstest]
#[case::pie(&["-g"])]
#[case::no_debug_info(&[])]
#[case::not_position_independent(&["-no-pie", "-g"])]
#[case::static_(&["-static", "-g"])]
#[case::static_pie(&["-static-pie"])]
#[case::one_segment_for_code_and_headers(&["-Wl,-z,noseparate-code"])]
#[case::code_apart(&["-Wl,-z,separate-code", "-g"])]
#[case::large_pages(&["-Wl,-z,max-page-size=0x200000"])]
#[case::code_in_two_segments(&["-no-pie", "-DFAR", "-Wl,--section-start=.far_text=0x10000000"])]
#[case::code_in_two_segments_with_debug_info(&["-g", "-no-pie", "-DFAR", "-Wl,--section-start=.far_text=0x10000000"])]
#[case::dynamic_symbols_only(&["-rdynamic", "-s"])]
#[case::compressed_debug_info(&["-g", "-gz=zlib"])]
fn addresses_of_every_kind_of_program_have_their_names(#[case] flags: &[&str]) {
    let program = start_c(flags);
    let at = |name: &str| program.addresses[name];
    // The address of the leaf is its own; those of `outer` and the others are return addresses.
    let user = [at("leaf"), at("outer"), at("far_away") + 1, at("ends_with_a_call")];
    let frames = names_of(&program, &user);
    let outermost: Vec<_> = frames.iter().map(|frame| frame.last().cloned().unwrap_or_default()).collect();
    assert_eq!(outermost, ["leaf", "outer", "far_away", "ends_with_a_call"]);
}

#[test]
fn a_return_address_behind_a_function_belongs_to_the_caller() {
    let program = start_c(&[]);
    let address = program.addresses["ends_with_a_call"];
    assert_eq!(
        names_of(&program, &[address]),
        [["comes_next"]],
        "the test's program is not laid out as it should be"
    );
    assert_eq!(names_of(&program, &[program.addresses["leaf"], address])[1], ["ends_with_a_call"]);
}

#[test]
fn inlined_functions_are_lines_of_their_frame_innermost_first() {
    let program = start_c(&["-g"]);
    assert_eq!(names_of(&program, &[program.addresses["inner"]]), [["inner", "holder"]]);
    let program = start_c(&[]);
    assert_eq!(names_of(&program, &[program.addresses["inner"]]), [["holder"]]);
}

#[test]
fn lines_locate_each_function_in_its_source() {
    let program = start_c(&["-g"]);
    let pid = program.child.id();
    let image = image(pid, &mut table());
    let user = [program.addresses["inner"]];
    let profile =
        symbolize(&new_symbolizer(), raw(key(pid), image, vec![stack(&[], &user, StackEnd::Complete)]));
    let line_of = |needle: &str| C_PROGRAM.lines().position(|line| line.contains(needle)).unwrap() as i64 + 1;
    let lines: Vec<i64> = profile.location[0].line.iter().map(|line| line.line).collect();
    assert_eq!(lines, [line_of("void inner(void)"), line_of("void holder(void)")]);
    for function in &profile.function {
        assert!(text(&profile, function.filename).ends_with("program.c"));
    }
}

#[rstest]
#[case::debug_info(&["-g", "-O"], &["program::here", "program::shop::price", "program::shop::Cart<T>::checkout"])]
#[case::symbols(&["-O"], &["program::shop::Cart<T>::checkout"])]
fn rust_names_are_readable_and_inlined(#[case] flags: &[&str], #[case] expected: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("program.rs"), directory.path().join("program"));
    fs::write(&source, RUST_PROGRAM).unwrap();
    run_tool(Command::new("rustc").args(flags).arg("-o").args([&path, &source]));
    let program = start(directory, path);
    let address = program.addresses["checkout"];
    // As a caller, so that the look-up finds the instruction before, which takes its own address.
    assert_eq!(names_of(&program, &[address, address])[1], expected);
}

/// Checks that Go's own table names the functions of programs without symbols, as most images have them.
#[rstest]
#[case::stripped(&["-ldflags=-s -w"])]
#[case::stripped_and_position_independent(&["-ldflags=-s -w", "-buildmode=pie"])]
#[case::stripped_and_linked_with_c(&["-ldflags=-s -w -linkmode=external"])]
#[case::with_symbols(&[])]
fn go_programs_have_names(#[case] flags: &[&str]) {
    const PROGRAM: &str = r#"
package main

import ("fmt"; "os"; "runtime")

type Cart struct{}

//go:noinline
func (c *Cart) Checkout() uintptr { pc, _, _, _ := runtime.Caller(0); return pc }

func main() {
	fmt.Printf("checkout %#x\n", (&Cart{}).Checkout())
	os.Stdin.Read(make([]byte, 1))
}
"#;
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("program.go"), directory.path().join("program"));
    fs::write(&source, PROGRAM).unwrap();
    run_tool(
        Command::new("go")
            .arg("build")
            .args(flags)
            .arg("-o")
            .args([&path, &source])
            .env("GOCACHE", std::env::temp_dir().join("gannet-go-cache"))
            .env("GO111MODULE", "off"),
    );
    let program = start(directory, path);
    assert_eq!(names_of(&program, &[program.addresses["checkout"]]), [["main.(*Cart).Checkout"]]);
}

/// Checks that a function table of an unknown version costs no other names: a newer Go may have written it.
#[test]
fn an_unknown_function_table_of_go_leaves_other_names() {
    let (directory, path) = compile_c(&["-rdynamic", "-s"]);
    let table = directory.path().join("table");
    fs::write(&table, [0x7f; 256]).unwrap();
    run_tool(
        Command::new("objcopy")
            .arg("--add-section")
            .arg(format!(".gopclntab={}", table.display()))
            .arg(&path),
    );
    let program = start(directory, path);
    let pid = program.child.id();
    let symbolizer = new_symbolizer();
    for _ in 0..2 {
        let stacks = vec![stack(&[], &[program.addresses["leaf"]], StackEnd::Complete)];
        let profile = symbolize(&symbolizer, raw(key(pid), image(pid, &mut self::table()), stacks));
        assert_eq!(names(&profile), [["leaf"]]);
    }
    assert!(symbolizer.stats().unusable_tables.load(Ordering::Relaxed) > 0);
}

#[test]
fn cpp_names_are_readable_and_the_compilers_name_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("program.cc"), directory.path().join("program"));
    let cpp = r#"
#include <cstdio>
#include <unistd.h>
namespace shop { struct Cart { template <class T> __attribute__((noinline)) void *checkout(T n); }; }
template <class T> void *shop::Cart::checkout(T) { return __builtin_return_address(0); }
int main() { shop::Cart c; auto p = (void *(shop::Cart::*)(int))&shop::Cart::checkout<int>; (c.*p)(1);
  std::printf("checkout %p\n", *(void **)&p); std::fflush(stdout); char b; while (read(0, &b, 1) > 0) {} }
"#;
    fs::write(&source, cpp).unwrap();
    run_tool(Command::new("g++").args(["-O1", "-o"]).args([&path, &source]));
    let program = start(directory, path);
    let pid = program.child.id();
    let image = image(pid, &mut table());
    let user = [program.addresses["checkout"]];
    let profile =
        symbolize(&new_symbolizer(), raw(key(pid), image, vec![stack(&[], &user, StackEnd::Complete)]));
    assert_eq!(names(&profile), [["void* shop::Cart::checkout<int>(int)"]]);
    assert_eq!(text(&profile, profile.function[0].system_name), "_ZN4shop4Cart8checkoutIiEEPvT_");
}

/// Checks that no cut and no guess is silent: the kernel's stack is cut between its frames and the user's.
#[test]
fn cut_kernel_stacks_and_guessed_frames_are_marked() {
    let program = start_c(&["-g"]);
    let pid = program.child.id();
    let image = image(pid, &mut table());
    let kernel = [0xffff_ffff_8000_0000, 0xffff_ffff_8000_0100];
    let user = [program.addresses["leaf"], program.addresses["outer"]];
    let of = |kernel: &[u64], marks| RawStack { marks, ..stack(kernel, &user, StackEnd::Complete) };
    let cut = StackMarks { kernel_truncated: true, guessed_from: None };
    let guessed = StackMarks { kernel_truncated: false, guessed_from: Some(1) };
    let symbolized = |stack| symbolize(&new_symbolizer(), raw(key(pid), Arc::clone(&image), vec![stack]));
    let label = |profile: &Profile| {
        let mut labels = profile.sample[0].label.iter();
        let found = labels.find(|label| text(profile, label.key) == "unwinding");
        found.map(|label| text(profile, label.str).to_owned())
    };
    let sure = |profile: &Profile| gannet_proto::pprof::sure_frames(profile, &profile.sample[0]);
    let profile = symbolized(of(&kernel, cut));
    let frames = names(&profile);
    assert_eq!(frames.len(), 5, "{frames:?}");
    assert_eq!(frames[2..], [vec!["[truncated]"], vec!["leaf"], vec!["outer"]]);
    assert_eq!((label(&profile), sure(&profile)), (None, 5));
    let profile = symbolized(of(&kernel[..0], guessed));
    assert_eq!(names(&profile), [vec!["leaf"], vec!["outer"]]);
    assert_eq!((label(&profile).as_deref(), sure(&profile)), (Some("guessed"), 1));
    // Behind the frames of the kernel, and behind the mark of those that it lacks.
    let both = StackMarks { kernel_truncated: true, ..guessed };
    for (marks, expected) in [(guessed, 3), (both, 4)] {
        let profile = symbolized(of(&kernel, marks));
        assert_eq!(names(&profile)[expected], ["outer"]);
        assert_eq!((label(&profile).as_deref(), sure(&profile)), (Some("guessed"), expected));
    }
}

#[test]
fn a_profile_has_the_form_of_pprof() {
    let program = start_c(&["-g"]);
    let pid = program.child.id();
    let image = image(pid, &mut table());
    let user = [program.addresses["leaf"], program.addresses["outer"]];
    let stacks = vec![stack(&[], &user, StackEnd::Truncated)];
    let profile = symbolize(&new_symbolizer(), raw(key(pid), image, stacks));
    let kind = |value: &gannet_proto::profiles::ValueType| {
        format!("{}/{}", text(&profile, value.r#type), text(&profile, value.unit))
    };
    assert_eq!(
        profile.sample_type.iter().map(kind).collect::<Vec<_>>(),
        ["samples/count", "cpu/nanoseconds"]
    );
    assert_eq!(profile.period_type.as_ref().map(kind).unwrap(), "cpu/nanoseconds");
    assert_eq!((profile.period, profile.duration_nanos), (10_000_000, 10_000_000_000));
    assert_eq!(profile.time_nanos, 1_700_000_000_000_000_000);
    assert_eq!(profile.sample[0].value, [3, 30_000_000]);
    let labels: BTreeMap<&str, String> = profile.sample[0]
        .label
        .iter()
        .map(|label| {
            let value =
                if label.str == 0 { label.num.to_string() } else { text(&profile, label.str).to_owned() };
            (text(&profile, label.key), value)
        })
        .collect();
    let pid_text = pid.to_string();
    assert_eq!(
        labels.iter().map(|(key, value)| (*key, value.as_str())).collect::<Vec<_>>(),
        [
            ("comm", "program"),
            ("pid", pid_text.as_str()),
            ("pod_uid", "4f1c"),
            ("thread", "worker"),
            ("tid", "12")
        ]
    );
    assert_eq!(names(&profile), [vec!["leaf"], vec!["outer"], vec!["[truncated]"]]);
    let main = &profile.mapping[0];
    assert_eq!(text(&profile, main.filename), program.path.to_str().unwrap());
    for location in profile.location.iter().filter(|location| location.mapping_id != 0) {
        let mapping = profile.mapping.iter().find(|mapping| mapping.id == location.mapping_id).unwrap();
        assert!((mapping.memory_start..mapping.memory_limit).contains(&location.address));
    }
    assert!(profile.comment.iter().any(|comment| text(&profile, *comment) == "rule: test"));
}

#[test]
fn a_frame_without_a_name_keeps_its_mapping_and_build_id() {
    let program = start_c(&["-s", "-Wl,--build-id=0x00ff10"]);
    let pid = program.child.id();
    let image = image(pid, &mut table());
    let user = [program.addresses["leaf"]];
    let symbolizer = new_symbolizer();
    let profile = symbolize(&symbolizer, raw(key(pid), image, vec![stack(&[], &user, StackEnd::Broken)]));
    assert_eq!(names(&profile), [vec![], vec!["[broken stack]".to_owned()]]);
    let location = profile.location.iter().find(|location| location.address == user[0]).unwrap();
    let mapping = profile.mapping.iter().find(|mapping| mapping.id == location.mapping_id).unwrap();
    assert_eq!(text(&profile, mapping.build_id), "00ff10");
    assert_eq!(symbolizer.stats().unnamed.load(Ordering::Relaxed), 1);
}

#[test]
fn a_deleted_program_that_still_runs_has_names() {
    let program = start_c(&["-g"]);
    fs::remove_file(&program.path).unwrap();
    assert_eq!(names_of(&program, &[program.addresses["leaf"]]), [["leaf"]]);
}

#[test]
fn a_program_whose_process_has_ended_has_names() {
    let mut program = start_c(&["-g"]);
    let pid = program.child.id();
    let (key, image) = (key(pid), image(pid, &mut table()));
    fs::remove_file(&program.path).unwrap();
    program.child.kill().unwrap();
    program.child.wait().unwrap();
    let user = [program.addresses["leaf"]];
    let profile = symbolize(&new_symbolizer(), raw(key, image, vec![stack(&[], &user, StackEnd::Complete)]));
    assert_eq!(names(&profile), [["leaf"]]);
}

#[test]
fn a_file_that_replaces_another_has_its_own_names() {
    let mut files = table();
    let symbolizer = new_symbolizer();
    let old = start_c(&["-g", "-no-pie"]);
    let old_image = image(old.child.id(), &mut files);
    // Another program at the same path, with other functions at the same addresses.
    let (directory, path) = compile_c(&["-g", "-no-pie", "-Dleaf=other_leaf", "-Douter=a_longer_name"]);
    fs::rename(&path, &old.path).unwrap();
    let mut new = start(directory, old.path.clone());
    let new_image = image(new.child.id(), &mut files);
    for (program, image, expected) in [(&old, &old_image, "leaf"), (&new, &new_image, "other_leaf")] {
        let user = [program.addresses["leaf"]];
        let stacks = vec![stack(&[], &user, StackEnd::Complete)];
        let profile = symbolize(&symbolizer, raw(key(program.child.id()), Arc::clone(image), stacks));
        assert_eq!(names(&profile), [[expected]]);
    }
    assert_eq!(old_image.mappings[0].start, new_image.mappings[0].start);
    new.path.clear();
}

#[test]
fn a_file_is_opened_once_and_open_files_have_a_limit() {
    let (directory, path) = compile_c(&[]);
    let first = start(directory, path.clone());
    let second = start(tempfile::tempdir().unwrap(), path);
    let mut files = table();
    let (one, two) = (image(first.child.id(), &mut files), image(second.child.id(), &mut files));
    let opened = files.stats().opened;
    let main = |image: &Image| match &image.mappings[0].kind {
        MappingKind::File(file) => Arc::clone(file),
        _ => panic!("the program is not mapped first"),
    };
    assert!(Arc::ptr_eq(&main(&one), &main(&two)));
    assert_eq!(opened as usize, files.stats().open);

    let mut small = FileTable::new(NonZeroUsize::MIN);
    let held = image(first.child.id(), &mut small);
    assert_eq!(small.stats().open, 1);
    assert!(small.stats().refused > 0, "the C library took the descriptor that the program holds");
    drop(held);
    let refused = small.stats().refused;
    let other = start_c(&["-g"]);
    let main_of_other = main(&image(other.child.id(), &mut small));
    assert!(main_of_other.file.is_some(), "an unused file makes room");
    assert_eq!(small.stats().open, 1);
    assert!(small.stats().refused > refused);
}

#[test]
fn the_path_serves_where_the_mapping_cannot_be_opened() {
    let program = start_c(&[]);
    let metadata = fs::metadata(&program.path).unwrap();
    let path = program.path.to_str().unwrap();
    // No mapping has these addresses.
    let mapping = FileMapping {
        tgid: program.child.id(),
        parent: 0,
        start: 1,
        end: 2,
        path,
        dev: metadata.dev(),
        inode: metadata.ino(),
    };
    let mut files = table();
    assert!(files.open(&mapping).is_elf());
    assert!(files.open(&FileMapping { inode: 1, ..mapping }).file.is_none(), "another file was taken");
    let device = fs::metadata("/dev/zero").unwrap();
    let zero = FileMapping { path: "/dev/zero", dev: device.dev(), inode: device.ino(), ..mapping };
    assert!(files.open(&zero).file.is_none(), "a device was opened");
    assert_eq!(files.stats().failed, 2);
}

#[test]
fn the_vdso_has_names() {
    use object::{Object, ObjectSymbol};
    let pid = std::process::id();
    let image = image(pid, &mut table());
    let vdso = image.mappings.iter().find(|mapping| matches!(mapping.kind, MappingKind::Vdso)).unwrap();
    let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&File::open("/proc/self/mem").unwrap(), &mut bytes, vdso.start)
        .unwrap();
    let elf = object::File::parse(bytes.as_slice()).unwrap();
    let symbol =
        elf.dynamic_symbols().find(|symbol| symbol.name().unwrap().ends_with("clock_gettime")).unwrap();
    let user = [vdso.start + symbol.address() + 2];
    let profile = symbolize(
        &new_symbolizer(),
        raw(key(pid), image.clone(), vec![stack(&[], &user, StackEnd::Complete)]),
    );
    let found = names(&profile);
    assert!(found[0][0].ends_with("clock_gettime"), "{found:?}");
    assert!(profile.mapping.iter().any(|mapping| text(&profile, mapping.filename) == "[vdso]"));
}

#[test]
fn kernel_frames_have_names_under_the_kernels_mapping() {
    let kallsyms = fs::read_to_string("/proc/kallsyms").unwrap();
    let (address, name) = kallsyms
        .lines()
        .filter_map(|line| line.split_once(" T "))
        .find(|(_, name)| *name == "vfs_read")
        .expect("vfs_read is in /proc/kallsyms");
    let address = u64::from_str_radix(address, 16).unwrap();
    assert_ne!(address, 0, "the test needs to see kernel addresses: run it as root");
    let pid = std::process::id();
    let kernel = [address, address + 1];
    let profile = symbolize(
        &new_symbolizer(),
        raw(key(pid), Arc::default(), vec![stack(&kernel, &[], StackEnd::None)]),
    );
    assert_eq!(names(&profile), [[name], [name]]);
    assert_eq!(text(&profile, profile.mapping[0].filename), "[kernel.kallsyms]");
}

#[test]
fn code_made_at_run_time_is_named_by_its_perf_map() {
    let pid = std::process::id();
    // SAFETY: a new mapping that nothing else refers to.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    } as u64;
    let path = format!("/tmp/perf-{pid}.map");
    fs::write(&path, format!("{page:x} 40 LazyCompile:*checkout\x1b[31m /app/shop.js:12\n")).unwrap();
    let image = image(pid, &mut table());
    let symbolizer = new_symbolizer();
    let named = |key| {
        let stacks = vec![stack(&[], &[page + 8], StackEnd::Complete)];
        symbolize(&symbolizer, raw(key, image.clone(), stacks))
    };
    let profile = named(key(pid));
    // Another process with the same PID has its own functions.
    let stranger = named(ProcessKey { start_boottime_ns: 1, ..key(pid) });
    fs::remove_file(&path).unwrap();
    assert_eq!(names(&profile), [["LazyCompile:*checkout?[31m /app/shop.js:12"]]);
    assert_eq!(text(&profile, profile.mapping.last().unwrap().filename), "[anon]");
    assert_eq!(names(&stranger), [Vec::<String>::new()]);
}

#[test]
fn a_file_that_is_cut_while_it_is_read_does_no_harm() {
    let program = start_c(&["-g"]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("library");
    fs::copy(&program.path, &path).unwrap();
    let mapped = mapped_image(&path);
    let symbolizer = new_symbolizer();
    let pid = std::process::id();
    // So that the debug information is mapped into memory.
    let first = raw(key(pid), mapped.clone(), vec![stack(&[], &[0x1000_1000], StackEnd::Complete)]);
    symbolize(&symbolizer, first);
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    let everywhere: Vec<u64> = (0x1000_0000..0x1000_4000).step_by(16).collect();
    let profile =
        symbolize(&symbolizer, raw(key(pid), mapped, vec![stack(&[], &everywhere, StackEnd::Complete)]));
    assert_eq!(profile.sample[0].location_id.len(), everywhere.len());
    // The next file is read as before.
    assert_eq!(
        names(&symbolize(
            &symbolizer,
            raw(
                key(program.child.id()),
                image(program.child.id(), &mut table()),
                vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)]
            )
        )),
        [["inner", "holder"]]
    );
}

/// Returns an image with the complete file mapped at 0x10000000.
fn mapped_image(path: &Path) -> Arc<Image> {
    let file = File::open(path).unwrap();
    let metadata = file.metadata().unwrap();
    let mapped = MappedFile::opened(path.to_str().unwrap(), metadata.dev(), metadata.ino(), file);
    let kind = MappingKind::File(Arc::new(mapped));
    Arc::new(Image { mappings: vec![Mapping { start: 0x1000_0000, end: 0x1010_0000, offset: 0, kind }] })
}

#[test]
fn compressed_mini_debug_info_names_a_stripped_program() {
    let (directory, path) = compile_c(&[]);
    let inside = |name: &str| directory.path().join(name);
    // As distributions do it: only the symbols of functions, compressed, in a section of the stripped file.
    run_tool(Command::new("objcopy").args(["--only-keep-debug"]).args([&path, &inside("mini")]));
    run_tool(Command::new("xz").arg(inside("mini")));
    run_tool(
        Command::new("objcopy")
            .arg("--strip-all")
            .arg("--add-section")
            .arg(format!(".gnu_debugdata={}", inside("mini.xz").display()))
            .args([&path, &inside("stripped")]),
    );
    let stripped = inside("stripped");
    let program = start(directory, stripped);
    assert_eq!(names_of(&program, &[program.addresses["leaf"]]), [["leaf"]]);
}

/// Checks the form that linkers write for libraries with several versions of a function.
#[test]
fn a_function_is_named_without_the_version_behind_its_name() {
    let (directory, path) = compile_c(&[]);
    run_tool(Command::new("objcopy").args(["--redefine-sym", "leaf=leaf@@GANNET_1.0"]).arg(&path));
    let program = start(directory, path);
    assert_eq!(names_of(&program, &[program.addresses["leaf"]]), [["leaf"]]);
}

/// Returns the frame of the inlined function with its lines, innermost first, and the number of files whose debug information
/// was given up.
#[track_caller]
fn inner_frame(program: &Program, config: SymbolizerConfig) -> (Vec<(String, i64)>, u64) {
    let pid = program.child.id();
    let symbolizer = Symbolizer::start(config).unwrap();
    let stacks = vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)];
    let profile = symbolize(&symbolizer, raw(key(pid), image(pid, &mut table()), stacks));
    let [frame] = &names(&profile)[..] else { panic!("one frame") };
    let lines = profile.location[0].line.iter().map(|line| line.line);
    let frame = frame.iter().cloned().zip(lines).collect();
    (frame, symbolizer.stats().unusable_debug_info.load(Ordering::Relaxed))
}

/// Checks that compression never costs lines and inlined functions in silence.
#[rstest]
#[case::zlib("zlib-gabi", true)]
#[case::zstd("zstd", true)]
#[case::without_section_flag("zlib-gnu", false)]
fn compressed_debug_info_has_the_same_lines(#[case] form: &str, #[case] is_known: bool) {
    let plain = inner_frame(&start_c(&["-g"]), config());
    assert_eq!(plain.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["inner", "holder"]);
    let (directory, path) = compile_c(&["-g"]);
    run_tool(Command::new("objcopy").arg(format!("--compress-debug-sections={form}")).arg(&path));
    let found = inner_frame(&start(directory, path), config());
    assert_eq!(found, if is_known { plain } else { (vec![("holder".to_owned(), 0)], 1) });
}

/// Checks compressed sections of an unknown form, with damaged content, and that are cut.
#[test]
fn damaged_compressed_debug_info_is_counted() {
    use object::{Object, ObjectSection};
    for damage in [
        |bytes: &mut [u8], _: usize| bytes[..4].copy_from_slice(&77u32.to_le_bytes()),
        |bytes: &mut [u8], length: usize| bytes[24..length].fill(0x55),
        |bytes: &mut [u8], length: usize| bytes[length / 2..length].fill(0),
    ] {
        let (directory, path) = compile_c(&["-g", "-gz=zlib"]);
        let mut bytes = fs::read(&path).unwrap();
        let elf = object::File::parse(bytes.as_slice()).unwrap();
        let section = elf.section_by_name(".debug_info").unwrap().compressed_file_range().unwrap();
        // The header of 24 bytes stands before the content.
        let (offset, length) = (section.offset as usize - 24, section.compressed_size as usize + 24);
        damage(&mut bytes[offset..], length);
        fs::write(&path, bytes).unwrap();
        let found = inner_frame(&start(directory, path), config());
        assert_eq!(found, (vec![("holder".to_owned(), 0)], 1));
    }
}

/// Debug information of `holder` whose name stands in another file, as `dwz` writes it, by hand.
const SHARED_NAME: &str = r#"
.section .debug_abbrev, "", %progbits
abbreviations:
/* compile unit, with children: low_pc, high_pc */
.byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x07, 0, 0
/* subprogram: name (DW_FORM_GNU_strp_alt), low_pc, high_pc */
.byte 2, 0x2e, 0, 0x03, 0xa1, 0x3e, 0x11, 0x01, 0x12, 0x07, 0, 0
.byte 0
.section .debug_info, "", %progbits
.long after - before
before:
.short 4
.long abbreviations
.byte 8
.byte 1
.quad holder, 64
.byte 2
.long 1
.quad holder, 64
.byte 0
after:
.section .note.GNU-stack, "", %progbits
"#;

/// Checks debug files that share a part of their information in another one: it counts only if it is installed in a directory
/// of debug files, under its build id or the path in the link, and has that build id.
#[test]
fn debug_info_shared_between_files_is_read() {
    let (directory, path) = compile_c(&["-Wl,--build-id=0xabcdef0123456789"]);
    let inside = |name: &str| directory.path().join(name);
    let assemble = |name: &str, source: &str, flags: &[&str]| {
        fs::write(inside("source.s"), source).unwrap();
        run_tool(Command::new("gcc").args(flags).arg("-o").args([inside(name), inside("source.s")]));
        inside(name)
    };
    // The shared file: a string and an empty unit.
    let shared = assemble(
        "shared.debug",
        ".section .debug_str, \"\", %progbits\n.asciz \"\", \"by_shared_file\"\n\
         .section .debug_abbrev, \"\", %progbits\na:\n.byte 1, 0x11, 0, 0, 0, 0\n\
         .section .debug_info, \"\", %progbits\n.long 8\n.short 4\n.long a\n.byte 8, 1\n",
        &["-shared", "-nostdlib", &format!("-Wl,--build-id=0x{}", "77".repeat(20))],
    );
    let start_of_holder = {
        use object::{Object, ObjectSymbol};
        let bytes = fs::read(&path).unwrap();
        let elf = object::File::parse(bytes.as_slice()).unwrap();
        elf.symbols().find(|symbol| symbol.name() == Ok("holder")).unwrap().address()
    };
    let debug_info =
        assemble("info.o", &SHARED_NAME.replace("holder", &start_of_holder.to_string()), &["-c"]);
    let debug_dir = tempfile::tempdir().unwrap();
    let kept = debug_dir.path().join(".build-id/ab/cdef0123456789.debug");
    fs::create_dir_all(kept.parent().unwrap()).unwrap();
    run_tool(Command::new("objcopy").arg("--only-keep-debug").args([&path, &kept]));
    for section in [".debug_info", ".debug_abbrev"] {
        let part = inside("part");
        // The assembler leaves the offset of the abbreviations to the linker; it is 0.
        run_tool(
            Command::new("objcopy")
                .args(["-O", "binary", "--only-section", section, "--set-section-flags"])
                .arg(format!("{section}=alloc"))
                .args([&debug_info, &part]),
        );
        run_tool(
            Command::new("objcopy")
                .arg("--add-section")
                .arg(format!("{section}={}", part.display()))
                .arg(&kept),
        );
    }
    run_tool(Command::new("strip").arg(&path));
    let plain = debug_dir.path().join("plain.debug");
    fs::rename(&kept, &plain).unwrap();
    let program = start(directory, path);
    let linked = |to: &str| {
        let link = debug_dir.path().join("link");
        fs::write(&link, [to.as_bytes(), &[0], &[0x77; 20]].concat()).unwrap();
        run_tool(
            Command::new("objcopy")
                .arg("--add-section")
                .arg(format!(".gnu_debugaltlink={}", link.display()))
                .args([&plain, &kept]),
        );
        let debug_dirs = vec![debug_dir.path().to_owned()];
        let (frame, unusable) = inner_frame(&program, SymbolizerConfig { debug_dirs, ..config() });
        (frame.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" "), unusable)
    };
    let good = ("by_shared_file".to_owned(), 0);
    let given_up = ("holder".to_owned(), 1);
    // Outside of the directory, or not there, the symbol table names the function.
    assert_eq!(linked(shared.to_str().unwrap()), given_up);
    assert_eq!(linked("/nowhere"), given_up);
    // By the path in the link, absolute and relative to the debug file.
    let dwz = debug_dir.path().join(".dwz/shared.debug");
    fs::create_dir_all(dwz.parent().unwrap()).unwrap();
    fs::copy(&shared, &dwz).unwrap();
    assert_eq!(linked(dwz.to_str().unwrap()), good);
    assert_eq!(linked("../../.dwz/shared.debug"), good);
    // Another build id.
    let bytes = fs::read(&dwz).unwrap();
    let other: Vec<u8> = bytes.iter().map(|byte| if *byte == 0x77 { 0x78 } else { *byte }).collect();
    fs::write(&dwz, other).unwrap();
    assert_eq!(linked(dwz.to_str().unwrap()), given_up);
    // By the build id alone.
    let by_id = debug_dir.path().join(format!(".build-id/77/{}.debug", "77".repeat(19)));
    fs::create_dir_all(by_id.parent().unwrap()).unwrap();
    fs::copy(&shared, &by_id).unwrap();
    assert_eq!(linked("/nowhere"), good);
}

/// Checks a stack that has fewer frames than the limit, and more of them with its inlined functions.
#[test]
fn a_stack_of_many_inlined_functions_is_cut_with_a_mark() {
    let program = start_c(&["-g"]);
    let pid = program.child.id();
    let (inner, leaf) = (program.addresses["inner"], program.addresses["leaf"]);
    let named = |callers: usize| {
        // Of a caller the byte before the address counts.
        let user: Vec<u64> = std::iter::once(leaf).chain(std::iter::repeat_n(inner + 1, callers)).collect();
        let symbolizer = new_symbolizer();
        let stacks = vec![stack(&[], &user, StackEnd::Complete)];
        let profile = symbolize(&symbolizer, raw(key(pid), image(pid, &mut table()), stacks));
        (names(&profile).concat(), symbolizer.stats().cut_stacks.load(Ordering::Relaxed))
    };
    let (whole, cut) = named(511);
    assert_eq!((whole.len(), whole.last().map(String::as_str), cut), (1023, Some("holder"), 0));
    let (frames, cut) = named(512);
    assert_eq!((frames.last().map(String::as_str), cut), (Some("[truncated]"), 3));
    assert!((1020..=1024).contains(&frames.len()) && frames[0] == "leaf", "{} frames", frames.len());
    assert_eq!(frames[1..3], ["inner", "holder"]);
}

/// Checks that pprof does not look into the file that stands at the path by now: neither for functions with names nor for those
/// without.
#[rstest]
#[case::named(false)]
#[case::stripped(true)]
fn pprof_does_not_name_frames_again(#[case] is_stripped: bool) {
    let (directory, path) = compile_c(&[]);
    if is_stripped {
        run_tool(Command::new("strip").arg(&path));
    }
    let program = start(directory, path);
    let pid = program.child.id();
    let stacks =
        vec![stack(&[], &[program.addresses["leaf"], program.addresses["outer"]], StackEnd::Complete)];
    let profile = symbolize(&new_symbolizer(), raw(key(pid), image(pid, &mut table()), stacks));
    assert!(profile.mapping.iter().all(|mapping| mapping.has_functions));
    let file = program.path.with_extension("pb.gz");
    fs::write(&file, pprof::encode(&profile)).unwrap();
    let print = |form: &str| {
        let output = Command::new("go").args(["tool", "pprof", form]).arg(&file).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{form}");
        assert!(output.status.success(), "{form}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let before = ["-top", "-raw", "-traces"].map(print);
    assert_eq!(before[0].contains("leaf"), !is_stripped, "{}", before[0]);
    // Another program at the same path, with other names at the same addresses.
    let (_other, other) = compile_c(&["-g", "-Dleaf=wrong", "-Douter=wronger"]);
    fs::remove_file(&program.path).unwrap();
    fs::copy(&other, &program.path).unwrap();
    assert_eq!(["-top", "-raw", "-traces"].map(print), before);
}

#[rstest]
#[case::by_build_id(true)]
#[case::by_name_and_checksum(false)]
fn a_separate_debug_file_is_found(#[case] has_build_id: bool) {
    let (directory, path) = compile_c(&[
        "-g",
        if has_build_id { "-Wl,--build-id=0xabcdef0123456789" } else { "-Wl,--build-id=none" },
    ]);
    let debug_dir = tempfile::tempdir().unwrap();
    let kept = if has_build_id {
        debug_dir.path().join(".build-id/ab/cdef0123456789.debug")
    } else {
        debug_dir.path().join(directory.path().strip_prefix("/").unwrap()).join("program.debug")
    };
    fs::create_dir_all(kept.parent().unwrap()).unwrap();
    run_tool(Command::new("objcopy").arg("--only-keep-debug").args([&path, &kept]));
    run_tool(Command::new("strip").arg(&path));
    run_tool(Command::new("objcopy").arg(format!("--add-gnu-debuglink={}", kept.display())).arg(&path));
    let program = start(directory, path);
    let pid = program.child.id();
    let named = |debug_dirs| {
        let config = SymbolizerConfig { debug_dirs, ..config() };
        let image = image(pid, &mut table());
        let stacks = vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)];
        names(&symbolize(&Symbolizer::start(config).unwrap(), raw(key(pid), image, stacks)))
    };
    assert_eq!(named(vec![debug_dir.path().to_owned()]), [["inner", "holder"]]);
    assert_eq!(named(vec![]), [Vec::<String>::new()]);
    // Debug information of another program in the same place is not used.
    let (_other, other) = compile_c(&["-g", "-Wl,--build-id=0x1111111111111111", "-Dinner=wrong"]);
    fs::copy(&other, &kept).unwrap();
    assert_eq!(named(vec![debug_dir.path().to_owned()]), [Vec::<String>::new()]);
}

/// A function with debug information that is written by hand.
const HOSTILE: &str = r#"
.text
.globl main
.type main, %function
main:
.file 1 "hostile.c"
.loc 1 7
nop
nop
.size main, . - main
.section .debug_abbrev, "", %progbits
abbreviations:
/* compile unit, with children: low_pc, high_pc, stmt_list */
.byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x07, 0x10, 0x17, 0, 0
/* subprogram, with children: name, low_pc, high_pc */
.byte 2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x07, 0, 0
/* inlined subroutine, with children: nothing else */
.byte 3, 0x1d, 1, 0, 0
.byte 0
.section .debug_info, "", %progbits
.long after - before
before:
.short 4
.long abbreviations
.byte 8
.byte 1
.quad main, 2
.long 0
.byte 2
.asciz "by_debug_info"
.quad main, 2
.fill NESTING, 1, 3
.fill NESTING + 2, 1, 0
after:
.section .debug_line, "", %progbits
.section .note.GNU-stack, "", %progbits
"#;

/// Returns the name of the file's only function, and the number of files whose debug information was given up.
fn name_with_nesting(nesting: usize) -> (Vec<Vec<String>>, u64) {
    use object::{Object, ObjectSection, ObjectSymbol};
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("hostile.s"), directory.path().join("hostile"));
    fs::write(&source, HOSTILE.replace("NESTING", &nesting.to_string())).unwrap();
    run_tool(Command::new("gcc").arg("-o").args([&path, &source]));
    let bytes = fs::read(&path).unwrap();
    let elf = object::File::parse(bytes.as_slice()).unwrap();
    let text = elf.section_by_name(".text").unwrap();
    let main = elf.symbols().find(|symbol| symbol.name() == Ok("main")).unwrap().address();
    let address = 0x1000_0000 + text.file_range().unwrap().0 + main - text.address();
    let symbolizer = new_symbolizer();
    let stacks = vec![stack(&[], &[address], StackEnd::Complete)];
    let profile = symbolize(&symbolizer, raw(key(std::process::id()), mapped_image(&path), stacks));
    (names(&profile), symbolizer.stats().unusable_debug_info.load(Ordering::Relaxed))
}

#[test]
fn debug_info_that_nests_without_end_ends_only_its_reader() {
    assert_eq!(name_with_nesting(10), (vec![vec!["by_debug_info".to_owned()]], 0));
    assert_eq!(name_with_nesting(20_000_000), (vec![vec!["main".to_owned()]], 1));
}

#[test]
fn debug_info_that_claims_to_be_huge_ends_only_its_reader() {
    use object::{Object, ObjectSection};
    let (_directory, path) = compile_c(&["-g", "-gz=zlib"]);
    let mut bytes = fs::read(&path).unwrap();
    let elf = object::File::parse(bytes.as_slice()).unwrap();
    let (offset, _) = elf
        .section_by_name(".debug_info")
        .unwrap()
        .compressed_file_range()
        .map(|range| (range.offset, range))
        .unwrap();
    // `Elf64_Chdr`, right before the content: type, reserved, size, alignment.
    let size = offset as usize - 16;
    bytes[size..size + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let symbolizer = new_symbolizer();
    let stacks = vec![stack(&[], &[0x1000_1200], StackEnd::Complete)];
    symbolize(&symbolizer, raw(key(std::process::id()), mapped_image(&path), stacks));
    assert_eq!(symbolizer.stats().unusable_debug_info.load(Ordering::Relaxed), 1);
}

#[test]
fn a_reader_that_does_not_answer_is_not_waited_for() {
    let program = start_c(&["-g"]);
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("sleeper");
    fs::write(&script, "#!/bin/sh\nexec sleep 60\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let sleeper = Symbolizer::start(SymbolizerConfig { debug_reader: Some(script), ..config() }).unwrap();
    let pid = program.child.id();
    let stacks = vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)];
    let begin = Instant::now();
    let profile = symbolize(&sleeper, raw(key(pid), image(pid, &mut table()), stacks));
    assert_eq!(names(&profile), [["holder"]]);
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(sleeper.stats().unusable_debug_info.load(Ordering::Relaxed), 1);
    // The next file does not wait either: the time is used up for all files.
    let other = start_c(&["-g"]);
    let stacks = vec![stack(&[], &[other.addresses["inner"]], StackEnd::Complete)];
    let pid = other.child.id();
    let begin = Instant::now();
    let profile = symbolize(&sleeper, raw(key(pid), image(pid, &mut table()), stacks));
    assert_eq!(names(&profile), [["holder"]]);
    assert!(begin.elapsed() < Duration::from_secs(2));
}

/// Returns the counts of addresses whose debug information was not read: too large, no time, unusable, in a large perf map.
fn skipped(symbolizer: &Symbolizer) -> Vec<u64> {
    symbolizer.stats().skipped().map(|(_, count)| count).collect()
}

/// Checks that names, inlined functions and lines never get lost in silence.
#[test]
fn debug_info_that_is_not_read_is_counted_with_the_reason() {
    let program = start_c(&["-g"]);
    let pid = program.child.id();
    let wanted = DebugCost::WANTED;
    for (debug_cost, name, counts) in [
        (wanted, "inner", [0, 0, 0, 0]),
        (DebugCost { file_bytes: 100, ..wanted }, "holder", [1, 0, 0, 0]),
        (DebugCost { memory_bytes: 0, ..wanted }, "holder", [0, 0, 1, 0]),
    ] {
        let symbolizer = Symbolizer::start(SymbolizerConfig { debug_cost, ..config() }).unwrap();
        for _ in 0..2 {
            let stacks = vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)];
            let profile = symbolize(&symbolizer, raw(key(pid), image(pid, &mut table()), stacks));
            assert_eq!(names(&profile)[0][0], name, "{debug_cost:?}");
            assert_eq!(skipped(&symbolizer), counts, "{debug_cost:?}: each address once");
        }
    }
}

/// Checks that a file that had to wait for its debug information gets it as soon as there is time.
#[test]
fn an_address_without_time_for_debug_info_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("reader");
    let answer = r#"{"Ok":[[{"name":"by_debug_info","file":"x.c","line":1,"column":0,"start_line":0}]]}"#;
    fs::write(&script, format!("#!/bin/sh\necho '{answer}'\n")).unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let debug_cost = DebugCost { time: Duration::ZERO, ..DebugCost::WANTED };
    let config = SymbolizerConfig { debug_reader: Some(script), debug_cost, ..config() };
    let symbolizer = Symbolizer::start(config).unwrap();
    let (first, second) = (start_c(&["-g"]), start_c(&["-g3"]));
    let mut files = table();
    let mut name = |program: &Program| {
        let pid = program.child.id();
        let stacks = vec![stack(&[], &[program.addresses["inner"]], StackEnd::Complete)];
        let profile = symbolize(&symbolizer, raw(key(pid), image(pid, &mut files), stacks));
        names(&profile)[0][0].clone()
    };
    assert_eq!(name(&first), "by_debug_info");
    // A hundred times the script's run time has to pass.
    assert_eq!(name(&second), "holder");
    assert_eq!(name(&second), "holder");
    assert_eq!(skipped(&symbolizer), [0, 1, 0, 0]);
    let end = Instant::now() + Duration::from_secs(60);
    while name(&second) != "by_debug_info" {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(skipped(&symbolizer), [0, 1, 0, 0]);
}

#[test]
fn a_known_address_is_not_read_again() {
    let (_directory, path) = compile_c(&["-g", "-no-pie"]);
    let mapped = mapped_image(&path);
    let symbolizer = new_symbolizer();
    let everywhere: Vec<u64> = (0x1000_1000..0x1000_1400).step_by(16).collect();
    let look = || {
        let stacks = vec![stack(&[], &everywhere, StackEnd::Complete)];
        names(&symbolize(&symbolizer, raw(key(std::process::id()), Arc::clone(&mapped), stacks)))
    };
    let first = look();
    assert!(first.iter().flatten().any(|name| name == "holder"), "{first:?}");
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(look(), first);
    assert!(symbolizer.stats().cached_bytes.load(Ordering::Relaxed) > 0);
}

#[test]
fn files_with_the_same_content_are_read_once() {
    let (directory, path) = compile_c(&["-g", "-no-pie"]);
    let copy = directory.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    let symbolizer = new_symbolizer();
    let everywhere: Vec<u64> = (0x1000_1000..0x1000_1400).step_by(16).collect();
    let look = |path: &Path| {
        let stacks = vec![stack(&[], &everywhere, StackEnd::Complete)];
        let found = symbolize(&symbolizer, raw(key(std::process::id()), mapped_image(path), stacks));
        (names(&found), symbolizer.stats().cached_bytes.load(Ordering::Relaxed))
    };
    let (first, bytes) = look(&path);
    assert!(first.iter().flatten().any(|name| name == "holder") && bytes > 0, "{first:?}");
    assert_eq!(look(&copy), (first, bytes));
    // Another build is another file, whatever its name.
    let (_other, path) = compile_c(&["-g", "-no-pie", "-O1"]);
    assert!(look(&path).1 > bytes);
}

#[test]
fn a_full_queue_returns_the_profile() {
    let symbolizer = Symbolizer::start(SymbolizerConfig { queue: 1, ..config() }).unwrap();
    let pid = std::process::id();
    // Reading the kernel's symbols takes so long that the other requests queue up.
    let one = || raw(key(pid), Arc::default(), vec![stack(&[1 << 63], &[], StackEnd::None)]);
    let results: Vec<_> = (0..50).map(|_| symbolizer.try_symbolize(vec![one()])).collect();
    let refused = results.iter().filter(|result| result.is_err()).count();
    assert!(refused > 0);
    for result in results {
        match result {
            Ok(answer) => assert_eq!(answer.blocking_recv().unwrap()[0].sample.len(), 1),
            Err(error) => {
                assert!(error.to_string().contains("behind"), "{error}");
                let gannet_agent::symbols::SymbolizerError::Full(1, raw) = error else { panic!("{error:?}") };
                assert_eq!(raw[0].processes[0].stacks[0].count, 3);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// A damaged file costs bounded time, ends nothing, and leaves the others readable.
    #[test]
    fn damaged_files_are_read_without_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        head in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        thread_local! {
            static WHOLE: Vec<u8> = fs::read(compile_c(&["-g"]).1).unwrap();
            static SYMBOLIZER: Symbolizer = new_symbolizer();
        }
        let mut bytes = WHOLE.with(Clone::clone);
        for (at, value) in changes {
            *at.get_mut(&mut bytes) = value;
        }
        for (at, value) in head {
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let user: Vec<u64> = (0x1000_0000..0x1000_4000).step_by(64).collect();
        let stacks = vec![stack(&[], &user, StackEnd::Complete)];
        let begin = Instant::now();
        let raw = raw(key(std::process::id()), mapped_image(file.path()), stacks);
        let profile = SYMBOLIZER.with(|symbolizer| symbolize(symbolizer, raw));
        prop_assert_eq!(profile.sample.len(), 1);
        prop_assert!(begin.elapsed() < Duration::from_secs(15));
    }
}
