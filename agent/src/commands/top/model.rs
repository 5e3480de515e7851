//! The state of the screen of `top` and the effect of keys. It needs no terminal.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use gannet_proto::{
    ledger::Ledger,
    profiles::{Location, Profile},
};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::snapshot::{ProcessInfo, Snapshot};
use crate::model::ProcessKey;

/// Sort order of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SortBy {
    /// Share of a processor.
    #[default]
    Cpu,
    /// Number of samples.
    Samples,
    /// Pid in ascending order.
    Pid,
    /// Command name in alphabetical order.
    Comm,
    /// Unit, container or executable.
    Owner,
}

impl SortBy {
    const ALL: [Self; 5] = [Self::Cpu, Self::Samples, Self::Pid, Self::Comm, Self::Owner];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Samples => "samples",
            Self::Pid => "pid",
            Self::Comm => "command",
            Self::Owner => "unit",
        }
    }

    fn step(self, by: usize) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or_default();
        Self::ALL[(at + by) % Self::ALL.len()]
    }
}

/// Effect of a key on the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The program goes on.
    Stay,
    /// The user leaves.
    Leave,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) info: ProcessInfo,
    /// CPU time in the window, in nanoseconds.
    pub(super) cpu_ns: i64,
    pub(super) samples: i64,
    pub(super) functions: Vec<Function>,
    pub(super) tree: Vec<Branch>,
}

/// A function of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) own_ns: i64,
    pub(super) total_ns: i64,
}

/// A line of the stack tree. Its callers stand above it with smaller depths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Branch {
    pub(super) depth: usize,
    pub(super) name: String,
    pub(super) total_ns: i64,
}

/// Smallest share of its process with which the tree shows a branch.
const MIN_BRANCH_SHARE: f64 = 0.01;
/// Depth of the tree; a terminal is not wide enough for more.
const MAX_DEPTH: usize = 128;

/// The content of the screen.
#[derive(Debug, Default)]
pub(super) struct Model {
    rows: Vec<Row>,
    pub(super) duration: Duration,
    pub(super) ledger: Ledger,
    /// Windows that were not shown.
    pub(super) skipped: u64,
    /// Why rates are lowered.
    pub(super) governed: Option<String>,
    pub(super) sort: SortBy,
    pub(super) reversed: bool,
    pub(super) filter: String,
    pub(super) editing_filter: bool,
    pub(super) paused: bool,
    pub(super) open: Option<ProcessKey>,
    selected: Option<ProcessKey>,
    /// Scroll offset in the lists of the open process, in lines.
    pub(super) scroll: usize,
    /// Number of rows that fit; the view sets it.
    pub(super) page: usize,
}

impl Model {
    /// Shows a new window, unless the table is paused.
    pub(super) fn update(&mut self, snapshot: &Snapshot) {
        if self.paused {
            return;
        }
        let mut sums: HashMap<i64, Sums> = HashMap::new();
        for profile in &snapshot.profiles {
            add(profile, &mut sums);
        }
        self.rows = snapshot
            .processes
            .iter()
            .map(|info| {
                let sums = sums.remove(&i64::from(info.key.tgid)).unwrap_or_default();
                Row {
                    info: info.clone(),
                    cpu_ns: sums.cpu_ns,
                    samples: sums.samples,
                    tree: sums.tree.branches(sums.cpu_ns),
                    functions: sums.functions(),
                }
            })
            .collect();
        self.duration = snapshot.duration;
        self.ledger = snapshot.ledger.clone();
        self.skipped = snapshot.skipped;
        self.governed.clone_from(&snapshot.governed);
    }

    /// Returns the visible rows in order.
    pub(super) fn rows(&self) -> Vec<&Row> {
        let pattern = self.filter.to_lowercase();
        let holds = |text: &str| text.to_lowercase().contains(&pattern);
        let mut rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| {
                let ProcessInfo { key, comm, owner, rule, state, interpreter } = &row.info;
                pattern.is_empty()
                    || [comm, owner, rule, state, interpreter].iter().any(|text| holds(text))
                    || key.tgid.to_string() == pattern
                    || row.functions.first().is_some_and(|function| holds(&function.name))
            })
            .collect();
        rows.sort_by(|a, b| {
            let order = match self.sort {
                SortBy::Cpu => b.cpu_ns.cmp(&a.cpu_ns),
                SortBy::Samples => b.samples.cmp(&a.samples),
                SortBy::Pid => Ordering::Equal,
                SortBy::Comm => a.info.comm.cmp(&b.info.comm),
                SortBy::Owner => a.info.owner.cmp(&b.info.owner),
            };
            let order = if self.reversed { order.reverse() } else { order };
            order.then(a.info.key.cmp(&b.info.key))
        });
        if self.sort == SortBy::Pid && self.reversed {
            rows.reverse();
        }
        rows
    }

    /// Returns the index of the selected row. The selection follows the process when the order changes.
    pub(super) fn selected_index(&self, rows: &[&Row]) -> usize {
        self.selected.and_then(|key| rows.iter().position(|row| row.info.key == key)).unwrap_or_default()
    }

    pub(super) fn open_row(&self) -> Option<&Row> {
        let key = self.open?;
        self.rows.iter().find(|row| row.info.key == key)
    }

    pub(super) fn percent(&self, cpu_ns: i64) -> f64 {
        let window = self.duration.as_nanos() as f64;
        if window > 0.0 { cpu_ns as f64 * 100.0 / window } else { 0.0 }
    }

    /// Handles a key.
    pub(super) fn key(&mut self, key: KeyEvent) -> Outcome {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Outcome::Leave;
        }
        if self.editing_filter {
            match key.code {
                KeyCode::Enter => self.editing_filter = false,
                KeyCode::Esc => {
                    self.editing_filter = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => {
                    self.filter.pop();
                }
                KeyCode::Char(character) => self.filter.push(character),
                _ => {}
            }
            return Outcome::Stay;
        }
        match key.code {
            KeyCode::Esc if self.open.is_some() => self.open = None,
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Esc | KeyCode::Char('q') => return Outcome::Leave,
            KeyCode::Char('/') => self.editing_filter = true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('s' | '>') => self.sort = self.sort.step(1),
            KeyCode::Char('<') => self.sort = self.sort.step(SortBy::ALL.len() - 1),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Down | KeyCode::Char('j') => self.move_by(1),
            KeyCode::Up | KeyCode::Char('k') => self.move_by(-1),
            KeyCode::PageDown => self.move_by(self.page.max(1) as isize),
            KeyCode::PageUp => self.move_by(-(self.page.max(1) as isize)),
            KeyCode::Home | KeyCode::Char('g') => self.move_by(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.move_by(isize::MAX),
            KeyCode::Enter | KeyCode::Right if self.open.is_none() => {
                let rows = self.rows();
                let key = rows.get(self.selected_index(&rows)).map(|row| row.info.key);
                self.open = key;
                self.scroll = 0;
            }
            KeyCode::Left | KeyCode::Backspace => self.open = None,
            _ => {}
        }
        Outcome::Stay
    }

    fn move_by(&mut self, by: isize) {
        if let Some(row) = self.open_row() {
            let last = row.tree.len().max(row.functions.len()).saturating_sub(1);
            self.scroll = self.scroll.saturating_add_signed(by).min(last);
            return;
        }
        let rows = self.rows();
        let at = self.selected_index(&rows).saturating_add_signed(by).min(rows.len().saturating_sub(1));
        let key = rows.get(at).map(|row| row.info.key);
        self.selected = key;
    }
}

/// Sums over the samples of one process.
#[derive(Debug, Default)]
struct Sums {
    cpu_ns: i64,
    samples: i64,
    /// Own and total nanoseconds by function.
    functions: HashMap<String, (i64, i64)>,
    tree: Tree,
}

impl Sums {
    fn functions(self) -> Vec<Function> {
        let mut functions: Vec<Function> = self
            .functions
            .into_iter()
            .map(|(name, (own_ns, total_ns))| Function { name, own_ns, total_ns })
            .collect();
        functions.sort_by(|a, b| (b.own_ns, b.total_ns, &a.name).cmp(&(a.own_ns, a.total_ns, &b.name)));
        functions
    }
}

#[derive(Debug, Default)]
struct Tree {
    total_ns: i64,
    children: BTreeMap<String, Tree>,
}

impl Tree {
    fn branches(&self, all_ns: i64) -> Vec<Branch> {
        let mut branches = Vec::new();
        self.add_branches(0, (all_ns as f64 * MIN_BRANCH_SHARE) as i64, &mut branches);
        branches
    }

    fn add_branches(&self, depth: usize, min_ns: i64, branches: &mut Vec<Branch>) {
        let mut children: Vec<_> =
            self.children.iter().filter(|(_, child)| child.total_ns >= min_ns).collect();
        children.sort_by_key(|(_, child)| std::cmp::Reverse(child.total_ns));
        for (name, child) in children {
            branches.push(Branch { depth, name: name.clone(), total_ns: child.total_ns });
            child.add_branches(depth + 1, min_ns, branches);
        }
    }
}

/// Adds each sample of a profile to the sums of its process.
fn add(profile: &Profile, sums: &mut HashMap<i64, Sums>) {
    let text = |index: i64| {
        usize::try_from(index)
            .ok()
            .and_then(|index| profile.string_table.get(index))
            .map_or("", String::as_str)
    };
    let functions: HashMap<u64, &str> =
        profile.function.iter().map(|function| (function.id, text(function.name))).collect();
    let files: HashMap<u64, &str> =
        profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
    let locations: HashMap<u64, &Location> =
        profile.location.iter().map(|location| (location.id, location)).collect();
    for sample in &profile.sample {
        let Some(pid) = sample.label.iter().find(|label| text(label.key) == "pid").map(|label| label.num)
        else {
            continue;
        };
        let (Some(count), Some(value)) = (sample.value.first().copied(), sample.value.last().copied()) else {
            continue;
        };
        let sums = sums.entry(pid).or_default();
        sums.samples += count;
        sums.cpu_ns += value;
        let mut names: Vec<String> = Vec::with_capacity(sample.location_id.len());
        for location in sample.location_id.iter().filter_map(|id| locations.get(id)) {
            names.extend(
                location
                    .line
                    .iter()
                    .filter_map(|line| functions.get(&line.function_id).map(|name| (*name).to_owned())),
            );
            if location.line.is_empty() {
                let file = files.get(&location.mapping_id).copied().unwrap_or_default();
                names.push(format!(
                    "{} {:#x}",
                    file.rsplit('/').next().unwrap_or_default(),
                    location.address
                ));
            }
        }
        if let Some(leaf) = names.first() {
            sums.functions.entry(leaf.clone()).or_default().0 += value;
        }
        let mut branch = &mut sums.tree;
        for name in names.iter().rev().take(MAX_DEPTH) {
            branch = branch.children.entry(name.clone()).or_default();
            branch.total_ns += value;
        }
        names.sort_unstable();
        // A recursive function is on the stack several times but takes the time once.
        names.dedup();
        for name in names {
            sums.functions.entry(name).or_default().1 += value;
        }
    }
}
