//! Full BPF maps: what the agent shows, and that it goes on once they have room.

use std::process::Command;

use libbpf_rs::{MapCore as _, MapFlags, MapHandle, query::MapInfoIter};

use crate::{
    common::{Language, Running, program, program_in},
    daemon::Daemon,
};

const SPIN: &str = "int main(void) { for (volatile long i = 0;; i++) ; }";
const GO_SPIN: &str = r#"
package main

import (
	"context"
	"runtime/pprof"
)

var n int

func main() {
	pprof.Do(context.Background(), pprof.Labels("part", "spin"), func(context.Context) {
		for {
			n++
		}
	})
}
"#;

/// Entries of processes that do not exist take the room of a map.
struct Full(MapHandle);

impl Full {
    /// Fills the map of this name of the agent that was started last.
    #[track_caller]
    fn newest(name: &str) -> Self {
        let maps = MapInfoIter::default().filter(|map| map.name == name);
        let map = MapHandle::from_map_id(maps.map(|map| map.id).max().unwrap()).unwrap();
        let value = vec![0; map.value_size() as usize];
        let fits = |number: &u32| map.update(&Self::key(*number), &value, MapFlags::ANY).is_ok();
        let entries = (0..=map.max_entries()).take_while(fits).count();
        assert!(entries > 1000 && entries <= map.max_entries() as usize, "{entries} entries fit into {name}");
        Self(map)
    }

    /// Returns a thread group id that the kernel gives no process.
    fn key(number: u32) -> [u8; 4] {
        (1 << 31 | number).to_ne_bytes()
    }

    fn make_room(&self) {
        for number in 0..100 {
            self.0.delete(&Self::key(number)).unwrap();
        }
    }

    fn has(&self, process: &Running) -> bool {
        self.0.lookup(&process.0.id().to_ne_bytes(), MapFlags::ANY).unwrap().is_some()
    }
}

/// Checks the three maps with an entry for each process: one line with the cure, a count for each try, fewer and fewer tries, and
/// the entry once there is room for it.
#[test]
fn entries_that_a_full_map_refuses_are_logged_and_tried_again() {
    const MAPS: [&str; 3] = ["marks", "list_frames", "label_sources"];
    let marked = program("marked-spin", SPIN, &[]);
    let labelled = program_in(Language::Go, "labelled-spin", GO_SPIN, &[]);
    let daemon = Daemon::start(&[]);
    let full = MAPS.map(Full::newest);
    // Only the agent can compare paths, so it marks the first process. The other two run by rules of the kernel side.
    daemon.set_rules(&format!(
        "rules:\n- {{id: marks, match: {{exe: ['{}']}}, capture: {{hz: 49}}}}\n\
         - {{id: lists, match: {{comm: ['python3*']}}, capture: {{hz: 49}}}}\n\
         - {{id: labels, match: {{comm: ['labelled-spin']}}, capture: {{hz: 49}}}}\n",
        marked.display()
    ));
    let processes = [
        Running::start(&mut Command::new(&marked)),
        Running::start(Command::new("python3").args(["-c", "while True: pass"])),
        Running::start(&mut Command::new(labelled)),
    ];
    let refused = |map: &str| {
        let metrics = daemon.metrics();
        let name = format!("gannet_agent_bpf_map_refused_total{{map=\"{map}\",missing=\"entries\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        count.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    daemon.wait_for("each entry is refused twice", || MAPS.iter().all(|map| refused(map) >= 2));
    for (map, (full, process)) in MAPS.iter().zip(full.iter().zip(&processes)) {
        assert!(!full.has(process), "{map}");
        let log = daemon.log();
        let name = format!("BPF map {map}:");
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&name)).collect();
        let parts = [&format!("process {}", process.0.id()), "tries again", "raise --processes"];
        // Another Python may run on this machine.
        let is_right =
            lines.len() == 1 && (map == &"list_frames" || parts.iter().all(|part| lines[0].contains(part)));
        assert!(is_right, "{map}: {lines:?}");
        full.make_room();
    }
    let written = || full.iter().zip(&processes).all(|(full, process)| full.has(process));
    daemon.wait_for("each entry is written", written);
    daemon.end();
}
