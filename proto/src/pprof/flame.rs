//! Call trees and tables of functions. Everything here works without recursion: a stack may be thousands deep.

use std::collections::HashMap;

use super::{
    PprofError,
    check::{Ids, check},
};
use crate::{
    profiles::{Location, Mapping, Profile},
    query::{FlameNode, TopRow},
};

/// Which column of a comparison a profile counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What is looked at.
    Main,
    /// What it is compared against.
    Base,
}

/// The root's name.
const ROOT: &str = "all";
/// The name of what was folded away.
const OTHER: &str = "[other]";
/// The name of a frame about which nothing is known.
const UNKNOWN: &str = "[unknown]";

/// Main, base.
type Pair = [u64; 2];

fn add(sum: &mut Pair, side: usize, value: u64) {
    sum[side] = sum[side].saturating_add(value);
}

fn weight(pair: Pair) -> u64 {
    pair[0].saturating_add(pair[1])
}

/// A function, as frames are told apart: by name, kernel apart from user space.
#[derive(Clone, PartialEq, Eq, Hash)]
struct FrameKey {
    name: String,
    kernel: bool,
}

struct Node {
    parent: u32,
    frame: u32,
    /// Inlined wherever it was seen.
    inlined: bool,
    total: Pair,
    own: Pair,
}

/// Stacks merged by function name from the root: a flame graph, of one profile or of thousands, alone or compared.
pub struct FlameTree {
    frames: HashMap<FrameKey, u32>,
    /// By frame: the last component of the mapping's file name. Of several the first in order, so that the result does
    /// not depend on the order of profiles.
    files: Vec<String>,
    /// A parent comes before its children. The first is the root.
    nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
}

impl Default for FlameTree {
    fn default() -> Self {
        Self::new()
    }
}

impl FlameTree {
    /// A root without children.
    pub fn new() -> Self {
        let mut tree =
            Self { frames: HashMap::new(), files: Vec::new(), nodes: Vec::new(), children: HashMap::new() };
        let frame = tree.frame(ROOT.to_owned(), false, "");
        tree.nodes.push(Node { parent: 0, frame, inlined: false, total: [0; 2], own: [0; 2] });
        tree
    }

    /// Adds the values of one sample type (see [`super::sample_type_index`]) of a profile.
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
        for sample in &profile.sample {
            let value = u64::try_from(sample.value[type_index]).unwrap_or(0);
            if value == 0 {
                continue;
            }
            let mut at = 0;
            add(&mut self.nodes[0].total, side, value);
            for id in sample.location_id.iter().rev() {
                // Innermost first, and every line but the outermost is inlined into the next.
                for (depth, frame) in location_frames[ids.place(*id, "a sample")?].iter().enumerate().rev() {
                    at = self.child(
                        at,
                        *frame,
                        depth + 1 < location_frames[ids.place(*id, "a sample")?].len(),
                    );
                    add(&mut self.nodes[at as usize].total, side, value);
                }
            }
            add(&mut self.nodes[at as usize].own, side, value);
        }
        Ok(())
    }

    /// The sum of all values on one side.
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
            self.nodes.push(Node { parent, frame, inlined, total: [0; 2], own: [0; 2] });
        } else {
            self.nodes[child as usize].inlined &= inlined;
        }
        child
    }

    /// For each location its frames, innermost first.
    fn location_frames(&mut self, profile: &Profile) -> Result<Vec<Vec<u32>>, PprofError> {
        // A checked profile's indexes are good; an empty text is a harmless answer for one that is not.
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
                    id => Some(&profile.mapping[mappings.place(id, "a location")?]),
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
                        let function = &profile.function[functions.place(line.function_id, "a location")?];
                        let name = match (text(function.name), text(function.system_name)) {
                            ("", "") => unsymbolized(location, mapping, file),
                            ("", system_name) => system_name.to_owned(),
                            (name, _) => name.to_owned(),
                        };
                        Ok(self.frame(name, kernel, file))
                    })
                    .collect()
            })
            .collect()
    }

    fn names(&self) -> Vec<&FrameKey> {
        let mut names: Vec<_> = self.frames.iter().collect();
        names.sort_unstable_by_key(|(_, number)| **number);
        names.into_iter().map(|(key, _)| key).collect()
    }

    /// The nodes from the root, each before its children, heaviest child first: an order that the content alone decides.
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
            // The last is opened first.
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

    /// The tree as it is sent, with `max_nodes` nodes at most (but for the root): the smallest subtrees of each node
    /// are folded into one child `[other]`, so that all totals stay what they are.
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
                }
                .with_own(node.own)
            })
            .collect();
        let mut others: Vec<Pair> = vec![[0; 2]; self.nodes.len()];
        // Children before their parents, so that each is whole when it is moved; each parent's come smallest first.
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

    /// The largest nodes that fit with the `[other]` nodes that leaving out the rest makes. A node is at least as
    /// heavy as its children and stands before them, so what is kept is a tree.
    fn kept(&self, order: &[u32], max_nodes: usize) -> Vec<bool> {
        if self.nodes.len() <= max_nodes {
            return vec![true; self.nodes.len()];
        }
        let mut heaviest: Vec<u32> = order.to_vec();
        heaviest.sort_by_key(|number| std::cmp::Reverse(weight(self.nodes[*number as usize].total)));
        let keep = |count: usize| {
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
        // One node kept makes at most one `[other]`, so half always fits.
        let (mut fits, mut beyond) = ((max_nodes / 2).max(1), max_nodes + 1);
        while beyond - fits > 1 {
            let middle = usize::midpoint(fits, beyond);
            if size(&keep(middle)) <= max_nodes {
                fits = middle;
            } else {
                beyond = middle;
            }
        }
        keep(fits)
    }

    /// The functions by their own values, largest first. A function's total counts each stack once, however often the
    /// function recurs in it.
    pub fn top(&self, limit: usize) -> Vec<TopRow> {
        let names = self.names();
        let mut sums: Vec<(Pair, Pair)> = vec![([0; 2], [0; 2]); self.files.len()];
        // How often each frame stands above the node that is looked at.
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

/// The nodes of a tree as a list, as [`crate::query::FlameGraphRequest::flat`] asks for it: a parent before its
/// children, each with its parent's place.
pub fn flat(root: FlameNode) -> Vec<FlameNode> {
    let mut list: Vec<FlameNode> = Vec::new();
    let mut open = vec![(root, 0)];
    while let Some((mut node, parent)) = open.pop() {
        let place = list.len() as u32;
        node.parent = parent;
        // The first child is opened next.
        open.extend(std::mem::take(&mut node.children).into_iter().rev().map(|child| (child, place)));
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

    /// The children came smallest first; what was folded away joins them at its place.
    fn finish(&mut self, other: Pair) {
        self.children.reverse();
        if weight(other) > 0 {
            let [total, base_total] = other;
            let other = Self { name: OTHER.to_owned(), total, base_total, ..Self::default() }
                .with_own([total, base_total]);
            let place = self.children.partition_point(|child| {
                weight([child.total, child.base_total]) >= weight([total, base_total])
            });
            self.children.insert(place, other);
        }
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// `libfoo.so+0x1234`, by the offset in the file, which does not change from run to run. A pseudo mapping has no such
/// thing: `[anon]`.
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

/// The profile as folded stacks, one line each, for tools that read those: `main;work;memcpy 12`.
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
        // The root is a frame of ours only where there is no other.
        let stack = if path.len() > 1 { &path[1..] } else { &path[..] };
        for (depth, number) in stack.iter().enumerate() {
            let name = &names[tree.nodes[*number as usize].frame as usize].name;
            if depth > 0 {
                out.push(';');
            }
            out.extend(name.chars().map(|c| match c {
                ';' => ':',
                '\n' | '\r' => ' ',
                c => c,
            }));
        }
        let _ = writeln!(out, " {}", node.own[0]);
    }
    Ok(out)
}
