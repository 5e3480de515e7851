//! The kill switch of the real agent on the real kernel, seen from outside.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{fs, time::Duration};

use gannet_e2e::{Agent, Sample, eventually, http_get, rule};
use gannet_proto::rules::to_yaml;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Counts the descriptors of BPF links and perf events of a process.
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

/// Checks that the file `disable` and SIGUSR1 detach everything, and that SIGUSR2 and removing the file attach it again (R40).
#[tokio::test]
async fn file_and_signal_detach_all_programs_and_attach_them_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rules.yaml");
    fs::write(&file, to_yaml(&[rule("shop", "webshop", 99)])).unwrap();
    // No collector listens there: the switch also works on a node that is cut off.
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
        // On an idle machine this takes less than a second.
        eventually("nothing is attached", async || (attached(pid) == 0).then_some(())).await;
        // The agent counts the samples that were in flight within half a second.
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
