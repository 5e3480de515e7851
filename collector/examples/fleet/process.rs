//! Collectors as processes, with their use of CPU, memory and disk.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint};

/// A program to measure.
pub(crate) struct Program {
    pub(crate) name: String,
    /// The program, and its options.
    pub(crate) command: String,
}

impl Program {
    /// Parses `NAME=PROGRAM OPTION...`.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let (name, command) = text.split_once('=').context("a collector is NAME=PROGRAM")?;
        Ok(Self { name: name.to_owned(), command: command.to_owned() })
    }
}

/// Use of a process so far.
#[derive(Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) cpu_seconds: f64,
    pub(crate) peak_mib: f64,
}

/// A running collector. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    /// Time from its start until it accepts connections.
    pub(crate) started: Duration,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// Starts a collector, and waits until it accepts connections. `flush_interval`: that of the collector, if it has one.
    pub(crate) async fn start(
        program: &Program,
        data: &Path,
        flush_interval: Option<&str>,
    ) -> anyhow::Result<Self> {
        let (grpc, http) = (free_port()?, free_port()?);
        let mut words = program.command.split_whitespace();
        let began = Instant::now();
        let child = Command::new(words.next().unwrap_or_default())
            .arg("--data")
            .arg(data)
            .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
            .args(words)
            .env("GANNET_COLLECTOR_LOG", "warn")
            // The former collector does not know these variables.
            .env("GANNET_COLLECTOR_PIECE_STREAMS", "1000")
            .envs(flush_interval.map(|interval| ("GANNET_COLLECTOR_FLUSH_INTERVAL", interval)))
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.command))?;
        let mut running = Self { child, grpc, http, started: Duration::ZERO };
        while running.endpoint()?.connect().await.is_err() {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended: {status}", program.command);
            }
            anyhow::ensure!(began.elapsed().as_secs() < 120, "{} does not answer", program.command);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.started = began.elapsed();
        Ok(running)
    }

    fn endpoint(&self) -> anyhow::Result<Endpoint> {
        Ok(Channel::from_shared(format!("http://{}", self.grpc))?)
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<Channel> {
        Ok(self.endpoint()?.connect().await?)
    }

    /// Ends it as an orchestrator does.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        self.child.wait()?;
        Ok(())
    }

    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
        // In ticks of 10 ms, see proc(5).
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
        let kib: f64 = peak.split_ascii_whitespace().next().unwrap_or("0").parse()?;
        Ok(Usage { cpu_seconds: ticks as f64 / 100.0, peak_mib: kib / 1024.0 })
    }

    /// Waits until the tables have all profiles, and no merge has changed them for ten seconds.
    pub(crate) async fn settle_tables(&self, data: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(900);
        let (mut last, mut same) = ((0, 0), 0);
        while Instant::now() < deadline {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let text = reqwest::get(format!("http://{}/metrics", self.http)).await?.text().await?;
            let is_complete = text.lines().any(|line| line == "gannet_collector_table_debt_bytes 0");
            let now = files(&data.join("table"));
            same = if is_complete && now == last { same + 1 } else { 0 };
            if same == 10 {
                return Ok(());
            }
            last = now;
        }
        bail!("the tables are not complete after 15 minutes")
    }
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn paths(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => paths(&entry.path()),
            _ => vec![entry.path()],
        })
        .collect()
}

/// Returns the number of files below a directory, and their bytes.
pub(crate) fn files(dir: &Path) -> (u64, u64) {
    let sizes = paths(dir).into_iter().filter_map(|path| Some(fs::metadata(path).ok()?.len()));
    sizes.fold((0, 0), |(n, bytes), size| (n + 1, bytes + size))
}

/// Removes the files below a directory from the memory of the kernel, so that the next reading is from the disk.
pub(crate) fn drop_from_memory(dir: &Path) -> anyhow::Result<()> {
    for path in paths(dir) {
        let file = fs::File::open(&path)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}
