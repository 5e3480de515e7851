//! Call trees and tables of functions. The code does not recurse, because a stack may have thousands of frames.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use super::{
    PprofError,
    check::{Ids, check},
    error_frames::is_error_frame,
    guessed::sure_frames,
    interpreters::{InterpreterFrames, interpreted_name, is_interpreted},
};
use crate::{
    profiles::{Location, Mapping, Profile},
    query::{FlameNode, TopRow},
};

/// Side of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The profiles of the selection.
    Main,
    /// The profiles to compare with.
    Base,
}

/// Name of the root.
const ROOT: &str = "all";
/// Name of a node that replaces small subtrees.
const OTHER: &str = "[other]";
/// Name of a frame without a mapping.
const UNKNOWN: &str = "[unknown]";

/// Values of [`Side::Main`] and [`Side::Base`].
type Pair = [u64; 2];

fn add(sum: &mut Pair, side: usize, value: u64) {
    sum[side] = sum[side].saturating_add(value);
}

fn weight(pair: Pair) -> u64 {
    pair[0].saturating_add(pair[1])
}

/// Identity of a function: its name, and whether it is in the kernel.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct FrameKey {
    pub(super) name: String,
    pub(super) kernel: bool,
}

struct Node {
    parent: u32,
    frame: u32,
    /// True if every occurrence is inlined.
    inlined: bool,
    total: Pair,
    /// The part of `total` from stacks in which this frame rests on a guess.
    guessed: Pair,
    own: Pair,
}

/// A function below its callers, with its values on [`Side::Main`] and [`Side::Base`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallNode<'t> {
    /// Index of the caller's node. The root has its own.
    pub parent: usize,
    /// Name of the function.
    pub name: &'t str,
    /// Values of stacks through this node.
    pub total: [u64; 2],
    /// Values of stacks that end here.
    pub own: [u64; 2],
}

/// A flame graph of any number of profiles, with or without a base: stacks merged by function name from the root.
pub struct FlameTree {
    frames: HashMap<FrameKey, u32>,
    /// File of each frame: the last path component of its mapping. Of several files the first in order, so that the
    /// result does not depend on the order of profiles.
    files: Vec<String>,
    /// All nodes, each parent before its children. The first one is the root.
    nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
    /// Whether the native frames of interpreters stand between the functions that they run.
    interpreter_frames: bool,
    /// Whether frames that say what a stack lacks are left out.
    hide_error_frames: bool,
}

impl Default for FlameTree {
    fn default() -> Self {
        Self::new()
    }
}

impl FlameTree {
    /// Returns a tree that has only the root. It leaves out the native frames of interpreters.
    pub fn new() -> Self {
        let mut tree = Self {
            frames: HashMap::new(),
            files: Vec::new(),
            nodes: Vec::new(),
            children: HashMap::new(),
            interpreter_frames: false,
            hide_error_frames: false,
        };
        let frame = tree.frame(ROOT.to_owned(), false, "");
        tree.nodes.push(Node {
            parent: 0,
            frame,
            inlined: false,
            total: [0; 2],
            guessed: [0; 2],
            own: [0; 2],
        });
        tree
    }

    /// Lets the native frames of interpreters stand between the functions that they run, or leaves them out.
    #[must_use]
    pub fn with_interpreter_frames(mut self, shown: bool) -> Self {
        self.interpreter_frames = shown;
        self
    }

    /// Leaves out frames that say what a stack lacks ([`is_error_frame`]), or shows them. Their values stay with their callers.
    #[must_use]
    pub fn hide_error_frames(mut self, hidden: bool) -> Self {
        self.hide_error_frames = hidden;
        self
    }

    /// Adds the values of one sample type of a profile; see [`super::sample_type_index`].
    pub fn add(&mut self, profile: &Profile, type_index: usize, side: Side) -> Result<(), PprofError> {
        check(profile)?;
        if type_index >= profile.sample_type.len() {
            return Err(PprofError::Dangling {
                what: "the selection",
                to: "sample type",
                index: type_index as i128,
            });
        }
        let side = match side {
            Side::Main => 0,
            Side::Base => 1,
        };
        let location_frames = self.location_frames(profile)?;
        let ids = Ids::new("location", profile.location.iter().map(|location| location.id))?;
        let interpreters = if self.interpreter_frames {
            InterpreterFrames::default()
        } else {
            InterpreterFrames::new(profile)
        };
        let errors = self.frames.iter().filter(|(key, _)| is_error_frame(&key.name));
        let errors: HashSet<u32> = errors.map(|(_, frame)| *frame).collect();
        for sample in &profile.sample {
            let value = u64::try_from(sample.value[type_index]).unwrap_or(0);
            if value == 0 {
                continue;
            }
            let mut at = 0;
            add(&mut self.nodes[0].total, side, value);
            let sure = sure_frames(profile, sample);
            if sure < sample.location_id.len() {
                add(&mut self.nodes[0].guessed, side, value);
            }
            for (index, id) in interpreters.visible(sample).rev() {
                // The innermost frame is first, and every frame but the outermost is inlined into the next.
                let frames = &location_frames[ids.index(id, "a sample")?];
                for (depth, frame) in frames.iter().enumerate().rev() {
                    let is_error = errors.contains(frame);
                    if is_error && self.hide_error_frames {
                        continue;
                    }
                    at = self.child(at, *frame, depth + 1 < frames.len());
                    let node = &mut self.nodes[at as usize];
                    add(&mut node.total, side, value);
                    if index >= sure && !is_error {
                        add(&mut node.guessed, side, value);
                    }
                }
            }
            add(&mut self.nodes[at as usize].own, side, value);
        }
        Ok(())
    }

    /// Returns all nodes, each parent before its children. The first one is the root.
    pub fn nodes(&self) -> impl Iterator<Item = CallNode<'_>> {
        let names = self.names();
        self.nodes.iter().map(move |node| CallNode {
            parent: node.parent as usize,
            name: &names[node.frame as usize].name,
            total: node.total,
            own: node.own,
        })
    }

    /// Returns the sum of all values on one side.
    pub fn total(&self, side: Side) -> u64 {
        self.nodes[0].total[match side {
            Side::Main => 0,
            Side::Base => 1,
        }]
    }

    fn frame(&mut self, name: String, kernel: bool, file: &str) -> u32 {
        let next = self.files.len() as u32;
        let frame = *self.frames.entry(FrameKey { name, kernel }).or_insert(next);
        if frame == next {
            self.files.push(file.to_owned());
        } else {
            let have = &mut self.files[frame as usize];
            if have.is_empty() || (!file.is_empty() && file < have.as_str()) {
                file.clone_into(have);
            }
        }
        frame
    }

    fn child(&mut self, parent: u32, frame: u32, inlined: bool) -> u32 {
        let next = self.nodes.len() as u32;
        let child = *self.children.entry((parent, frame)).or_insert(next);
        if child == next {
            self.nodes.push(Node { parent, frame, inlined, total: [0; 2], guessed: [0; 2], own: [0; 2] });
        } else {
            self.nodes[child as usize].inlined &= inlined;
        }
        child
    }

    /// Returns the frames of each location, innermost first.
    pub(super) fn location_frames(&mut self, profile: &Profile) -> Result<Vec<Vec<u32>>, PprofError> {
        // The profile is checked, so the empty text is never used.
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|i| profile.string_table.get(i)).map_or("", String::as_str)
        };
        let mappings = Ids::new("mapping", profile.mapping.iter().map(|mapping| mapping.id))?;
        let functions = Ids::new("function", profile.function.iter().map(|function| function.id))?;
        profile
            .location
            .iter()
            .map(|location| {
                let mapping = match location.mapping_id {
                    0 => None,
                    id => Some(&profile.mapping[mappings.index(id, "a location")?]),
                };
                let file = mapping.map_or("", |mapping| base_name(text(mapping.filename)));
                let kernel = file.starts_with("[kernel");
                if location.line.is_empty() {
                    let name = unsymbolized(location, mapping, file);
                    return Ok(vec![self.frame(name, kernel, file)]);
                }
                location
                    .line
                    .iter()
                    .map(|line| {
                        let function = &profile.function[functions.index(line.function_id, "a location")?];
                        let name = match (text(function.name), text(function.system_name)) {
                            ("", "") => unsymbolized(location, mapping, file),
                            ("", system_name) => system_name.to_owned(),
                            (name, _) if is_interpreted(file) => {
                                interpreted_name(name, text(function.filename), function.start_line)
                            }
                            (name, _) => name.to_owned(),
                        };
                        Ok(self.frame(name, kernel, file))
                    })
                    .collect()
            })
            .collect()
    }

    pub(super) fn names(&self) -> Vec<&FrameKey> {
        let mut names: Vec<_> = self.frames.iter().collect();
        names.sort_unstable_by_key(|(_, number)| **number);
        names.into_iter().map(|(key, _)| key).collect()
    }

    /// Returns the nodes in depth-first order, heaviest child first. The order depends only on the content.
    fn in_order(&self, names: &[&FrameKey]) -> Vec<u32> {
        let mut children: Vec<Vec<u32>> = vec![Vec::new(); self.nodes.len()];
        for (number, node) in self.nodes.iter().enumerate().skip(1) {
            children[node.parent as usize].push(number as u32);
        }
        let mut order = Vec::with_capacity(self.nodes.len());
        let mut open = vec![0_u32];
        while let Some(number) = open.pop() {
            order.push(number);
            let children = &mut children[number as usize];
            // The stack returns the last child first.
            children.sort_unstable_by(|a, b| {
                let key = |n: u32| {
                    let node = &self.nodes[n as usize];
                    let FrameKey { name, kernel } = names[node.frame as usize];
                    (weight(node.total), std::cmp::Reverse((name, *kernel)))
                };
                key(*a).cmp(&key(*b))
            });
            open.append(children);
        }
        order
    }

    /// Returns the tree with at most `max_nodes` nodes, not counting the root. One child `[other]` replaces the smallest
    /// subtrees of each node, so all totals stay the same.
    pub fn prune(&self, max_nodes: usize) -> FlameNode {
        let names = self.names();
        let order = self.in_order(&names);
        let kept = self.kept(&order, max_nodes.max(1));

        let mut built: Vec<FlameNode> = self
            .nodes
            .iter()
            .map(|node| {
                let FrameKey { name, kernel } = names[node.frame as usize];
                FlameNode {
                    name: name.clone(),
                    file: self.files[node.frame as usize].clone(),
                    total: node.total[0],
                    self_: 0,
                    base_total: node.total[1],
                    base_self: 0,
                    children: Vec::new(),
                    kernel: *kernel,
                    inlined: node.inlined,
                    parent: 0,
                    guessed: node.guessed[0],
                    base_guessed: node.guessed[1],
                }
                .with_own(node.own)
            })
            .collect();
        let mut others: Vec<Pair> = vec![[0; 2]; self.nodes.len()];
        // Children come before their parents, so each node is complete when it moves. Siblings come smallest first.
        for number in order.iter().skip(1).rev() {
            let number = *number as usize;
            let node = &self.nodes[number];
            let parent = node.parent as usize;
            if kept[number] {
                let mut child = std::mem::take(&mut built[number]);
                child.finish(others[number]);
                built[parent].children.push(child);
            } else if kept[parent] {
                add(&mut others[parent], 0, node.total[0]);
                add(&mut others[parent], 1, node.total[1]);
            }
        }
        let mut root = std::mem::take(&mut built[0]);
        root.finish(others[0]);
        root
    }

    /// Marks the largest nodes that fit into `max_nodes` together with the `[other]` nodes for the rest. A node is at
    /// least as heavy as its children and comes before them, so the marked nodes form a tree.
    fn kept(&self, order: &[u32], max_nodes: usize) -> Vec<bool> {
        if self.nodes.len() <= max_nodes {
            return vec![true; self.nodes.len()];
        }
        let mut heaviest: Vec<u32> = order.to_vec();
        heaviest.sort_by_key(|number| std::cmp::Reverse(weight(self.nodes[*number as usize].total)));
        let mark = |count: usize| {
            let mut kept = vec![false; self.nodes.len()];
            for number in &heaviest[..count] {
                kept[*number as usize] = true;
            }
            kept
        };
        let size = |kept: &[bool]| {
            let mut has_other = vec![false; kept.len()];
            for (number, node) in self.nodes.iter().enumerate().skip(1) {
                if !kept[number] && kept[node.parent as usize] {
                    has_other[node.parent as usize] = true;
                }
            }
            kept.iter().chain(&has_other).filter(|is| **is).count()
        };
        // Each marked node needs at most one `[other]`, so half of the limit always fits.
        let (mut fits, mut beyond) = ((max_nodes / 2).max(1), max_nodes + 1);
        while beyond - fits > 1 {
            let middle = usize::midpoint(fits, beyond);
            if size(&mark(middle)) <= max_nodes {
                fits = middle;
            } else {
                beyond = middle;
            }
        }
        mark(fits)
    }

    /// Returns the functions with their self and total values, the largest self value first. A total counts each stack
    /// once, even if the function is recursive.
    pub fn top(&self, limit: usize) -> Vec<TopRow> {
        let names = self.names();
        let mut sums: Vec<(Pair, Pair)> = vec![([0; 2], [0; 2]); self.files.len()];
        // Number of occurrences of each frame among the ancestors of the current node.
        let mut above = vec![0_u32; self.files.len()];
        let mut path: Vec<u32> = Vec::new();
        for number in self.in_order(&names).into_iter().skip(1) {
            let node = &self.nodes[number as usize];
            while let Some(last) = path.last().copied().filter(|last| *last != node.parent) {
                above[self.nodes[last as usize].frame as usize] -= 1;
                path.pop();
            }
            let frame = node.frame as usize;
            let (own, total) = &mut sums[frame];
            for side in 0..2 {
                add(own, side, node.own[side]);
                if above[frame] == 0 {
                    add(total, side, node.total[side]);
                }
            }
            above[frame] += 1;
            path.push(number);
        }
        let mut rows: Vec<TopRow> = sums
            .into_iter()
            .enumerate()
            .filter(|(_, (_, total))| weight(*total) > 0)
            .map(|(frame, (own, total))| TopRow {
                name: names[frame].name.clone(),
                file: self.files[frame].clone(),
                self_: own[0],
                total: total[0],
                base_self: own[1],
                base_total: total[1],
            })
            .collect();
        rows.sort_by(|a, b| {
            let key =
                |row: &TopRow| (weight([row.self_, row.base_self]), weight([row.total, row.base_total]));
            key(b).cmp(&key(a)).then_with(|| (&a.name, &a.file).cmp(&(&b.name, &b.file)))
        });
        rows.truncate(limit);
        rows
    }
}

/// Returns the nodes of a tree as a list for [`crate::query::FlameGraphRequest::flat`]: each parent before its children,
/// each node with the index of its parent.
pub fn flat(root: FlameNode) -> Vec<FlameNode> {
    let mut list: Vec<FlameNode> = Vec::new();
    let mut open = vec![(root, 0)];
    while let Some((mut node, parent)) = open.pop() {
        let index = list.len() as u32;
        node.parent = parent;
        // The stack returns the first child next.
        open.extend(std::mem::take(&mut node.children).into_iter().rev().map(|child| (child, index)));
        list.push(node);
    }
    list
}

impl FlameNode {
    fn with_own(mut self, own: Pair) -> Self {
        self.self_ = own[0];
        self.base_self = own[1];
        self
    }

    /// Sorts the children, which were added smallest first, and inserts `[other]` by its weight.
    fn finish(&mut self, other: Pair) {
        self.children.reverse();
        if weight(other) > 0 {
            let [total, base_total] = other;
            let other = Self { name: OTHER.to_owned(), total, base_total, ..Self::default() }
                .with_own([total, base_total]);
            let index = self.children.partition_point(|child| {
                weight([child.total, child.base_total]) >= weight([total, base_total])
            });
            self.children.insert(index, other);
        }
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Returns a name for a location without symbols: `libfoo.so+0x1234` with the offset in the file, which is the same in
/// every run, or the name of a pseudo mapping such as `[anon]`.
fn unsymbolized(location: &Location, mapping: Option<&Mapping>, file: &str) -> String {
    match mapping {
        None => UNKNOWN.to_owned(),
        Some(_) if file.is_empty() => UNKNOWN.to_owned(),
        Some(_) if file.starts_with('[') => file.to_owned(),
        Some(mapping) => {
            let offset =
                location.address.wrapping_sub(mapping.memory_start).wrapping_add(mapping.file_offset);
            format!("{file}+{offset:#x}")
        }
    }
}

/// Returns a name as folded stacks hold it: `:` for `;`, which ends a frame there, and `?` for line ends and other control
/// characters.
pub fn folded_name(name: &str) -> Cow<'_, str> {
    if !name.contains(|c: char| c == ';' || c.is_control()) {
        return name.into();
    }
    let replaced = name.chars().map(|c| match c {
        ';' => ':',
        c if c.is_control() => '?',
        c => c,
    });
    replaced.collect::<String>().into()
}

/// Formats a profile as folded stacks, one line each: `main;work;memcpy 12`.
pub fn folded(profile: &Profile, type_index: usize) -> Result<String, PprofError> {
    use std::fmt::Write as _;

    let mut tree = FlameTree::new();
    tree.add(profile, type_index, Side::Main)?;
    let names = tree.names();
    let mut out = String::new();
    let mut path: Vec<u32> = Vec::new();
    for number in tree.in_order(&names) {
        let node = &tree.nodes[number as usize];
        while path.last().is_some_and(|last| *last != node.parent) {
            path.pop();
        }
        path.push(number);
        if node.own[0] == 0 {
            continue;
        }
        // The root is not a function, so it stands only for samples without frames.
        let stack = if path.len() > 1 { &path[1..] } else { &path[..] };
        for (depth, number) in stack.iter().enumerate() {
            let name = &names[tree.nodes[*number as usize].frame as usize].name;
            if depth > 0 {
                out.push(';');
            }
            out.push_str(&folded_name(name));
        }
        let _ = writeln!(out, " {}", node.own[0]);
    }
    Ok(out)
}
