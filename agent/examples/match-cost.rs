//! What it costs not to be of interest: nanoseconds for a tick, an exec, a fork and an exit of a process that no rule
//! names, each less those of an empty program at the same place in the same run; and how long a change of the rules takes
//! among many processes. Prints lines of JSON. Needs root, and sets kernel.bpf_stats_enabled meanwhile.
//!
//! `match-cost CROWD`, the program of `benches/crowd.c`; in the environment `EXECS` (1500), `MATCH_SECONDS` (3), `PROCESSES`
//! (10000).
#![allow(clippy::print_stdout, reason = "what it is for")]

use std::{
    collections::BTreeMap,
    env,
    ffi::CStr,
    fs,
    io::{self, BufRead as _, BufReader},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::KernelOptions,
    model::online_cpus,
    rules::{Deny, RuleSource, SourceRules, ad_hoc},
    tables::TableSources,
};
use gannet_proto::{
    control::{Match, Rule, capture},
    rules::Caps,
};
use libbpf_rs::libbpf_sys;
use perf_event::{Builder, Counter, events::Software};

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";
const HZ: u32 = 997;

/// Run time and runs by program.
type Costs = BTreeMap<&'static str, (u64, u64)>;

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let Some(crowd) = env::args().nth(1) else { bail!("match-cost CROWD") };
    let before = fs::read_to_string(STATS).context(STATS)?;
    fs::write(STATS, "1").context(STATS)?;
    let result = measure(&crowd).await;
    fs::write(STATS, before).context(STATS)?;
    result
}

async fn measure(crowd: &str) -> anyhow::Result<()> {
    let number = |name: &str, default| env::var(name).map_or(Ok(default), |text| text.parse::<u32>());
    let (execs, seconds) = (number("EXECS", 1500)?, number("MATCH_SECONDS", 3)?);
    let processes = number("PROCESSES", 10_000)?;
    let options = EngineOptions {
        start_labels: None,
        node: "here".into(),
        kernel: KernelOptions { processes: 65_536, ..KernelOptions::default() },
        window: Duration::from_secs(600),
        caps: Caps { ttl_above_hz: u32::MAX, ..Caps::default() },
        deny: Deny::default(),
        budgets: gannet_agent::governor::Budgets::default(),
        tables: Some(TableSources::with_debug_files()),
    };
    let engine = Engine::start(options, |_: Window| {})?;
    let empty = Empty::attach()?;
    let rules = [
        ("one rule, by command name", rules(1, false)),
        ("20 rules, by command name", rules(20, false)),
        ("20 rules, by command name, control group and user", rules(20, true)),
    ];
    for (what, rules) in rules {
        apply(&engine, rules).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let begin = costs(&engine, &empty).await?;
        busy(Duration::from_secs(seconds.into()), execs)?;
        let end = costs(&engine, &empty).await?;
        let of = |name: &str| {
            let (begin, end) =
                (begin.get(name).copied().unwrap_or_default(), end.get(name).copied().unwrap_or_default());
            let runs = end.1.saturating_sub(begin.1);
            ((end.0.saturating_sub(begin.0)) as f64 / runs.max(1) as f64, runs)
        };
        let tick = if end.contains_key("on_tick") { "on_tick" } else { "on_tick_chain" };
        let mut line = serde_json::json!({ "what": "unmatched", "rules": what });
        for (place, program, nothing) in [
            ("tick", tick, "empty_tick"),
            ("exec", "on_exec", "empty_exec"),
            ("fork", "on_fork", "empty_fork"),
            ("exit", "on_exit", "empty_exit"),
        ] {
            let ((ns, runs), (least, _)) = (of(program), of(nothing));
            line[format!("{place}s")] = runs.into();
            line[format!("ns_per_{place}")] = tenths(ns);
            line[format!("ns_per_empty_{place}")] = tenths(least);
            line[format!("ns_per_{place}_over_empty")] = tenths(ns - least);
        }
        println!("{line}");
    }
    drop(empty);
    among_many(&engine, crowd, processes).await?;
    engine.stop();
    Ok(())
}

/// How long a change of the rules takes on a node with many processes, and what of it is the walk over them.
async fn among_many(engine: &Engine, crowd: &str, processes: u32) -> anyhow::Result<()> {
    let mut child = Command::new(crowd)
        .arg(processes.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {crowd}"))?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
    if line.trim() != "ready" {
        bail!("{crowd} could not start {processes} processes");
    }
    let name = fs::read_to_string(format!("/proc/{}/comm", child.id()))?.trim().to_owned();
    let all = Match { comm: vec![name], ..Match::default() };
    for (what, matches, rounds) in [
        ("none of them matches", Match { comm: vec!["nobody-at-all".into()], ..Match::default() }, 3),
        ("all of them match", all, 1),
        ("none of them matches any more", Match { comm: vec!["nobody-else".into()], ..Match::default() }, 1),
    ] {
        let mut slowest = Duration::ZERO;
        for round in 0..rounds {
            let rule = ad_hoc(
                &format!("crowd-{what}-{round}").replace(' ', "-"),
                matches.clone(),
                19,
                &[capture::Kind::OnCpu],
            );
            let before = cpu_time();
            let programs = programs(engine).await?;
            let begin = Instant::now();
            apply(engine, vec![rule]).await?;
            let took = begin.elapsed();
            // Longest without an answer, until all has been done that the change brought about.
            let mut unanswered = Duration::ZERO;
            let mut quiet = 0;
            while quiet < 40 {
                let asked = Instant::now();
                engine.view().await?;
                unanswered = unanswered.max(asked.elapsed());
                quiet = if asked.elapsed() < Duration::from_millis(5) { quiet + 1 } else { 0 };
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let after = self::programs(engine).await?;
            let of = |costs: &Costs| costs.get("each_task").copied().unwrap_or_default();
            let walk = (of(&after).0 - of(&programs).0, of(&after).1 - of(&programs).1);
            slowest = slowest.max(took);
            if round + 1 == rounds {
                println!(
                    "{}",
                    serde_json::json!({
                        "what": "a change of the rules",
                        "processes": processes,
                        "case": what,
                        "ms_until_in_force": millis(slowest),
                        "ms_longest_without_answer": millis(unanswered),
                        "cpu_ms": millis(cpu_time().saturating_sub(before)),
                        "walk_ms": tenths(walk.0 as f64 / 1e6),
                        "walk_tasks": walk.1,
                    })
                );
            }
        }
    }
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

fn tenths(value: f64) -> serde_json::Value {
    ((value * 10.0).round() / 10.0).into()
}

fn millis(value: Duration) -> serde_json::Value {
    tenths(value.as_secs_f64() * 1e3)
}

/// CPU time of this process; what the engine's thread uses is nearly all of it.
fn cpu_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// Builds rules that match no process here.
fn rules(count: usize, mixed: bool) -> Vec<Rule> {
    (0..count)
        .map(|number| {
            let mut matches = Match { comm: vec![format!("nobody-{number}*")], ..Match::default() };
            if mixed {
                match number % 3 {
                    0 => {}
                    1 => matches = Match { cgroup: vec![format!("/nowhere/{number}/*")], ..Match::default() },
                    _ => matches = Match { uid: vec![4_000_000_000 + number as u32], ..Match::default() },
                }
            }
            ad_hoc(&format!("rule-{number}"), matches, HZ, &[capture::Kind::OnCpu])
        })
        .collect()
}

async fn apply(engine: &Engine, rules: Vec<Rule>) -> anyhow::Result<()> {
    match engine.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }).await {
        Ok(_) => Ok(()),
        Err(errors) => bail!("{errors:?}"),
    }
}

/// Keeps all CPUs busy for a time, and runs short processes meanwhile.
fn busy(time: Duration, execs: u32) -> anyhow::Result<()> {
    let over = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..online_cpus()?.len())
        .map(|_| {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let begin = Instant::now();
    let ran = (0..execs).try_for_each(|_| Command::new("/bin/true").status().map(drop));
    thread::sleep(time.saturating_sub(begin.elapsed()));
    over.store(true, Ordering::Relaxed);
    for thread in threads {
        let _ = thread.join();
    }
    ran.context("cannot run /bin/true")
}

async fn programs(engine: &Engine) -> anyhow::Result<Costs> {
    let programs = engine.kernel_view().await?.programs;
    Ok(programs.into_iter().map(|program| (program.name, (program.run_ns, program.runs))).collect())
}

async fn costs(engine: &Engine, empty: &Empty) -> anyhow::Result<Costs> {
    let mut costs = programs(engine).await?;
    for (name, program) in &empty.programs {
        costs.insert(name, stats(program)?);
    }
    Ok(costs)
}

/// Programs that do nothing, where the agent's are.
struct Empty {
    programs: Vec<(&'static str, OwnedFd)>,
    _links: Vec<OwnedFd>,
    _clocks: Vec<Counter>,
}

impl Empty {
    fn attach() -> anyhow::Result<Self> {
        let mut programs = Vec::new();
        let (mut links, mut clocks) = (Vec::new(), Vec::new());
        let raw = libbpf_sys::BPF_PROG_TYPE_RAW_TRACEPOINT;
        for (name, tracepoint) in [
            ("empty_exec", c"sched_process_exec"),
            ("empty_fork", c"sched_process_fork"),
            ("empty_exit", c"sched_process_exit"),
        ] {
            let program = load(raw)?;
            // SAFETY: the name is a C string, the descriptor is open.
            let link =
                unsafe { libbpf_sys::bpf_raw_tracepoint_open(tracepoint.as_ptr(), program.as_raw_fd()) };
            links.push(owned(link).with_context(|| format!("{tracepoint:?}"))?);
            programs.push((name, program));
        }
        let program = load(libbpf_sys::BPF_PROG_TYPE_PERF_EVENT)?;
        for cpu in online_cpus()? {
            let mut clock = Builder::new(Software::CPU_CLOCK)
                .any_pid()
                .one_cpu(cpu as usize)
                .include_kernel()
                .include_hv()
                .sample_period(u64::from(1_000_000_000 / HZ))
                .build()?;
            clock
                .set_bpf(program.as_raw_fd())
                .and_then(|()| clock.enable())
                .context("the empty program on a clock")?;
            clocks.push(clock);
        }
        programs.push(("empty_tick", program));
        Ok(Self { programs, _links: links, _clocks: clocks })
    }
}

/// A program that gives 0.
fn load(kind: libbpf_sys::bpf_prog_type) -> anyhow::Result<OwnedFd> {
    // r0 = 0; exit
    let code = [0xb7, 0x95].map(|code| libbpf_sys::bpf_insn { code, ..Default::default() });
    let (name, license): (&CStr, &CStr) = (c"empty", c"GPL");
    // SAFETY: names and instructions are valid for the call, and their number is right; no options.
    let program = unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            license.as_ptr(),
            code.as_ptr(),
            code.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        )
    };
    owned(program).context("the empty program")
}

fn owned(fd: i32) -> anyhow::Result<OwnedFd> {
    if fd < 0 {
        bail!(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that no other value owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn stats(program: &OwnedFd) -> anyhow::Result<(u64, u64)> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of_val(&info) as u32;
    // SAFETY: the structure is valid for writing and `length` is its size; its pointers are null, with counts of 0.
    let failed =
        unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &raw mut info, &raw mut length) };
    if failed != 0 {
        bail!(io::Error::last_os_error());
    }
    Ok((info.run_time_ns, info.run_cnt))
}
