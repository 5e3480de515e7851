//! One collector and many simulated nodes, on real connections.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use gannet_e2e::{Collector, Fleet, eventually, push_round};

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_nodes_receive_each_set_once_over_a_restart() {
    const NODES: u64 = 100;
    let mut collector = Collector::start().await;
    let fleet = Fleet::start(&collector.url(), NODES, Duration::from_secs(5)).await;
    for round in 0..3 {
        let took = push_round(&collector, round, 5, NODES).await;
        eprintln!("round {round}: the last answer after {took:?}");
    }
    assert_eq!(fleet.pushed(), 3 * NODES, "each set goes to each node once");
    collector.program().kill();
    eventually("no node is connected", async || (fleet.counts.connected.load(Relaxed) == 0).then_some(()))
        .await;
    collector.up().await;
    fleet.connected().await;
    assert_eq!(fleet.pushed(), 3 * NODES, "no node receives a set that it has");
    // And the next set reaches them all.
    push_round(&collector, 3, 5, NODES).await;
    assert_eq!(fleet.pushed(), 4 * NODES);
}
