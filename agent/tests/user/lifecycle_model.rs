//! A model of the process table: processes fork, exec, exit and reuse PIDs. Their events come late, in part or not at all, and
//! `/proc` shows the state of that later time. Whatever the table then says of a sample's image must be true.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use gannet_agent::{
    cgroup::CgroupHierarchy,
    model::{
        ExitStatus, FileNumbers, ImageKey, MappingEvent, MappingKind, NewMapping, Origin, ProcessKey, Subject,
    },
    process::{ProcFs, ProcessState, ProcessTable},
};
use proptest::prelude::*;

/// The first PID: above those that a kernel assigns, so that it names no real process.
const FIRST: u32 = 5_000_000;
const PIDS: u32 = 5;
/// Two ticks of `/proc`.
const STEP_NS: u64 = 20_000_000;

/// One process of the world, as it is now.
#[derive(Clone, Debug)]
struct Life {
    key: ProcessKey,
    exec_id: u32,
    /// The number of its program.
    program: u64,
    parent: u32,
}

#[derive(Default)]
struct World {
    now_ns: u64,
    lives: BTreeMap<u32, Life>,
    programs: u64,
}

impl World {
    fn life(&self, key: ProcessKey) -> io::Result<&Life> {
        self.lives.get(&key.tgid).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

/// The `/proc` of the world, as far as the table reads it.
struct Fake(Arc<Mutex<World>>);

impl ProcFs for Fake {
    fn read(&self, key: ProcessKey, file: &'static str, _: u64) -> io::Result<Vec<u8>> {
        let world = self.0.lock().unwrap();
        let life = world.life(key)?;
        let ticks = life.key.start_boottime_ns / 10_000_000;
        let text = match file {
            "stat" => {
                format!("{} (x) R {} 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 0\n", key.tgid, life.parent)
            }
            "cgroup" => "0::/here\n".into(),
            "comm" => format!("c{}\n", life.program),
            "maps" => {
                format!("1000-2000 r-xp 00000000 08:01 {} /bin/p{}\n", 100 + life.program, life.program)
            }
            _ => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(text.into_bytes())
    }

    fn link(&self, key: ProcessKey, file: &'static str) -> io::Result<PathBuf> {
        let world = self.0.lock().unwrap();
        let life = world.life(key)?;
        Ok(if file == "exe" { format!("/bin/p{}", life.program).into() } else { "mnt:[1]".into() })
    }

    fn owner(&self, key: ProcessKey) -> io::Result<u32> {
        self.0.lock().unwrap().life(key).map(|_| 0)
    }

    fn now_ns(&self) -> u64 {
        self.0.lock().unwrap().now_ns
    }
}

/// An event that is on its way to the table.
#[derive(Clone, Debug)]
enum Queued {
    Mapped(MappingEvent),
    Fork(Subject, Origin),
    Exec(Subject, Origin, FileNumbers),
    Exit(Subject),
    /// With the program from which it was taken.
    Sample(Subject, u64),
}

#[derive(Clone, Debug)]
enum Step {
    Fork(u32),
    Exec(u32),
    /// An exec with a tick in the middle.
    ExecSampled(u32),
    Exit(u32),
    Sample(u32),
    /// Delivers this number of events.
    Deliver(usize),
    /// Repeats the last fork or exec event, if only samples came after it.
    Again,
    /// Loses the next event.
    Lose,
    Window,
    Reconcile,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..PIDS).prop_map(Step::Fork),
        3 => (0..PIDS).prop_map(Step::Exec),
        1 => (0..PIDS).prop_map(Step::ExecSampled),
        2 => (0..PIDS).prop_map(Step::Exit),
        8 => (0..PIDS).prop_map(Step::Sample),
        6 => (1_usize..6).prop_map(Step::Deliver),
        1 => Just(Step::Again),
        1 => Just(Step::Lose),
        1 => Just(Step::Window),
        1 => Just(Step::Reconcile),
    ]
}

struct Model {
    world: Arc<Mutex<World>>,
    table: ProcessTable,
    queue: VecDeque<Queued>,
    /// Whether the kernel reports mappings.
    mapping_events: bool,
    may_lose: bool,
    lost: bool,
    /// Samples of the current window, each with the program of its image.
    samples: BTreeSet<(ImageKey, u64)>,
    /// Images whose exec was delivered.
    executed: BTreeSet<ImageKey>,
}

impl Model {
    fn new(mapping_events: bool, may_lose: bool) -> Self {
        let world = Arc::new(Mutex::new(World { now_ns: 1_000_000_000, ..World::default() }));
        let files = NonZeroUsize::new(64).unwrap();
        let table =
            ProcessTable::reading(CgroupHierarchy::V2, 1000, files, Arc::new(Fake(Arc::clone(&world))));
        let mut model = Self {
            world,
            table,
            queue: VecDeque::new(),
            mapping_events,
            may_lose,
            lost: false,
            samples: BTreeSet::new(),
            executed: BTreeSet::new(),
        };
        for pid in 0..PIDS {
            model.step(&Step::Fork(pid));
        }
        model
    }

    fn subject(world: &World, life: &Life) -> Subject {
        Subject {
            key: life.key,
            exec_id: life.exec_id,
            ktime_ns: world.now_ns,
            cgroup_id: 1,
            comm: format!("c{}", life.program),
            rules: 1,
            candidates: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        let world = Arc::clone(&self.world);
        let mut world = world.lock().unwrap();
        world.now_ns += STEP_NS;
        match *step {
            // A free PID goes to a child of the process with the next PID.
            Step::Fork(at) => {
                let pid = FIRST + at;
                if world.lives.contains_key(&pid) {
                    return;
                }
                let parent = world.lives.get(&(FIRST + (at + 1) % PIDS)).cloned();
                let life = Life {
                    key: ProcessKey { tgid: pid, start_boottime_ns: world.now_ns },
                    exec_id: parent.as_ref().map_or(1, |parent| parent.exec_id),
                    program: parent.as_ref().map_or(0, |parent| parent.program),
                    parent: parent.as_ref().map_or(1, |parent| parent.key.tgid),
                };
                let origin = Origin { parent: life.parent, uid: 0 };
                self.queue.push_back(Queued::Fork(Self::subject(&world, &life), origin));
                world.lives.insert(pid, life);
            }
            Step::Exec(at) | Step::ExecSampled(at) => {
                world.programs += 1;
                let program = world.programs;
                let now_ns = world.now_ns;
                let Some(life) = world.lives.get_mut(&(FIRST + at)) else { return };
                life.exec_id += 1;
                life.program = program;
                let life = life.clone();
                let (tgid, inode) = (life.key.tgid, 100 + program);
                let dev = rustix::fs::makedev(8, 1);
                if self.mapping_events {
                    self.queue.push_back(Queued::Mapped(MappingEvent::Cleared {
                        tgid,
                        ktime_ns: now_ns - STEP_NS + 1,
                    }));
                    let path = format!("/bin/p{program}");
                    let mapping = NewMapping { start: 0x1000, end: 0x2000, offset: 0, dev, inode, path };
                    self.queue.push_back(Queued::Mapped(MappingEvent::Mapped {
                        tgid,
                        ktime_ns: now_ns - 3,
                        mapping,
                    }));
                }
                let mut subject = Self::subject(&world, &life);
                if matches!(step, Step::ExecSampled(_)) {
                    subject.ktime_ns -= 2;
                    self.queue.push_back(Queued::Sample(subject.clone(), program));
                    subject.ktime_ns += 2;
                }
                let origin = Origin { parent: life.parent, uid: 0 };
                self.queue.push_back(Queued::Exec(subject, origin, FileNumbers { dev, inode }));
            }
            Step::Exit(at) => {
                if let Some(life) = world.lives.remove(&(FIRST + at)) {
                    self.queue.push_back(Queued::Exit(Self::subject(&world, &life)));
                }
            }
            Step::Sample(at) => {
                if let Some(life) = world.lives.get(&(FIRST + at)) {
                    self.queue.push_back(Queued::Sample(Self::subject(&world, life), life.program));
                }
            }
            Step::Deliver(count) => {
                drop(world);
                for _ in 0..count {
                    self.deliver();
                }
            }
            Step::Again => {
                let last =
                    self.queue.iter().rev().find(|event| !matches!(event, Queued::Sample(..))).cloned();
                self.queue.extend(last.filter(|last| matches!(last, Queued::Fork(..) | Queued::Exec(..))));
            }
            Step::Lose => {
                // Only lifecycle events: a lost sample has no effect. Without mapping events an exec cannot be lost, because
                // nothing else would show the new image.
                let losable = match self.queue.front() {
                    Some(Queued::Fork(..) | Queued::Exit(_)) => true,
                    Some(Queued::Exec(..)) => self.mapping_events,
                    _ => false,
                };
                if self.may_lose && losable {
                    self.queue.pop_front();
                    self.lost = true;
                }
            }
            Step::Window => {
                drop(world);
                self.window();
            }
            Step::Reconcile => {
                drop(world);
                // As the engine does: pending events must not look like lost ones.
                while !self.queue.is_empty() {
                    self.deliver();
                }
                self.table.reconcile();
            }
        }
    }

    fn deliver(&mut self) {
        match self.queue.pop_front() {
            None => {}
            Some(Queued::Mapped(event)) => self.table.mapping_event(event),
            Some(Queued::Fork(subject, origin)) => {
                self.table.fork(&subject, origin).unwrap();
            }
            Some(Queued::Exec(subject, origin, file)) => {
                self.table.exec(&subject, origin, "/given", file).unwrap();
                self.executed.insert(ImageKey::of(&subject));
            }
            Some(Queued::Exit(subject)) => self.table.exit(&subject, ExitStatus(0)),
            Some(Queued::Sample(subject, program)) => {
                self.table.sampled(&subject, &[0x1800]).unwrap();
                self.samples.insert((ImageKey::of(&subject), program));
            }
        }
    }

    /// Ends a window and checks what the table knows of each of its samples.
    fn window(&mut self) {
        // The engine reads all pending events before it ends a window.
        while !self.queue.is_empty() {
            self.deliver();
        }
        for (key, program) in &self.samples {
            let process = self.table.get(key).unwrap_or_else(|| panic!("{key:?} is not in the table"));
            if let Some(mapping) = process.image.find(0x1800) {
                let MappingKind::File(file) = &mapping.kind else { panic!("{mapping:?}") };
                assert_eq!(file.path, format!("/bin/p{program}"), "{process:?}");
            }
            let exe = &process.exe;
            assert!(exe.is_empty() || *exe == format!("/bin/p{program}") || exe == "/given", "{process:?}");
            // Without losses, the kernel's reports are complete.
            if self.mapping_events && !self.lost && *program != 0 {
                assert_eq!(*exe, format!("/bin/p{program}"), "{process:?}");
                assert!(process.image.find(0x1800).is_some(), "{process:?}");
            }
        }
        self.samples.clear();
        self.table.next_window(|_| false);
    }

    fn end(&mut self) {
        self.window();
        let lives: BTreeSet<ProcessKey> =
            self.world.lock().unwrap().lives.values().map(|life| life.key).collect();
        let alive = |table: &ProcessTable| -> BTreeSet<ProcessKey> {
            table.alive().map(|process| process.key.process).collect()
        };
        if !self.lost {
            assert_eq!(alive(&self.table), lives, "without losses the table holds what is alive");
        }
        self.table.reconcile();
        assert!(alive(&self.table).is_subset(&lives), "after a scan no exited process is in the table");
        // Past images go after a whole window.
        self.window();
        self.window();
        let past: Vec<_> = self.table.past().map(|process| process.key).collect();
        assert!(past.is_empty(), "{past:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Checks all orders of events, losses and late readings (R33, R37, R39).
    #[test]
    fn what_the_table_says_of_a_samples_image_is_true(
        steps in prop::collection::vec(step(), 0..120),
        mapping_events: bool,
        may_lose: bool,
    ) {
        let mut model = Model::new(mapping_events, may_lose);
        for step in &steps {
            model.step(step);
        }
        model.end();
    }
}

/// Checks that a process does not get the mappings that one with its id had begun to report, if the events between are lost.
#[test]
fn mappings_of_a_former_process_are_not_those_of_the_next() {
    let mut model = Model::new(true, true);
    let exec_and_exit = [Step::Window, Step::Exec(1), Step::Deliver(2), Step::Lose, Step::Exit(1)];
    let next_process = [Step::Fork(1), Step::Lose, Step::Lose, Step::Sample(1)];
    for step in exec_and_exit.iter().chain(&next_process) {
        model.step(step);
    }
    model.end();
}

fn subject(tgid: u32, start_boottime_ns: u64, exec_id: u32, ktime_ns: u64) -> Subject {
    Subject {
        key: ProcessKey { tgid, start_boottime_ns },
        exec_id,
        ktime_ns,
        cgroup_id: 1,
        comm: "c".into(),
        rules: 1,
        candidates: 0,
    }
}

fn table(max: usize) -> ProcessTable {
    let world = Arc::new(Mutex::new(World::default()));
    ProcessTable::reading(CgroupHierarchy::V2, max, NonZeroUsize::new(8).unwrap(), Arc::new(Fake(world)))
}

/// Checks that a process whose mappings cannot be read stays alive until its exit event (R40, R41).
#[test]
fn an_exec_with_unreadable_mappings_is_no_exit() {
    let mut table = table(10);
    let (origin, file) = (Origin::default(), FileNumbers::default());
    table.fork(&subject(FIRST, 1, 1, 10), origin).unwrap();
    table.exec(&subject(FIRST, 1, 2, 20), origin, "/bin/gone", file).unwrap();
    assert_eq!(table.alive().count(), 1, "it is alive, though it cannot be read");
    assert_eq!(table.alive().next().unwrap().exe, "/bin/gone");
    table.exit(&subject(FIRST, 1, 2, 30), ExitStatus(7 << 8));
    assert_eq!((table.alive().count(), table.past().count()), (0, 2), "both images wait for their samples");
    table.exit(&subject(FIRST, 1, 2, 30), ExitStatus(0));
    assert_eq!(table.past().count(), 2, "once");
    table.next_window(|_| false);
    assert_eq!(table.past().count(), 2, "a whole window has not passed");
    table.next_window(|key| key.exec_id == 2);
    assert_eq!(table.past().map(|process| process.key.exec_id).collect::<Vec<_>>(), [2], "samples wait");
    table.next_window(|_| false);
    assert_eq!(table.past().count(), 0);
}

/// Checks that late events of the first process do not affect the second (R35, R36).
#[test]
fn a_reused_pid_is_another_process() {
    let mut table = table(10);
    let (origin, file) = (Origin::default(), FileNumbers::default());
    table.exec(&subject(FIRST, 1, 2, 20), origin, "/bin/one", file).unwrap();
    table.exit(&subject(FIRST, 1, 2, 30), ExitStatus(0));
    table.exec(&subject(FIRST, 40, 2, 50), origin, "/bin/two", file).unwrap();
    // A late or repeated exit of the first process is no exit of the second.
    table.exit(&subject(FIRST, 1, 2, 30), ExitStatus(0));
    table.next_window(|_| false);
    table.next_window(|_| false);
    let alive: Vec<_> = table.alive().map(|process| (process.exe.as_str(), process.state)).collect();
    assert_eq!(alive, [("/bin/two", ProcessState::Missed)]);
    assert_eq!(table.past().count(), 0);
}

/// Checks that exited processes make room, and sampled ones do not (R42).
#[test]
fn exited_processes_make_room_and_sampled_ones_do_not() {
    let mut table = table(2);
    let (origin, file) = (Origin::default(), FileNumbers::default());
    let exec = |table: &mut ProcessTable, at: u32| {
        let subject = subject(FIRST + at, 1, 1, 20);
        table.exec(&subject, origin, "/bin/x", file)?;
        table.sampled(&subject, &[]).map(drop)
    };
    exec(&mut table, 0).unwrap();
    exec(&mut table, 1).unwrap();
    table.exit(&subject(FIRST, 1, 1, 30), ExitStatus(0));
    exec(&mut table, 2).unwrap();
    assert_eq!(table.past().count(), 0, "the exited one was dropped");
    let full = exec(&mut table, 3).unwrap_err();
    assert!(full.to_string().contains("--processes"), "{full}");
    assert_eq!((table.alive().count(), table.stats().saturated), (2, 1));
    table.exit(&subject(FIRST + 1, 1, 1, 30), ExitStatus(0));
    exec(&mut table, 3).unwrap();
}
