//! What the daemon shows of processes over HTTP and in its log, and what it must not show.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Command, Stdio},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use gannet_agent::METRICS;
use gannet_base::metrics::{PROCESS_METRICS, undeclared};
use gannet_proto::{pprof, profiles::Sample};

use crate::common::{
    Running, agent,
    life::{COMM, life, life_as},
    program,
};

/// Long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns a secret. It is put together at run time, so that the program text of this test does not contain it.
fn canary() -> String {
    ["canary", "7d1e", "0b45"].join("-")
}

pub(crate) struct Daemon {
    running: Running,
    probes: SocketAddr,
    page: SocketAddr,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts the daemon with a rule for the test program and the most detailed log.
    #[track_caller]
    pub(crate) fn start(flags: &[&str]) -> Self {
        Self::start_with_window("1s", flags)
    }

    #[track_caller]
    fn start_with_window(window: &str, flags: &[&str]) -> Self {
        Self::begin(window, None, flags).ready()
    }

    /// Does the same as [`Daemon::start`] with another state directory.
    #[track_caller]
    pub(crate) fn start_on(state: &Path) -> Self {
        Self::start_without_waiting(state).ready()
    }

    /// Does the same as [`Daemon::start_on`], and does not wait until it is ready.
    #[track_caller]
    pub(crate) fn start_without_waiting(state: &Path) -> Self {
        Self::begin("1s", Some(state), &[])
    }

    #[track_caller]
    fn begin(window: &str, state: Option<&Path>, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rules = directory.path().join("rules.yaml");
        fs::write(
            &rules,
            format!("rules:\n- id: life\n  match: {{comm: [{COMM}]}}\n  capture: {{hz: 99}}\n"),
        )
        .unwrap();
        let [probes, page] = [(), ()].map(|()| free_address());
        let mut command = Command::new(agent());
        command
            .args(["run", "--pod-source", "none", "--node", "here", "--window", window])
            .args(["--http-listen", &probes.to_string(), "--debug-listen", &page.to_string()])
            .arg("--rules")
            .arg(&rules)
            .arg("--state-dir")
            .arg(state.map_or_else(|| directory.path().join("state"), Path::to_owned))
            .args(flags)
            .env("GANNET_AGENT_LOG", "trace")
            .stderr(File::create(directory.path().join("log")).unwrap());
        Self { running: Running::start(&mut command), probes, page, directory }
    }

    #[track_caller]
    fn ready(self) -> Self {
        self.wait_for("it is ready", || Self::get(self.probes, "/readyz").starts_with("HTTP/1.1 200"));
        self
    }

    /// Replaces its rules.
    pub(crate) fn set_rules(&self, text: &str) {
        fs::write(self.directory.path().join("rules.yaml"), text).unwrap();
    }

    /// Returns the raw HTTP answer; empty on an error.
    fn get(address: SocketAddr, path: &str) -> String {
        String::from_utf8_lossy(&Self::get_bytes(address, path)).into_owned()
    }

    fn get_bytes(address: SocketAddr, path: &str) -> Vec<u8> {
        let get = || -> std::io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        get().unwrap_or_default()
    }

    pub(crate) fn page(&self, path: &str) -> String {
        Self::get(self.page, path)
    }

    pub(crate) fn metrics(&self) -> String {
        Self::get(self.probes, "/metrics")
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join("log")).unwrap()).into_owned()
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, is: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is() {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.running.0.id())).unwrap();
            assert!(begun.elapsed() < TIMEOUT && !stat.contains(") Z"), "{what}: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    /// Stops it as a service manager does, and returns its log.
    #[track_caller]
    pub(crate) fn end(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.running.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.running.0.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        log
    }

    /// Reports whether its writable memory contains these bytes.
    fn holds(&self, bytes: &[u8]) -> bool {
        let pid = self.running.0.id();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut buffer = vec![0; 1 << 20];
        maps.lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                let (range, access) = (fields.next()?, fields.next()?);
                let (begin, end) = range.split_once('-')?;
                let hex = |text| u64::from_str_radix(text, 16).ok();
                access.starts_with("rw").then_some(hex(begin)?..hex(end)?)
            })
            .any(|range| {
                let mut at = range.start;
                while at < range.end {
                    let length = buffer.len().min((range.end - at) as usize);
                    // Some memory cannot be read, such as that of a device.
                    let Ok(got) = memory.read_at(&mut buffer[..length], at) else { return false };
                    if got == 0 {
                        return false;
                    }
                    if find(&buffer[..got], bytes) {
                        return true;
                    }
                    // Bytes across the end of the buffer are complete in the next one.
                    at += if got < length || at + got as u64 == range.end {
                        got as u64
                    } else {
                        (got - bytes.len()) as u64
                    };
                }
                false
            })
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    find_at(haystack, needle).is_some()
}

fn find_at(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    // SAFETY: both are slices, given with their lengths.
    let found = unsafe {
        libc::memmem(haystack.as_ptr().cast(), haystack.len(), needle.as_ptr().cast(), needle.len())
    };
    (!found.is_null()).then(|| found as usize - haystack.as_ptr() as usize)
}

/// Returns an address on which no program listens.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn a_scrape_shows_the_declared_metrics_and_no_others() {
    let daemon = Daemon::start(&[]);
    let answer = Daemon::get(daemon.probes, "/metrics");
    let (_, text) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(undeclared(text, &[METRICS, PROCESS_METRICS]), Vec::<String>::new());
    for metric in METRICS.iter().chain(PROCESS_METRICS) {
        // Without a pod source there is no last update, without a collector it refuses nothing, and no interpreter runs.
        let is_shown = text.contains(&format!("\n{}", metric.name))
            || metric.name.contains("pods_last_update")
            || metric.name.contains("export_refused")
            || metric.name.contains("runtimes_processes");
        assert!(is_shown, "{}:\n{text}", metric.name);
    }
    daemon.end();
}

/// Checks that readiness and status name switched-off lifecycle events (R25, R26).
#[test]
fn readiness_shows_that_lifecycle_events_are_off() {
    let daemon = Daemon::start(&["--lifecycle", "false"]);
    let ready = Daemon::get(daemon.probes, "/readyz");
    assert!(ready.contains("degraded: kernel: ") && ready.contains("--lifecycle"), "{ready}");
    assert!(daemon.page("/statusz").contains("--lifecycle"));
    let child = Running::start(Command::new(life()).args(["spin", "60000"]));
    let line = format!("/debug/processes?pid={}", child.0.id());
    daemon.wait_for("a scan finds it, and it is profiled", || {
        daemon.page(&line).contains("profiled: wanted by life")
    });
    drop(child);
    daemon.end();
}

/// Checks pages, log and memory for arguments and environment variables of processes (R44, R45).
#[test]
fn arguments_and_environment_are_not_shown_logged_or_kept() {
    let canary = canary();
    let directory = tempfile::tempdir().unwrap();
    let other = life_as(directory.path(), "gannet-other");
    let daemon = Daemon::start(&[]);
    let ready = Daemon::get(daemon.probes, "/readyz");
    assert!(!ready.contains("--lifecycle"), "{ready}");
    let start = |program: &std::path::Path, arguments: &[&str]| {
        Running::start(
            Command::new(program)
                .args(arguments)
                .arg(format!("--password={canary}"))
                .env("HIDDEN", &canary)
                .stdin(Stdio::null()),
        )
    };
    // A process that a rule names, with children and an exec, and one that no rule names.
    let path = life();
    let mut spinning = start(&path, &["spin", "60000"]);
    let stranger = start(&other, &["sleep", "60000"]);
    for arguments in [&["forks", "5", "20"][..], &["exec", "20", path.to_str().unwrap(), "spin", "100"]] {
        start(&path, arguments).0.wait().unwrap();
    }
    let of = |child: &Running| daemon.page(&format!("/debug/processes?pid={}", child.0.id()));
    daemon.wait_for("it is profiled", || of(&spinning).contains("profiled: wanted by life"));
    daemon.wait_for("a window is over", || daemon.page("/debug/flame").contains("spin_here"));
    let why = of(&stranger);
    assert!(why.contains("not profiled: life does not match: its command name is `gannet-other`"), "{why}");
    spinning.0.kill().unwrap();
    spinning.0.wait().unwrap();
    let mut shown = why;
    for path in
        ["/debug/processes", "/debug/events", "/debug/rules", "/statusz", "/flagz", "/metrics", "/debug/maps"]
    {
        shown += &daemon.page(path);
    }
    assert!(shown.contains(COMM), "{shown}");
    assert!(!shown.contains(&canary), "{shown}");
    assert!(daemon.holds(COMM.as_bytes()), "its memory can be searched");
    assert!(!daemon.holds(canary.as_bytes()), "its memory has no secret");
    drop(stranger);
    let log = daemon.end();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "everything was logged");
    assert!(!log.contains(&canary), "{log}");
}

/// Checks a process that starts and ends within one window: its perf map is gone before the window is symbolized.
#[test]
fn made_code_that_ended_in_its_first_window_has_names() {
    // It works for a second on a CPU, however long it waits for one beside other programs.
    let source = include_str!("../data/cases/jit.c")
        .replace("(1000000);\n}", "(1000000);\n  unlink(path);\n}")
        .replace("time_t end = time(0) + 3; time(0) < end;", "; clock() < CLOCKS_PER_SEC;");
    assert!(source.contains("; clock() <") && source.contains("unlink(path)"));
    let program = program(COMM, &source, &[]);
    let daemon = Daemon::start_with_window("60s", &[]);
    let address = daemon.page;
    let profile = thread::spawn(move || Daemon::get_bytes(address, "/debug/profile?seconds=12"));
    sleep(Duration::from_secs(1));
    Running::start(&mut Command::new(program)).0.wait().unwrap();
    let answer = profile.join().unwrap();
    let body = find_at(&answer, b"\r\n\r\n").unwrap() + 4;
    let profile = pprof::decode(&answer[body..], 1 << 30).unwrap();
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let name = |id| {
        let location = profile.location.iter().find(|location| location.id == id)?;
        let function = location.line.first()?.function_id;
        profile.function.iter().find(|known| known.id == function).map(|function| text(function.name))
    };
    let named = |sample: &&Sample| sample.location_id.iter().any(|id| name(*id) == Some("jit_spin"));
    let samples = |of: Vec<&Sample>| of.iter().map(|sample| sample.value[0]).sum::<i64>();
    let (good, all) =
        (samples(profile.sample.iter().filter(named).collect()), samples(profile.sample.iter().collect()));
    // Its clock has 99 ticks in that second. The first samples may be of the start of the program.
    assert!(all > 20 && good * 100 > all * 80, "{good} of {all}");
}

/// A program whose callers are found by its unwind table alone.
const NESTED: &str = r"
volatile long sink;
__attribute__((noinline)) void inner_work(void) { for (long i = 0; i < 20000000; i++) sink += i; }
__attribute__((noinline)) void outer_work(void) { inner_work(); sink++; }
int main(void) { for (;;) outer_work(); }
";

/// Returns the shares of samples, of those with `inner_work`, whose stacks have `outer_work` too, in hundredths.
fn with_caller(address: SocketAddr) -> i64 {
    let answer = Daemon::get_bytes(address, "/debug/profile?seconds=1");
    let body = find_at(&answer, b"\r\n\r\n").unwrap() + 4;
    let Ok(profile) = pprof::decode(&answer[body..], 1 << 30) else { return -1 };
    let name = |id| {
        let location = profile.location.iter().find(|location| location.id == id)?;
        let function = location.line.first()?.function_id;
        let function = profile.function.iter().find(|known| known.id == function)?;
        profile.string_table.get(function.name as usize).map(String::as_str)
    };
    let has = |sample: &Sample, wanted: &str| {
        sample.location_id.iter().any(|id| name(*id).is_some_and(|name| name == wanted))
    };
    let samples = |wanted: &[&str]| -> i64 {
        let all = profile.sample.iter().filter(|sample| wanted.iter().all(|wanted| has(sample, wanted)));
        all.map(|sample| sample.value[0]).sum()
    };
    samples(&["inner_work", "outer_work"]) * 100 / samples(&["inner_work"]).max(1)
}

/// Checks the way of a user: write the table of a program as text, change it, put it into the directory while the agent runs;
/// then damage it, and remove it.
#[test]
fn a_supplied_table_takes_precedence_and_a_bad_one_is_refused() {
    let program = program(COMM, NESTED, &[]);
    let daemon = Daemon::start(&[]);
    let directory = daemon.directory.path().join("state/overrides");
    let text = daemon.directory.path().join("written");
    let check = Command::new(agent())
        .args(["check", "--file", program.to_str().unwrap(), "--write-table", text.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
    let written = fs::read_to_string(&text).unwrap();
    let report = String::from_utf8(check.stdout).unwrap();
    let content = written.lines().find_map(|line| line.strip_prefix("content ")).unwrap();
    assert!(report.contains(&format!("content id   {content}")), "{report}");
    // By this table every function of the program is the outermost one.
    let row = |line: &str| match line.split_once(' ') {
        Some((address, _)) if address.starts_with("0x") => format!("{address} stop\n"),
        _ => format!("{line}\n"),
    };
    let changed: String = written.lines().map(row).collect();

    let _running = Running::start(&mut Command::new(&program));
    let page = daemon.page;
    daemon.wait_for("the table of the file is used", || with_caller(page) > 95);
    let file = directory.join("nested.unwind");
    fs::write(&file, &changed).unwrap();
    daemon.wait_for("the supplied table takes precedence", || with_caller(page) == 0);
    let maps = daemon.page("/debug/maps");
    assert!(maps.contains(&format!("nested.unwind for file content {content}")), "{maps}");
    // Cut: the table of the file is in force again, and the reason is shown.
    fs::write(&file, &changed[..changed.len() / 2]).unwrap();
    daemon.wait_for("a cut table is refused", || with_caller(page) > 95);
    let ready = Daemon::get(daemon.probes, "/readyz");
    assert!(ready.contains("HTTP/1.1 200") && ready.contains("degraded: unwind tables: refused "), "{ready}");
    assert!(ready.contains("nested.unwind: line ") && ready.contains("--write-table"), "{ready}");
    // In the place of another one, as Kubernetes and careful editors do it.
    fs::rename(&text, directory.join("aside")).unwrap();
    fs::write(directory.join("aside"), &changed).unwrap();
    fs::rename(directory.join("aside"), &file).unwrap();
    daemon.wait_for("the corrected table takes precedence", || with_caller(page) == 0);
    assert!(!Daemon::get(daemon.probes, "/readyz").contains("unwind tables"));
    fs::remove_file(&file).unwrap();
    daemon.wait_for("without it the table of the file is used", || with_caller(page) > 95);
    let log = daemon.end();
    assert!(log.contains("refused a supplied unwind table"), "{log}");
}

#[test]
fn every_bpf_map_is_shown_with_fill_and_capacity() {
    let daemon = Daemon::start(&[]);
    let child = Running::start(Command::new(life()).args(["spin", "60000"]));
    let line = format!("/debug/processes?pid={}", child.0.id());
    daemon.wait_for("it is profiled", || daemon.page(&line).contains("profiled: wanted by life"));
    let shown = daemon.page("/debug/maps");
    let metrics = Daemon::get(daemon.probes, "/metrics");
    // The names that the programs declare.
    let sources = [
        include_str!("../../../bpf/src/bpf/clock.h"),
        include_str!("../../../bpf/src/bpf/gannet.bpf.c"),
        include_str!("../../../bpf/src/bpf/lifecycle.h"),
        include_str!("../../../bpf/src/bpf/maps.h"),
        include_str!("../../../bpf/src/bpf/match.h"),
        include_str!("../../../bpf/src/bpf/off_cpu.h"),
        include_str!("../../../bpf/src/bpf/sampler.h"),
        include_str!("../../../bpf/src/bpf/unwind.h"),
    ];
    let mut declared = 0;
    for text in sources {
        for name in text.lines().filter_map(|line| line.strip_prefix("} ")?.strip_suffix(" SEC(\".maps\");"))
        {
            declared += 1;
            let row = shown.lines().find(|line| line.split_whitespace().next() == Some(name));
            let row: Vec<_> = row.unwrap_or_else(|| panic!("{name}: {shown}")).split_whitespace().collect();
            assert!(row[3].parse::<u64>().unwrap() > 0, "{row:?}");
            if row[2] != "fixed" {
                assert!(row[2].parse::<u64>().unwrap() <= row[3].parse().unwrap(), "{row:?}");
                for metric in ["entries", "capacity"] {
                    let series = format!("gannet_agent_bpf_map_{metric}{{map=\"{name}\"}} ");
                    assert!(metrics.contains(&series), "{series}");
                }
            }
        }
    }
    assert!(declared > 15, "{declared}");
    let procs: u64 = shown
        .lines()
        .find_map(|line| line.strip_prefix("procs ")?.split_whitespace().nth(1)?.parse().ok())
        .unwrap();
    assert!(procs > 0, "{shown}");
    drop(child);
    daemon.end();
}
