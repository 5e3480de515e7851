//! Programs that other profilers got wrong in the field: threads that outlive the first one, code that moves, more mappings
//! than usual, and CPUs that go off and on.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::mpsc,
    thread::{self, sleep},
    time::Duration,
};

use gannet_proto::{
    pprof::{self, FlameTree, Side},
    profiles::Profile,
};

use crate::common::{
    Recording, Running, agent, cpu::CpuOne, in_order, is_marked, program, record_for, slower,
};

const DEAD_LEADER: &str = include_str!("../data/cases/dead_leader.c");
const MOVED_TEXT: &str = include_str!("../data/cases/moved_text.c");
const ASM_LABELS: &str = include_str!("../data/cases/asm_labels.c");
const MANY_MAPPINGS: &str = include_str!("../data/cases/many_mappings.c");

/// Starts a program and lets it come to its loop.
fn started(program: &Path, arguments: &[&str]) -> Running {
    let running = Running::start(Command::new(program).args(arguments));
    sleep(Duration::from_secs(1) * slower());
    running
}

/// Records a program that starts while the agent follows processes.
#[track_caller]
fn record_from_the_start(program: &Path) -> Recording {
    let (end, ended) = mpsc::channel::<()>();
    let path = program.to_owned();
    let starter = thread::spawn(move || {
        sleep(Duration::from_secs(2) * slower());
        let running = Running::start(&mut Command::new(path));
        let _ = ended.recv();
        drop(running);
    });
    let comm = program.file_name().unwrap().to_str().unwrap();
    let recording = record_for(5, 99, &["--comm", comm]);
    drop(end);
    starter.join().unwrap();
    recording
}

/// Checks that nearly all samples of a function are complete, with these frames.
#[track_caller]
fn assert_complete(recording: &Recording, leaf: &str, frames: &[&str]) {
    let whole = |stack: &[String]| in_order(stack, frames) && !is_marked(stack);
    let (good, all) = recording.share(leaf, whole);
    let odd = recording.odd_ones(leaf, whole);
    let seen: u64 = recording.stacks.iter().map(|(_, count)| count).sum();
    assert!(all > 10 && good * 100 >= all * 98, "{good} of {all} of {seen}: {odd:?}\n{}", recording.log);
}

#[test]
fn a_process_whose_first_thread_has_ended_has_names() {
    let program = program("dead_leader", DEAD_LEADER, &["-pthread"]);
    let running = started(&program, &[]);
    for filter in [["--pid", &running.0.id().to_string()], ["--comm", "dead_leader"]] {
        let recording = record_for(2, 99, &filter);
        assert_complete(&recording, "dead_leader_leaf", &["dead_leader", "spin", "dead_leader_leaf"]);
    }
    drop(running);
    let recording = record_from_the_start(&program);
    assert_complete(&recording, "dead_leader_leaf", &["dead_leader", "spin", "dead_leader_leaf"]);
}

/// Checks a library that another thread opens after the first thread has ended, and a program whose name was deleted.
#[test]
fn a_library_is_named_after_the_first_thread_ended() {
    let library = program(
        "late.so",
        "volatile unsigned long n;
         __attribute__((noinline)) void late_leaf(void) { for (int i = 0; i < 1000; i++) n += i; }",
        &["-shared", "-fPIC"],
    );
    let source = r#"#include <dlfcn.h>
        #include <pthread.h>
        #include <unistd.h>
        static const char *path;
        __attribute__((noinline)) void late_spin(void) {
          sleep(3);
          void (*leaf)(void) = dlsym(dlopen(path, RTLD_NOW), "late_leaf");
          for (;;) leaf();
        }
        static void *run(void *x) { late_spin(); return x; }
        int main(int c, char **v) { path = v[1]; pthread_t t; pthread_create(&t, 0, run, 0); pthread_exit(0); }"#;
    let original = program("late_leader", source, &["-pthread", "-ldl"]);
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("late_leader");
    fs::copy(original, &copy).unwrap();
    let running = started(&copy, &[library.to_str().unwrap()]);
    fs::remove_file(&copy).unwrap();
    let recording = record_for(6, 99, &["--pid", &running.0.id().to_string()]);
    assert_complete(&recording, "late_leaf", &["late_leader", "run", "late_spin", "late_leaf"]);
}

/// Records the program twice: it moves its text before the agent starts, and while the agent follows it.
#[track_caller]
fn assert_moved_text_has_names(program: &Path) {
    let running = started(program, &[]);
    let recording = record_for(2, 99, &["--pid", &running.0.id().to_string()]);
    assert_complete(&recording, "moved_leaf", &["main", "moved_middle", "moved_leaf"]);
    drop(running);
    let recording = record_from_the_start(program);
    assert_complete(&recording, "moved_leaf", &["main", "moved_middle", "moved_leaf"]);
}

#[test]
fn text_that_moved_before_the_agent_started_has_names() {
    let program = program("moved_text", MOVED_TEXT, &[]);
    assert_moved_text_has_names(&program);
}

/// Checks the other ways to move text: memory that replaces the file in place, while the agent follows, and a part of it only.
#[test]
fn text_that_memory_replaces_in_place_has_names() {
    let source = MOVED_TEXT
        .replace("mremap(t, e - s, e - s, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)s);", "replace(s, e, t);");
    assert_ne!(source, MOVED_TEXT);
    // The function that replaces the program's text lies in a library.
    let library = program(
        "libreplace.so",
        "#define _GNU_SOURCE
         #include <string.h>
         #include <sys/mman.h>
         void replace(unsigned long s, unsigned long e, void *t) {
           mmap((void *)s, e - s, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
           memcpy((void *)s, t, e - s);
           mprotect((void *)s, e - s, PROT_READ | PROT_EXEC);
         }",
        &["-shared", "-fPIC"],
    );
    let program = program("replaced_text", &source, &[library.to_str().unwrap()]);
    assert_moved_text_has_names(&program);
}

/// Checks assembly without frame information: with labels inside, between other functions, with a frame, without symbols, without
/// types, and called by address alone.
#[test]
#[cfg(target_arch = "x86_64")]
fn stacks_go_on_under_assembly_without_frames() {
    let middle = r#"__attribute__((noinline)) void before(void) { __asm__ volatile(""); }
        __asm__(".globl outer_asm\nouter_asm:\n push %rbx\n sub $72,%rsp\n mov $100000000,%rax\n"
                "outer_asm.loop:\n dec %rax\n jnz outer_asm.loop\n add $72,%rsp\n pop %rbx\n ret\n");
        __attribute__((noinline)) void after(void) { __asm__ volatile(""); }
        void outer_asm(void);
        void (*volatile pointer)(void) = outer_asm;"#;
    let called = format!("{middle} int main(void) {{ for (;;) {{ before(); outer_asm(); after(); }} }}");
    let by_address = format!("{middle} int main(void) {{ for (;;) {{ before(); pointer(); after(); }} }}");
    for (name, source, flags) in [
        ("asm_labels", ASM_LABELS, &[][..]),
        ("asm_stripped", ASM_LABELS, &["-s"]),
        ("asm_middle", &called, &[]),
        ("asm_unaligned", &called, &["-falign-functions=1"]),
        ("asm_pointer", &by_address, &[]),
    ] {
        let running = started(&program(name, source, flags), &[]);
        let recording = record_for(2, 499, &["--pid", &running.0.id().to_string()]);
        if flags.contains(&"-s") {
            // Without a name: the frames of the C library stand at the root.
            let whole = |stack: &&(Vec<String>, u64)| stack.0.contains(&"__libc_start_call_main".to_owned());
            let (good, all): (Vec<_>, Vec<_>) =
                (recording.stacks.iter().filter(whole).collect(), recording.stacks.iter().collect());
            let sum = |of: &[&(Vec<String>, u64)]| of.iter().map(|(_, count)| count).sum::<u64>();
            assert!(sum(&all) > 10 && sum(&good) * 100 >= sum(&all) * 98, "{:?}", recording.stacks);
        } else {
            assert_complete(&recording, "outer_asm", &[name, "main", "outer_asm"]);
        }
    }
}

/// Checks the mark of frames that were guessed: code without a file calls a function by frame pointer, in one program of two.
#[test]
#[cfg(target_arch = "x86_64")]
fn frames_found_by_frame_pointer_alone_are_marked() {
    let of = |name: &str, call: &str| {
        let source = format!(
            r"#include <string.h>
            #include <sys/mman.h>
            volatile unsigned long n;
            __attribute__((noinline)) void called_leaf(void) {{ for (long i = 0; i < 1000000; i++) n += i; }}
            int main(void) {{
              unsigned char code[] = {{0x55, 0x48, 0x89, 0xe5, 0xff, 0xd7, 0x5d, 0xc3}};
              void *at = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
              memcpy(at, code, sizeof code);
              for (;;) {call};
            }}"
        );
        let running = started(&program(name, &source, &[]), &[]);
        let recording = record_for(2, 499, &["--pid", &running.0.id().to_string()]);
        assert_complete(&recording, "called_leaf", &[name, "main", "called_leaf"]);
        let profile = &recording.profile;
        let text = |at: i64| profile.string_table[at as usize].as_str();
        let is_guessed = |sample: &&gannet_proto::profiles::Sample| {
            sample.label.iter().any(|label| (text(label.key), text(label.str)) == ("unwinding", "guessed"))
        };
        let marked: i64 = profile.sample.iter().filter(is_guessed).map(|sample| sample.value[0]).sum();
        let guessed = ["called_leaf", "[anon]", "main"].map(|name| guessed_share(profile, name));
        (marked as u64 * 100 / recording.delivered, guessed)
    };
    // The caller of the code without a file is guessed, and not that code: the table of the function that it calls finds it.
    let (marked, [leaf, code, main]) = of("by_pointer", "((void (*)(void (*)(void)))at)(called_leaf)");
    assert!(marked >= 95 && main >= 95, "{marked} % of the samples and {main} % of `main` are marked");
    assert!(
        leaf <= 1 && code <= 5,
        "{leaf} % of the leaf and {code} % of the code without a file are marked"
    );
    let (marked, guessed) = of("by_tables", "called_leaf()");
    assert!(marked <= 1 && guessed.iter().all(|share| *share <= 1), "{marked} %, {guessed:?} are marked");
}

/// Returns the share of a function's samples in which it rests on a guess, in hundredths; 0 for one that no sample has.
#[cfg(target_arch = "x86_64")]
fn guessed_share(profile: &Profile, name: &str) -> u64 {
    let mut tree = FlameTree::new();
    tree.add(profile, 0, Side::Main).unwrap();
    let nodes = pprof::flat(tree.prune(10_000));
    let of_name = nodes.iter().filter(|node| node.name == name);
    let (guessed, all) =
        of_name.fold((0, 0), |(guessed, all), node| (guessed + node.guessed, all + node.total));
    guessed * 100 / all.max(1)
}

/// Checks the mark of frames that a rule of a supplied table finds, if that rule says that it is a guess.
#[test]
#[cfg(target_arch = "x86_64")]
fn frames_by_a_guessed_rule_of_a_supplied_table_are_marked() {
    let source = r"
        volatile unsigned long n;
        __attribute__((noinline)) void inner_leaf(void) { for (long i = 0; i < 1000000; i++) n += i; n++; }
        __attribute__((noinline)) void outer_caller(void) { for (long i = 0; i < 1000; i++) inner_leaf(); n++; }
        int main(void) { for (;;) outer_caller(); }";
    let program = program("guessed_rule", source, &["-fno-omit-frame-pointer", "-momit-leaf-frame-pointer"]);
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("guessed_rule.unwind");
    let check = Command::new(agent())
        .args(["check", "--file", program.to_str().unwrap(), "--write-table", text.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
    let written = fs::read_to_string(&text).unwrap();
    // Inside of functions that keep a frame pointer, the same rule as a guess.
    let changed = written.replace("fp+16 fp=cfa-16", "fp+16 fp=cfa-16 guessed");
    assert_ne!(changed, written);
    let running = started(&program, &[]);
    for (table, least, most) in [(&written, 0, 1), (&changed, 95, 100)] {
        fs::write(&text, table).unwrap();
        let override_dir = directory.path().to_str().unwrap();
        let pid = running.0.id().to_string();
        let recording = record_for(2, 199, &["--pid", &pid, "--override-dir", override_dir]);
        assert_complete(&recording, "inner_leaf", &["guessed_rule", "main", "outer_caller", "inner_leaf"]);
        let share = guessed_share(&recording.profile, "main");
        assert!((least..=most).contains(&share), "{share} % of main are marked");
        // The leaf has no frame pointer, so its caller is found without a guess.
        let inner = ["inner_leaf", "outer_caller"].map(|name| guessed_share(&recording.profile, name));
        assert!(inner.iter().all(|share| *share <= 1), "{inner:?} % of the inner functions are marked");
    }
}

#[test]
fn a_library_above_20_000_mappings_has_names() {
    let program = program("many_mappings", MANY_MAPPINGS, &[]);
    for arguments in [&[][..], &["change"]] {
        let running = started(&program, arguments);
        let recording = record_for(3, 99, &["--pid", &running.0.id().to_string()]);
        let in_libc =
            |stack: &[String]| stack.iter().any(|name| name.contains("memset") || name.contains("strlen"));
        let samples: u64 = recording.stacks.iter().map(|(_, count)| count).sum();
        let marked: u64 =
            recording.stacks.iter().filter(|(stack, _)| is_marked(stack)).map(|(_, count)| count).sum();
        let named: u64 =
            recording.stacks.iter().filter(|(stack, _)| in_libc(stack)).map(|(_, count)| count).sum();
        assert!(
            samples > 10 && marked * 100 <= samples * 2,
            "{marked} of {samples} marked: {}",
            recording.log
        );
        // How much of its time the program is in libc depends on the CPU: strlen is fast with wide vectors.
        assert!(named > 0 && (!arguments.is_empty() || named * 10 > samples), "{named} of {samples} in libc");
        assert!(recording.lost.values().all(|count| *count == 0), "{:?}", recording.lost);
    }
}

/// Checks that thousands of changed mappings a second in one program do not hold up the news of another one's library.
#[test]
fn a_late_library_is_named_beside_thousands_of_mprotect() {
    let changing = started(&program("many_mappings", MANY_MAPPINGS, &[]), &["change"]);
    let library = program(
        "beside.so",
        "volatile unsigned long n;
         __attribute__((noinline)) void beside_leaf(void) { for (int i = 0; i < 1000; i++) n += i; }",
        &["-shared", "-fPIC"],
    );
    let source = r#"#include <dlfcn.h>
        #include <unistd.h>
        __attribute__((noinline)) int main(int c, char **v) {
          sleep(2);
          void (*leaf)(void) = dlsym(dlopen(v[1], RTLD_NOW), "beside_leaf");
          for (;;) leaf();
        }"#;
    let opener = started(&program("opener", source, &["-ldl"]), &[library.to_str().unwrap()]);
    let pids = [changing.0.id().to_string(), opener.0.id().to_string()];
    let recording = record_for(4, 99, &["--pid", &pids[0], &pids[1]]);
    assert_complete(&recording, "beside_leaf", &["opener", "main", "beside_leaf"]);
    assert!(recording.lost.values().all(|count| *count == 0), "{:?}", recording.lost);
}

/// Checks the mappings of a file too: a data file of which every other page is executable.
#[test]
fn a_library_above_20_000_file_mappings_has_names() {
    let source = r"#include <fcntl.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <unistd.h>
        int main(int c, char **v) {
          int f = open(v[1], O_RDWR | O_CREAT, 0600); char x[4096] = {1};
          ftruncate(f, 40000L * 4096);
          char *b = mmap(0, 40000L * 4096, PROT_READ, MAP_PRIVATE, f, 0);
          for (long i = 0; i < 40000; i += 2) mprotect(b + i * 4096, 4096, PROT_READ | PROT_EXEC);
          for (volatile unsigned long n = 0;;) n += strlen(memset(x, 'a', 4095));
        }";
    let program = program("many_files", source, &[]);
    let directory = tempfile::tempdir().unwrap();
    let running = started(&program, &[directory.path().join("data").to_str().unwrap()]);
    let recording = record_for(3, 99, &["--pid", &running.0.id().to_string()]);
    let samples: u64 = recording.stacks.iter().map(|(_, count)| count).sum();
    let whole: u64 = recording
        .stacks
        .iter()
        .filter(|(stack, _)| in_order(stack, &["main"]) && !is_marked(stack))
        .map(|(_, count)| count)
        .sum();
    assert!(samples > 10 && whole * 100 >= samples * 95, "{whole} of {samples}: {}", recording.log);
}

/// Records a program that is pinned to CPU 1 and starts at the end of these steps. A step waits for some seconds and then
/// takes the CPU offline, or back online. The CPU may be off before the agent starts.
#[track_caller]
fn assert_cpu_is_sampled_after(is_off: bool, steps: &'static [(u32, bool)]) {
    let cpu = CpuOne::borrow();
    let source = "volatile unsigned long n;
        __attribute__((noinline)) void pinned_leaf(void) { for (int i = 0; i < 1000; i++) n += i; }
        int main(void) { for (;;) pinned_leaf(); }";
    let program = program("pinned", source, &[]);
    let path = program.to_str().unwrap().to_owned();
    if is_off {
        cpu.set(false);
    }
    let (end, ended) = mpsc::channel::<()>();
    let toggle = thread::spawn(move || {
        for (seconds, online) in steps {
            sleep(Duration::from_secs(1) * *seconds * slower());
            cpu.set(*online);
        }
        let running = Running::start(Command::new("taskset").args(["-c", "1", &path]));
        eprintln!("the program runs");
        let _ = ended.recv();
        drop((running, cpu));
    });
    let recording = record_for(10, 99, &["--comm", "pinned"]);
    drop(end);
    toggle.join().unwrap();
    // It shares its CPU with the other programs of the machine.
    let (good, all) =
        recording.share("pinned_leaf", |stack| in_order(stack, &["pinned", "main"]) && !is_marked(stack));
    assert!(all > 20 && good * 100 >= all * 98, "{good} of {all}: {}", recording.log);
}

#[test]
fn a_cpu_that_goes_off_and_on_is_sampled_again() {
    assert_cpu_is_sampled_after(false, &[(3, false), (0, true)]);
}

#[test]
fn a_cpu_that_is_off_when_the_agent_starts_is_sampled_later() {
    assert_cpu_is_sampled_after(true, &[(3, true)]);
}

#[test]
fn a_cpu_that_stays_off_for_seconds_is_sampled_again() {
    assert_cpu_is_sampled_after(false, &[(2, false), (3, true)]);
}
