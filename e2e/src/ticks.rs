//! A second clock: counts the perf ticks of every CPU without any code of the agent.

use std::time::Duration;

use perf_event::{Builder, Clock, SampleFlag, Sampler, data::Record, events::Software};

/// Bytes for the records of one CPU: 16 bytes each, so some eight thousand ticks.
const BUFFER_BYTES: usize = 128 << 10;

/// A sampling cpu-clock on every CPU. Each has its own ring buffer, which [`Ticks::finish`] reads.
pub struct Ticks {
    clocks: Vec<Sampler>,
    hz: u64,
}

/// The ticks of all clocks in a span of time.
#[derive(Clone, Copy, Debug)]
pub struct Ticked {
    /// Ticks that the kernel recorded.
    pub ticks: u64,
    /// Ticks that are due by the time. A machine whose host runs other guests has fewer.
    pub due: f64,
}

impl Ticks {
    /// Starts a clock of `hz` on every CPU.
    #[track_caller]
    pub fn start(hz: u64) -> Self {
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        Self { clocks: (0..cpus).map(|cpu| clock(cpu, 1_000_000_000 / hz)).collect(), hz }
    }

    /// Stops the clocks and counts the ticks between two times of the monotonic clock.
    #[track_caller]
    pub fn finish(mut self, from: Duration, until: Duration) -> Ticked {
        let mut ticks = 0;
        for clock in &mut self.clocks {
            clock.disable().expect("the clock stops");
            while let Some(record) = clock.next_record() {
                match record.parse_record().expect("a record of the clock") {
                    Record::Sample(sample) => {
                        let time = Duration::from_nanos(sample.time().expect("the time of a tick"));
                        ticks += u64::from((from..until).contains(&time));
                    }
                    Record::Lost(lost) => panic!("the buffer was too small: {} records are lost", lost.lost),
                    _ => {}
                }
            }
        }
        let due = until.saturating_sub(from).as_secs_f64() * self.hz as f64 * self.clocks.len() as f64;
        Ticked { ticks, due }
    }
}

#[track_caller]
fn clock(cpu: usize, period_ns: u64) -> Sampler {
    Builder::new(Software::CPU_CLOCK)
        .any_pid()
        .one_cpu(cpu)
        .include_kernel()
        .include_hv()
        .enabled(true)
        .sample_period(period_ns)
        .sample(SampleFlag::TIME)
        .clockid(Clock::MONOTONIC)
        .build()
        .and_then(|counter| counter.sampled(BUFFER_BYTES))
        .unwrap_or_else(|error| panic!("cannot open a clock on CPU {cpu}: {error}"))
}

/// Returns the time of the clock that stamps the ticks.
pub fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}
