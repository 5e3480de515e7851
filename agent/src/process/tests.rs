//! The process table and the kernel's mapping events: which image gets a mapping, and what is dropped when there is no room.

use std::{fs, io, num::NonZeroUsize, path::PathBuf, sync::Arc};

use super::{ProcFs, ProcessState, ProcessTable, RealProc, images::MAX_MAPPINGS};
use crate::{
    cgroup::CgroupHierarchy,
    model::{
        ExitStatus, FileNumbers, ImageKey, Mapping, MappingEvent, MappingKind, NewMapping, Origin,
        ProcessKey, Subject,
    },
};

/// Above the process ids that a kernel assigns.
const TGID: u32 = 5_000_000;
const SECOND: u64 = 1_000_000_000;
/// The room for pending images, as `table.rs` has it.
const PENDING: u64 = 4096;
const NOW: u64 = 100 * SECOND;

/// A `/proc` that shows each process with one mapping.
struct Shown;

impl ProcFs for Shown {
    fn read(&self, key: ProcessKey, file: &'static str, _: u64) -> io::Result<Vec<u8>> {
        let ticks = key.start_boottime_ns / 10_000_000;
        let text = match file {
            "stat" => format!("{} (x) R 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 0\n", key.tgid),
            "cgroup" => "6:memory:/of-memory\n5:cpu,cpuacct:/of-cpu\n0::/here\n".into(),
            "comm" => "read\n".into(),
            "maps" => "1000-2000 r-xp 00000000 08:01 99 /bin/read\n".into(),
            _ => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(text.into_bytes())
    }

    fn link(&self, _: ProcessKey, file: &'static str) -> io::Result<PathBuf> {
        Ok(if file == "exe" { "/bin/read".into() } else { "mnt:[1]".into() })
    }

    fn owner(&self, _: ProcessKey) -> io::Result<u32> {
        Ok(0)
    }

    fn now_ns(&self) -> u64 {
        NOW
    }
}

fn table() -> ProcessTable {
    table_of(CgroupHierarchy::V2, 64)
}

fn table_of(hierarchy: CgroupHierarchy, max: usize) -> ProcessTable {
    ProcessTable::reading(hierarchy, max, NonZeroUsize::new(64).unwrap(), Arc::new(Shown))
}

fn subject(tgid: u32, exec_id: u32, ktime_ns: u64) -> Subject {
    Subject {
        key: ProcessKey { tgid, start_boottime_ns: SECOND },
        exec_id,
        ktime_ns,
        cgroup_id: 1,
        comm: "reported".into(),
        rules: 1,
        candidates: 0,
    }
}

fn mapping(number: u64) -> NewMapping {
    NewMapping {
        start: number << 20,
        end: (number << 20) + 4096,
        offset: 0,
        dev: 2049,
        inode: number,
        path: format!("/bin/m{number}"),
    }
}

fn cleared(table: &mut ProcessTable, tgid: u32, ktime_ns: u64) {
    table.mapping_event(MappingEvent::Cleared { tgid, ktime_ns });
}

fn mapped(table: &mut ProcessTable, tgid: u32, ktime_ns: u64, number: u64) {
    table.mapping_event(MappingEvent::Mapped { tgid, ktime_ns, mapping: mapping(number) });
}

fn exec(table: &mut ProcessTable, subject: &Subject) {
    table.exec(subject, Origin::default(), "/bin/reported", FileNumbers::default()).unwrap();
}

/// Returns the paths of an image's mappings, by address.
#[track_caller]
fn paths(table: &ProcessTable, subject: &Subject) -> Vec<String> {
    let process = table.get(&ImageKey::of(subject)).unwrap();
    let path = |mapping: &Mapping| match &mapping.kind {
        MappingKind::File(file) => file.path.clone(),
        other => format!("{other:?}"),
    };
    process.image.mappings.iter().map(path).collect()
}

#[test]
fn reported_mappings_belong_to_the_next_image() {
    let mut table = table();
    cleared(&mut table, TGID, 10 * SECOND);
    mapped(&mut table, TGID, 10 * SECOND + 1, 1);
    mapped(&mut table, TGID, 10 * SECOND + 2, 2);
    let first = subject(TGID, 1, 10 * SECOND + 3);
    exec(&mut table, &first);
    // Behind the exec event they belong to the image in the table.
    mapped(&mut table, TGID, 10 * SECOND + 4, 3);
    assert_eq!(paths(&table, &first), ["/bin/m1", "/bin/m2", "/bin/m3"]);
    // Between the clearing and the exec event they belong to the next image alone.
    cleared(&mut table, TGID, 20 * SECOND);
    mapped(&mut table, TGID, 20 * SECOND + 1, 4);
    assert_eq!(paths(&table, &first), ["/bin/m1", "/bin/m2", "/bin/m3"]);
    let second = subject(TGID, 2, 20 * SECOND + 2);
    exec(&mut table, &second);
    assert_eq!(paths(&table, &first), ["/bin/m1", "/bin/m2", "/bin/m3"]);
    assert_eq!(paths(&table, &second), ["/bin/m4"]);
}

#[test]
fn a_sampled_pending_image_gets_later_mappings_once() {
    let mut table = table();
    cleared(&mut table, TGID, 10 * SECOND);
    mapped(&mut table, TGID, 10 * SECOND + 1, 1);
    let sample = subject(TGID, 1, 10 * SECOND + 2);
    table.sampled(&sample, &[]).unwrap();
    // Its exec event may never come, so it gets the mapping now.
    mapped(&mut table, TGID, 10 * SECOND + 3, 2);
    assert_eq!(paths(&table, &sample), ["/bin/m1", "/bin/m2"]);
    // Another image of the process in the table does not.
    let other = subject(TGID, 2, 10 * SECOND + 4);
    table.running(&other, Origin::default()).unwrap();
    mapped(&mut table, TGID, NOW + 1, 3);
    assert_eq!(paths(&table, &other), ["/bin/read"]);
}

#[test]
fn a_sample_from_before_the_clearing_gets_no_later_mapping() {
    let mut table = table();
    cleared(&mut table, TGID, 10 * SECOND);
    mapped(&mut table, TGID, 10 * SECOND + 1, 1);
    // At the very time of the clearing it is of the new image.
    for (late, known) in [(10 * SECOND - 1, false), (10 * SECOND, true)] {
        let sample = subject(TGID, 1, late);
        table.sampled(&sample, &[]).unwrap();
        let is_known = paths(&table, &sample) == ["/bin/m1"];
        assert_eq!(is_known, known, "{late}");
        let state = table.get(&ImageKey::of(&sample)).unwrap().state;
        assert_eq!(state == ProcessState::Missed, !known);
        // The next turn begins without an image in the table.
        table.exit(&subject(TGID, 1, late), ExitStatus(0));
        table.next_window(|_| false);
        table.next_window(|_| false);
        cleared(&mut table, TGID, 10 * SECOND);
        mapped(&mut table, TGID, 10 * SECOND + 1, 1);
    }
}

#[test]
fn a_mapping_from_before_a_reading_is_not_added_again() {
    let mut table = table();
    let running = subject(TGID, 1, NOW - 1);
    table.running(&running, Origin::default()).unwrap();
    assert_eq!(paths(&table, &running), ["/bin/read"]);
    mapped(&mut table, TGID, NOW - 1, 7);
    // At the time of the reading, the reading has it.
    mapped(&mut table, TGID, NOW, 8);
    assert_eq!(paths(&table, &running), ["/bin/read"]);
    mapped(&mut table, TGID, NOW + 1, 9);
    assert_eq!(paths(&table, &running), ["/bin/read", "/bin/m9"]);
}

/// Returns whether an image of this process was pending: its mapping is the reported one, not the one in `/proc`.
#[track_caller]
fn was_pending(table: &mut ProcessTable, tgid: u32, ktime_ns: u64) -> bool {
    mapped(table, tgid, ktime_ns, 1);
    let subject = subject(tgid, 1, ktime_ns + 1);
    exec(table, &subject);
    paths(table, &subject) == ["/bin/m1"]
}

#[test]
fn a_full_list_of_pending_images_drops_the_old_ones_alone() {
    let fill = |from: u64| {
        let mut table = table();
        for number in 0..PENDING {
            cleared(&mut table, TGID + 1 + number as u32, from + u64::from(number >= 2));
        }
        table
    };
    let from = 10 * SECOND;
    // All are young: no room for another one.
    let mut young = fill(from);
    cleared(&mut young, TGID, from + SECOND - 1);
    assert_eq!(young.stats().pending_full, 1);
    assert!(!was_pending(&mut young, TGID, from + SECOND));
    assert!(was_pending(&mut young, TGID + 1, from + SECOND));
    // Two have waited for the whole time: they go, and the new one finds room.
    let mut old = fill(from);
    cleared(&mut old, TGID, from + SECOND);
    assert_eq!(old.stats().pending_full, 0);
    assert!(was_pending(&mut old, TGID, from + SECOND));
    assert!(!was_pending(&mut old, TGID + 1, from + SECOND));
    assert!(!was_pending(&mut old, TGID + 2, from + SECOND));
    assert!(was_pending(&mut old, TGID + 3, from + SECOND));
    // Below the limit nothing is dropped, however old.
    let mut few = table();
    cleared(&mut few, TGID + 1, from);
    cleared(&mut few, TGID, from + 50 * SECOND);
    assert!(was_pending(&mut few, TGID + 1, from + 50 * SECOND + 1));
}

/// Checks that there is always room for a process in the table, whose present image must not get the mappings of the next one.
#[test]
fn a_sampled_process_is_pending_however_many_others_are() {
    let mut table = table();
    cleared(&mut table, TGID, 9 * SECOND);
    mapped(&mut table, TGID, 9 * SECOND + 1, 1);
    let first = subject(TGID, 1, 9 * SECOND + 2);
    exec(&mut table, &first);
    for number in 0..PENDING {
        cleared(&mut table, TGID + 1 + number as u32, 10 * SECOND);
    }
    cleared(&mut table, TGID, 10 * SECOND + 1);
    mapped(&mut table, TGID, 10 * SECOND + 2, 4);
    assert_eq!(paths(&table, &first), ["/bin/m1"]);
    let second = subject(TGID, 2, 10 * SECOND + 3);
    exec(&mut table, &second);
    assert_eq!(paths(&table, &second), ["/bin/m4"]);
}

#[test]
fn a_pending_image_holds_a_bounded_number_of_mappings() {
    let mut table = table();
    cleared(&mut table, TGID, 10 * SECOND);
    for _ in 0..MAX_MAPPINGS - 1 {
        mapped(&mut table, TGID, 10 * SECOND + 1, 1);
    }
    mapped(&mut table, TGID, 10 * SECOND + 2, 2);
    mapped(&mut table, TGID, 10 * SECOND + 3, 3);
    let subject = subject(TGID, 1, 10 * SECOND + 4);
    exec(&mut table, &subject);
    assert_eq!(paths(&table, &subject), ["/bin/m1", "/bin/m2"]);
    assert_eq!((cut(&table, &subject), table.stats().cut_mappings), (1, 1));
}

fn cut(table: &ProcessTable, subject: &Subject) -> u64 {
    table.get(&ImageKey::of(subject)).unwrap().cut_mappings
}

#[test]
fn mappings_beyond_the_limit_are_counted_once() {
    let proc = tempfile::tempdir().unwrap();
    let directory = proc.path().join(TGID.to_string());
    fs::create_dir(&directory).unwrap();
    let write = |file: &str, text: String| fs::write(directory.join(file), text).unwrap();
    let fields = "R 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 100 0";
    write("stat", format!("{TGID} (x) {fields}\n"));
    write("status", "Uid:\t0\t0\t0\t0\n".into());
    write("cgroup", "0::/here\n".into());
    write("comm", "read\n".into());
    std::os::unix::fs::symlink("/bin/read", directory.join("exe")).unwrap();
    let maps = |count: usize| {
        (0..count as u64).fold(String::new(), |text, n| {
            text + &format!("{:x}-{:x} r-xp 00000000 00:00 0 \n", n << 20, (n << 20) + 4096)
        })
    };
    let files = NonZeroUsize::new(64).unwrap();
    let real = Arc::new(RealProc::at(proc.path()));
    let mut table = ProcessTable::reading(CgroupHierarchy::V2, 64, files, real);
    write("maps", maps(MAX_MAPPINGS));
    let running = subject(TGID, 1, SECOND);
    table.running(&running, Origin::default()).unwrap();
    assert_eq!((cut(&table, &running), table.stats().cut_mappings), (0, 0));
    // Each reading finds the same seven. Mappings that the kernel reports behind them are more.
    write("maps", maps(MAX_MAPPINGS + 7));
    for _ in 0..2 {
        table.sampled(&running, &[1 << 46]).unwrap();
        assert_eq!((cut(&table, &running), table.stats().cut_mappings), (7, 7));
        std::thread::sleep(2 * super::images::RESCAN_INTERVAL);
    }
    write("maps", maps(3));
    table.sampled(&running, &[1 << 46]).unwrap();
    assert_eq!((cut(&table, &running), table.stats().cut_mappings), (0, 7));
    assert_eq!(table.stats().rescans, 3);
}

#[test]
fn a_child_has_the_image_of_its_parent_and_facts_of_its_own() {
    let mut table = table();
    let parent = subject(TGID, 1, NOW - 9);
    table.running(&parent, Origin { parent: 1, uid: 5 }).unwrap();
    table.sampled(&parent, &[]).unwrap();
    table.next_window(|_| false);
    let child = Subject { cgroup_id: 2, comm: "thread".into(), rules: 2, ..subject(TGID + 1, 1, NOW + 9) };
    let forked = table.fork(&child, Origin { parent: TGID, uid: 6 }).unwrap();
    assert_eq!((forked.key, forked.parent, forked.cgroup_id), (ImageKey::of(&child), TGID, 2));
    assert_eq!((forked.rules, forked.samples, forked.window, forked.seen_ns), (2, 0, 1, NOW + 9));
    assert_eq!((forked.comm.as_str(), forked.reported_comm.as_str()), ("thread", "thread"));
    assert_eq!((forked.exe.as_str(), forked.state), ("/bin/read", ProcessState::Alive));
    assert_eq!(paths(&table, &child), ["/bin/read"]);
    // Of an unknown parent, the event says only this; the path of the control group is known.
    let orphan = subject(TGID + 2, 1, NOW + 9);
    let forked = table.fork(&orphan, Origin { parent: TGID + 9, uid: 6 }).unwrap();
    assert_eq!((forked.parent, forked.uid, forked.state), (TGID + 9, Some(6), ProcessState::Unread));
    assert_eq!(forked.cgroup, "/here");
}

#[test]
fn control_groups_are_those_of_the_hierarchy_of_the_kernel_side() {
    for (hierarchy, path) in [
        (CgroupHierarchy::V2, "/here"),
        (CgroupHierarchy::V1Cpu, "/of-cpu"),
        (CgroupHierarchy::V1Memory, "/of-memory"),
    ] {
        let mut table = table_of(hierarchy, 64);
        let running = table.running(&subject(TGID, 1, NOW - 1), Origin::default()).unwrap();
        assert_eq!(running.cgroup, path);
    }
}

/// Checks that the memory of the readings has as many entries as the table.
#[test]
fn each_process_of_a_large_table_is_read() {
    let processes = 4200;
    let mut table = table_of(CgroupHierarchy::V2, processes as usize);
    for number in 0..processes {
        table.running(&subject(TGID + number, 1, NOW - 1), Origin::default()).unwrap();
    }
    let stats = table.stats();
    assert_eq!((stats.loaded, stats.missed), (processes.into(), 0));
}

#[test]
fn the_table_of_a_node_knows_its_control_groups() {
    let hierarchy = CgroupHierarchy::detect();
    let files = NonZeroUsize::new(8).unwrap();
    let table = ProcessTable::new(hierarchy, 8, files, None);
    let groups = table.groups().expect("the control groups of this machine can be opened");
    assert!(groups.root().is_dir());
}
