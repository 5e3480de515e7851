//! Flame graphs in the form of Pyroscope: levels of bars, of one side or of two compared ones.
//!
//! A bar is its offset from the end of the bar before it, its total, its own value, and the index of its name. The children of a
//! bar begin behind its own value, in the order of their names, and `other` is the last one. The code does not recurse,
//! because a stack may have a thousand frames.

use std::collections::HashMap;

use gannet_proto::{
    foreign::pyroscope_querier::{FlameGraph, FlameGraphDiff, Level},
    pprof::FlameTree,
};
use tonic::Status;

/// Nodes of a flame graph without `max_nodes`, and the highest `max_nodes`: Pyroscope's.
const DEFAULT_NODES: u64 = 8192;
const MAX_NODES: u64 = 1 << 20;
/// Name of the root. Grafana expects it at index 0.
const ROOT: &str = "total";
/// Name of the bar that stands for small ones.
const OTHER: &str = "other";

/// Values of the left and the right side.
type Pair = [i64; 2];

fn weight(pair: Pair) -> i64 {
    pair[0].saturating_add(pair[1])
}

fn sum(a: Pair, b: Pair) -> Pair {
    [a[0].saturating_add(b[0]), a[1].saturating_add(b[1])]
}

struct Node {
    name: u32,
    total: Pair,
    own: Pair,
    children: Vec<u32>,
}

/// Stacks of one or two selections, merged by the names of their functions from the root.
pub(super) struct CallTree {
    names: Vec<String>,
    /// The first is the root.
    nodes: Vec<Node>,
}

/// A bar of the level that is being written.
enum Bar {
    Node(u32),
    /// Sum of the children that are too small.
    Other(Pair),
}

/// The encoded levels, whose bars have three numbers for each side.
struct Encoded {
    names: Vec<String>,
    levels: Vec<Level>,
    max_self: i64,
}

/// Checks the most nodes that a client wants. `None` and 0 mean the default.
pub(super) fn node_limit(max_nodes: Option<i64>) -> Result<usize, Status> {
    match max_nodes {
        None | Some(0) => Ok(DEFAULT_NODES as usize),
        Some(n) => u64::try_from(n).ok().filter(|n| *n <= MAX_NODES).map(|n| n as usize).ok_or_else(|| {
            Status::invalid_argument(format!("max_nodes: {n} is not between 0 and {MAX_NODES}"))
        }),
    }
}

impl CallTree {
    pub(super) fn new(tree: &FlameTree) -> Self {
        let signed = |pair: [u64; 2]| pair.map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let mut built = Self { names: Vec::new(), nodes: Vec::new() };
        // A function of the kernel and one of the program can have the same name, which one bar shows.
        let mut merged: Vec<u32> = Vec::new();
        let mut children: HashMap<(u32, u32), u32> = HashMap::new();
        for (index, node) in tree.nodes().enumerate() {
            let name = if index == 0 { ROOT } else { node.name };
            let number = *numbers.entry(name).or_insert_with(|| {
                built.names.push(name.to_owned());
                built.names.len() as u32 - 1
            });
            let (total, own) = (signed(node.total), signed(node.own));
            let next = built.nodes.len() as u32;
            let at = if index == 0 {
                next
            } else {
                let parent = merged[node.parent];
                let at = *children.entry((parent, number)).or_insert(next);
                if at == next {
                    built.nodes[parent as usize].children.push(next);
                }
                at
            };
            if at == next {
                built.nodes.push(Node { name: number, total, own, children: Vec::new() });
            } else {
                let node = &mut built.nodes[at as usize];
                (node.total, node.own) = (sum(node.total, total), sum(node.own, own));
            }
            merged.push(at);
        }
        built.sort_children();
        built
    }

    fn sort_children(&mut self) {
        for index in 0..self.nodes.len() {
            let mut children = std::mem::take(&mut self.nodes[index].children);
            children.sort_unstable_by(|a, b| {
                let name = |n: u32| self.names[self.nodes[n as usize].name as usize].as_str();
                name(*a).cmp(name(*b))
            });
            self.nodes[index].children = children;
        }
    }

    /// Returns the least total of a node that stays: that of the `max_nodes` largest, or 0 if all stay.
    fn threshold(&self, max_nodes: usize) -> i64 {
        let mut totals: Vec<i64> = self.nodes.iter().skip(1).map(|node| weight(node.total)).collect();
        if totals.len() <= max_nodes {
            return 0;
        }
        let (_, least, _) = totals.select_nth_unstable_by(max_nodes - 1, |a, b| b.cmp(a));
        *least
    }

    /// Writes the levels with the values of these sides.
    fn levels(&self, max_nodes: usize, sides: &[usize]) -> Encoded {
        let least = self.threshold(max_nodes);
        let mut out = Encoded { names: Vec::new(), levels: Vec::new(), max_self: 0 };
        let mut numbers: HashMap<&str, i64> = HashMap::new();
        // With the position of each bar on each side.
        let mut level: Vec<(Bar, Pair)> = vec![(Bar::Node(0), [0; 2])];
        while !level.is_empty() {
            let mut values = Vec::with_capacity(level.len() * (sides.len() * 3 + 1));
            let (mut end, mut next) = ([0; 2], Vec::new());
            for (bar, start) in level {
                let (name, total, own) = match bar {
                    Bar::Node(at) => {
                        let node = &self.nodes[at as usize];
                        self.push_children(node, sum(start, node.own), least, &mut next);
                        (self.names[node.name as usize].as_str(), node.total, node.own)
                    }
                    Bar::Other(total) => (OTHER, total, total),
                };
                for side in sides {
                    values.extend([start[*side].saturating_sub(end[*side]), total[*side], own[*side]]);
                    out.max_self = out.max_self.max(own[*side]);
                }
                let number = *numbers.entry(name).or_insert_with(|| {
                    out.names.push(name.to_owned());
                    out.names.len() as i64 - 1
                });
                values.push(number);
                end = sum(start, total);
            }
            out.levels.push(Level { values });
            level = next;
        }
        out
    }

    /// Adds the bars of a node's children, from `start` on.
    fn push_children(&self, node: &Node, mut start: Pair, least: i64, bars: &mut Vec<(Bar, Pair)>) {
        let mut other = [0; 2];
        for child in &node.children {
            let Node { name, total, .. } = &self.nodes[*child as usize];
            if weight(*total) < least || self.names[*name as usize] == OTHER {
                other = sum(other, *total);
            } else {
                bars.push((Bar::Node(*child), start));
                start = sum(start, *total);
            }
        }
        if weight(other) > 0 {
            bars.push((Bar::Other(other), start));
        }
    }

    /// Returns the flame graph of the left side.
    pub(super) fn flame_graph(&self, max_nodes: usize) -> FlameGraph {
        let Encoded { names, levels, max_self } = self.levels(max_nodes, &[0]);
        FlameGraph { names, levels, total: self.nodes[0].total[0], max_self }
    }

    /// Returns the flame graph of both sides.
    pub(super) fn diff(&self, max_nodes: usize) -> FlameGraphDiff {
        let Encoded { names, levels, max_self } = self.levels(max_nodes, &[0, 1]);
        let total = self.nodes[0].total;
        FlameGraphDiff {
            names,
            levels,
            total: weight(total),
            max_self,
            left_ticks: total[0],
            right_ticks: total[1],
        }
    }
}
