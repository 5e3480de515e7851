//! The kernel side alone: a rule, a process, its samples.

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    thread::{self, sleep},
    time::{Duration, Instant},
};

use gannet_agent::{
    kernel::{Event, Kernel, KernelOptions, KernelRules, NamePattern, Ticks},
    model::{self, KernelName, KernelSymbolChange, KernelSymbolLog},
};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType};

use crate::common::{Running, cpu::CpuOne, program, slower};

/// A program that uses a second of CPU time and exits with 7.
const BUSY: &str = r"
#include <time.h>
int main(void)
{
	while (clock() < CLOCKS_PER_SEC)
		;
	return 7;
}
";

fn kernel() -> Kernel {
    Kernel::start(KernelOptions::default()).unwrap()
}

#[test]
fn only_what_was_attached_is_announced_as_a_feature() {
    // Old kernels have no bpf_loop.
    let features = |kernel: &Kernel| {
        let all = kernel.features().iter().copied();
        all.filter(|feature| *feature != "bpf_loop").collect::<Vec<_>>()
    };
    assert_eq!(features(&kernel()), ["lifecycle", "scan", "off_cpu"]);
    let without = &["sched_process_exit", "sched_switch"];
    let kernel = Kernel::start(KernelOptions { without, ..KernelOptions::default() }).unwrap();
    assert_eq!(features(&kernel), ["scan"]);
    assert!(
        kernel.degraded().iter().any(|reason| reason.contains("no blocked time")),
        "{:?}",
        kernel.degraded()
    );
}

fn rules_for(comm: &str, hz: u64) -> KernelRules {
    KernelRules::for_comm(NamePattern { text: comm.into(), prefix: false }, 1_000_000_000 / hz)
}

#[test]
fn a_process_that_a_rule_names_is_sampled_from_exec_on() {
    let mut kernel = kernel();
    assert_eq!(kernel.degraded(), &[] as &[String]);
    kernel.set_lifecycle(true);
    kernel.set_sampling(true);
    kernel.set_rules(&rules_for("gannet-busy", 99)).unwrap();
    let busy = program("gannet-busy", BUSY, &[]);
    let mut child = Command::new(&busy).spawn().unwrap();
    let pid = child.id();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    sleep(Duration::from_millis(50));
    let mut events = kernel.read().unwrap();
    events.retain(|event| !matches!(event, Event::Mapping(_)));
    let samples = events
        .iter()
        .filter(|e| matches!(e, Event::Sample(s) if s.subject.key.tgid == pid && !s.user.is_empty()))
        .count();
    assert!(samples > 5, "{events:?}");
    // A tick may interrupt the handler of the exec between its decision and its report: then a sample comes first.
    let Some(Event::Exec { subject, path, .. }) =
        events.iter().find(|event| !matches!(event, Event::Sample(_)))
    else {
        panic!("exec first: {events:?}")
    };
    assert_eq!(
        (subject.key.tgid, path.as_str(), subject.comm.as_str()),
        (pid, busy.to_str().unwrap(), "gannet-busy")
    );
    // It still uses the CPU for a short time after its exit event.
    let Some(Event::Exit { status, .. }) =
        events.iter().rev().find(|event| !matches!(event, Event::Sample(_)))
    else {
        panic!("exit last: {events:?}")
    };
    assert_eq!(status.code(), 7);
    let counters = kernel.counters().unwrap();
    assert_eq!(counters.taken, counters.sent);
}

/// Loads other BPF programs while the kernel side is at work, and unloads them: both must be seen, with the names and the
/// addresses of `/proc/kallsyms`.
#[test]
fn bpf_programs_that_come_and_go_are_seen_by_events() {
    let symbols: &'static KernelSymbolLog = Box::leak(Box::default());
    let mut kernel = Kernel::start(KernelOptions { symbols, ..KernelOptions::default() }).unwrap();
    assert!(!symbols.end().is_followed());
    kernel.set_rules(&rules_for("gannet-busy", 19)).unwrap();
    let mut position = symbols.end();
    assert!(position.is_followed());
    // Its own events go into a log of its own.
    let other: &'static KernelSymbolLog = Box::leak(Box::default());
    let others = Kernel::start(KernelOptions { symbols: other, ..KernelOptions::default() }).unwrap();
    kernel.read().unwrap();
    let loaded = symbols.since(&mut position).unwrap();
    let listed = fs::read_to_string("/proc/kallsyms").unwrap();
    // The program is there on each kernel. Other agents on this machine have programs of the same name.
    let made: Vec<_> = loaded
        .into_iter()
        .filter_map(|change| match change {
            KernelSymbolChange::Added(range) if range.name.ends_with("_on_exec") => {
                assert_eq!(range.module, "bpf");
                let line = format!("{:x} t {}\t[bpf]", range.start, range.name);
                assert!(listed.contains(&line), "{line}");
                Some(KernelSymbolChange::Removed(range))
            }
            _ => None,
        })
        .collect();
    assert!(!made.is_empty());
    drop(others);
    // The kernel frees programs after a grace period.
    let end = Instant::now() + Duration::from_secs(10);
    let mut gone = Vec::new();
    while !made.iter().all(|change| gone.contains(change)) {
        assert!(Instant::now() < end, "{gone:?}");
        sleep(Duration::from_millis(50));
        kernel.read().unwrap();
        gone.extend(symbols.since(&mut position).unwrap());
    }
}

/// Asks for functions all over the kernel, its modules and BPF programs, and holds the answers against `/proc/kallsyms`.
#[test]
fn the_kernel_names_single_addresses_as_kallsyms_does() {
    let symbols: &'static KernelSymbolLog = Box::leak(Box::default());
    let _kernel = Kernel::start(KernelOptions { symbols, ..KernelOptions::default() }).unwrap();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(symbols.has_namer(), version >= (5, 13), "Linux {release}");
    if version < (5, 13) {
        assert_eq!(symbols.names(&[0]), None);
        return;
    }
    // An address with all of its names.
    let mut listed: BTreeMap<u64, Vec<(String, String)>> = BTreeMap::new();
    for line in fs::read_to_string("/proc/kallsyms").unwrap().lines() {
        let mut words = line.splitn(3, ' ');
        let (address, kind, name) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let (name, module) = name.split_once('\t').unwrap_or((name, ""));
        if matches!(kind, "t" | "T") {
            let name = (name.to_owned(), module.trim_matches(['[', ']']).to_owned());
            listed.entry(u64::from_str_radix(address, 16).unwrap()).or_default().push(name);
        }
    }
    let of_bpf = |names: &[(String, String)]| names.iter().any(|(_, module)| module == "bpf");
    let wanted: Vec<_> = listed
        .iter()
        .enumerate()
        .filter(|(index, (_, names))| index % 50 == 0 || of_bpf(names))
        .map(|(_, wanted)| wanted)
        .collect();
    let addresses: Vec<u64> = wanted.iter().map(|(address, _)| **address).collect();
    let found = symbols.names(&addresses).unwrap();
    assert_eq!(found.len(), wanted.len());
    // Programs of others may be gone by now, and text that was only needed at boot has no name.
    let mut wrong = Vec::new();
    let (mut named, mut programs) = (0, 0);
    for ((_, names), found) in wanted.iter().zip(found) {
        let Some(KernelName { name, module }) = found else { continue };
        named += 1;
        programs += usize::from(module == "bpf");
        let found = (name, module);
        if !names.contains(&found) {
            wrong.push((names, found));
        }
    }
    assert!(wrong.is_empty(), "{} of {named}: {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    assert!(programs >= 6, "{programs} BPF programs have names");
    assert!(named * 10 >= wanted.len() * 9, "{named} of {} functions have names", wanted.len());
    let data = symbols.names(&[0, 4096, u64::MAX]).unwrap();
    assert_eq!(data, [None, None, None], "no functions");
}

/// The account of a second and a half of two rates, while `disturb` runs; with the number of clocks.
fn ticks_while(hz: u32, disturb: impl Fn(Duration)) -> (Ticks, u64) {
    let mut kernel = kernel();
    kernel.set_sampling(true);
    let mut rules = rules_for("gannet-nobody", 99);
    kernel.set_rules(&rules).unwrap();
    // A change of rates stops clocks and starts others.
    disturb(Duration::from_millis(200));
    rules = rules_for("gannet-nobody", u64::from(hz / slower()));
    kernel.set_rules(&rules).unwrap();
    disturb(Duration::from_millis(1500) * slower());
    let clocks = 2 * model::online_cpus().unwrap().len() as u64;
    let ticks = kernel.ticks().unwrap();

    (ticks, clocks)
}

/// Fails if more ticks are unexplained than the clocks round at both ends of their time.
#[track_caller]
fn assert_explained((ticks, clocks): (Ticks, u64)) {
    assert!(ticks.unexplained().unsigned_abs() <= clocks + ticks.due / 200, "{ticks:?}");
}

#[test]
fn every_tick_that_was_due_is_explained() {
    let (ticks, clocks) = ticks_while(499, sleep);
    assert!(ticks.due > 100 * clocks && ticks.fired > ticks.due / 4, "{ticks:?}");
    assert_explained((ticks, clocks));
}

/// Lets the kernel stop each clock after each tick: more than one tick within a jiffy is too many.
#[test]
fn ticks_of_clocks_that_the_kernel_throttles_are_explained() {
    const MAX_RATE: &str = "/proc/sys/kernel/perf_event_max_sample_rate";
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            fs::write(MAX_RATE, &self.0).unwrap();
        }
    }
    let restore = Restore(fs::read_to_string(MAX_RATE).unwrap());
    fs::write(MAX_RATE, "100").unwrap();
    let (ticks, clocks) = ticks_while(1999, sleep);
    drop(restore);
    assert!(ticks.throttled + ticks.silent > ticks.due / 20, "{ticks:?}");
    assert_explained((ticks, clocks));
}

/// Keeps each CPU in calls during which the kernel runs no program of a perf event.
#[test]
fn ticks_that_the_kernel_skips_are_explained() {
    let busy = |time: Duration| {
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in model::online_cpus().unwrap() {
                scope.spawn(|| {
                    let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
                        sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
                        map_flags: libbpf_rs::libbpf_sys::BPF_F_NO_PREALLOC,
                        ..Default::default()
                    };
                    let map = MapHandle::create(MapType::Hash, Some("gannet_test"), 4, 100_000, 4, &options)
                        .unwrap();
                    while begun.elapsed() < time {
                        map.update(&[0; 4], &vec![0; 100_000], MapFlags::ANY).unwrap();
                    }
                });
            }
        });
    };
    let (ticks, clocks) = ticks_while(499, busy);
    assert!(ticks.skipped > 10, "{ticks:?}");
    assert_explained((ticks, clocks));
}

/// Computes for ever.
const SPIN: &str = "int main(void) { for (volatile unsigned long n = 0;; n++) ; }";

/// Starts a program on CPU 1, and reads until it was sampled there some times.
#[track_caller]
fn until_cpu_one_is_sampled(kernel: &mut Kernel, comm: &str) -> Running {
    let path = program(comm, SPIN, &[]);
    let number = CpuOne::NUMBER.to_string();
    let running = Running::start(Command::new("taskset").args(["-c", &number]).arg(path));
    let (begun, mut samples) = (Instant::now(), 0);
    while samples < 20 {
        assert!(begun.elapsed() < Duration::from_secs(30) * slower(), "{samples} samples");
        sleep(Duration::from_millis(20));
        let events = kernel.read().unwrap();
        let of_it = |event: &&Event| matches!(event, Event::Sample(sample) if sample.subject.key.tgid == running.0.id());
        samples += events.iter().filter(of_it).count();
    }
    running
}

/// Takes CPU 1 offline for two seconds, off a program that runs there. Then the kernel side looks for such changes, and before
/// that perhaps while the CPU is off.
#[track_caller]
fn assert_offline_ticks_are_explained(comm: &str, looks_while_off: bool) {
    let hz = u64::from(499 / slower());
    let mut kernel = kernel();
    // The exec event adds the program to the sampled processes.
    kernel.set_lifecycle(true);
    kernel.set_sampling(true);
    kernel.set_rules(&rules_for(comm, hz)).unwrap();
    let running = until_cpu_one_is_sampled(&mut kernel, comm);
    let cpu = CpuOne::borrow();
    assert_eq!(kernel.ticks().unwrap().offline, 0);
    cpu.set(false);
    let off = Instant::now();
    // It would go on, on another CPU.
    drop(running);
    sleep(Duration::from_secs(2).saturating_sub(off.elapsed()));
    let mut seen = off.elapsed();
    if looks_while_off {
        kernel.follow_cpus().unwrap();
        // No clock runs there now, so no tick is due.
        let offline = kernel.ticks().unwrap().offline;
        cpu.set(true);
        kernel.follow_cpus().unwrap();
        assert_eq!(kernel.ticks().unwrap().offline, offline);
    } else {
        cpu.set(true);
        seen = off.elapsed();
        kernel.follow_cpus().unwrap();
    }
    drop(cpu);
    let _running = until_cpu_one_is_sampled(&mut kernel, comm);
    let ticks = kernel.ticks().unwrap();
    // The clock was stopped between two ticks.
    let missed = u64::try_from(seen.as_millis()).unwrap() * hz / 1000;
    assert!(ticks.offline + 1 >= missed, "{missed}: {ticks:?}");
    // CPU 1 had two clocks, one after the other.
    assert_explained((ticks, 1 + model::online_cpus().unwrap().len() as u64));
}

#[test]
fn ticks_of_a_cpu_that_the_agent_finds_offline_are_explained() {
    assert_offline_ticks_are_explained("gannet-off", true);
}

#[test]
fn ticks_of_a_cpu_that_was_offline_meanwhile_are_explained() {
    assert_offline_ticks_are_explained("gannet-off-on", false);
}
