//! The kill switch of the real node program on the real kernel, seen from outside.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on shall say so at once"
)]

use std::{fs, time::Duration};

use gannet_e2e::{Agent, Sample, eventually, http_get, rule};
use gannet_proto::rules::to_yaml;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The descriptors by which a process is called by the kernel or has it count: links of BPF programs, and perf events.
fn attached(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    descriptors
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| {
            let target = target.to_string_lossy();
            target.contains("perf_event") || target.contains("bpf_link")
        })
        .count()
}

async fn samples(agent: &Agent) -> Option<u64> {
    let (_, body) = http_get(&agent.debug(), "/debug/rules?format=json").await?;
    let rules: Value = serde_json::from_str(&body).ok()?;
    rules.as_array()?.iter().find(|rule| rule["id"] == "shop")?["samples"].as_u64()
}

#[tokio::test]
async fn r40_file_and_signal_detach_all_that_is_attached_and_attach_it_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rules.yaml");
    fs::write(&file, to_yaml(&[rule("shop", "webshop", 99)])).unwrap();
    // Nobody listens there: a node that is cut off is switched off like any other.
    let mut agent = Agent::start(
        "switched",
        "http://127.0.0.1:9",
        &[&format!("--rules={}", file.display()), "--window=1s"],
    );
    let sample = Sample::start(100);
    let pid = agent.program().pid();
    let disable = agent.state().join("disable");
    let signal = |signal| kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
    let off = [
        (Box::new(|| fs::write(&disable, "").unwrap()) as Box<dyn Fn()>, "disable; remove it"),
        (Box::new(|| signal(Signal::USR1)), "SIGUSR1"),
    ];
    let on: [Box<dyn Fn()>; 2] =
        [Box::new(|| fs::remove_file(&disable).unwrap()), Box::new(|| signal(Signal::USR2))];
    let mut before = 0;
    for ((switch_off, words), switch_on) in off.iter().zip(&on) {
        eventually("the rule samples", async || samples(&agent).await.filter(|now| *now > before)).await;
        assert!(attached(pid) > 4, "{}", attached(pid));
        switch_off();
        // Within a second on a machine that is not full of other tests.
        eventually("nothing is attached", async || (attached(pid) == 0).then_some(())).await;
        // What was in flight has been counted by the time of the second look.
        tokio::time::sleep(Duration::from_millis(500)).await;
        before = eventually("the node's page", async || samples(&agent).await).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((samples(&agent).await, attached(pid)), (Some(before), 0), "nothing is sampled");
        let log = agent.program().log();
        assert!(log.contains(words), "{words}: {log}");
        switch_on();
    }
    eventually("it samples again", async || samples(&agent).await.filter(|now| *now > before)).await;
    assert!(attached(pid) > 4, "{}", attached(pid));
    assert!(agent.program().terminate().success());
    sample.finish();
}
