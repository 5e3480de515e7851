//! The kernel side alone: a rule, a process, its samples.

use std::{process::Command, thread::sleep, time::Duration};

use gannet_agent::kernel::{Event, Kernel, KernelOptions, KernelRules, NamePattern};

use crate::common::program;

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
