//! `/debug/maps`: the kernel maps and the unwind tables.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{
    engine::{EngineError, KernelView},
    kernel::MapFill,
    node::Node,
};

/// Content of `/debug/maps`.
#[derive(Serialize)]
pub(in crate::debug) struct MapsView {
    fill: Vec<MapRow>,
    tables: Option<TablesView>,
    supplied: SuppliedView,
    sampler_ns: Option<u64>,
}

#[derive(Serialize)]
struct MapRow {
    name: String,
    kind: &'static str,
    /// None: the map always has all of its entries.
    entries: Option<u64>,
    capacity: u64,
}

/// Supplied tables: files and their content ids, and the files that were refused.
#[derive(Serialize)]
struct SuppliedView {
    used: Vec<(String, String)>,
    refused: Vec<String>,
}

#[derive(Serialize)]
struct TablesView {
    resident: u64,
    resident_bytes: u64,
    budget_bytes: u64,
    rules: u64,
    processes: u64,
    keys: u64,
    made: u64,
    failed: u64,
    evicted: u64,
    refused: u64,
}

pub(in crate::debug) async fn maps(node: &Node) -> Result<MapsView, EngineError> {
    let KernelView { maps, unwind_tables, sampler_cost, .. } = node.engine.kernel_view().await?;
    let supplied = node.supplied();
    Ok(MapsView {
        fill: maps
            .into_iter()
            .map(|MapFill { name, kind, entries, capacity }| MapRow { name, kind, entries, capacity })
            .collect(),
        supplied: SuppliedView {
            used: supplied
                .used
                .iter()
                .map(|(path, content)| (path.display().to_string(), content.to_string()))
                .collect(),
            refused: supplied.refused.iter().map(ToString::to_string).collect(),
        },
        tables: unwind_tables.map(|stats| TablesView {
            resident: stats.resident,
            resident_bytes: stats.resident_bytes,
            budget_bytes: stats.budget_bytes,
            rules: stats.rules,
            processes: stats.processes,
            keys: stats.keys,
            made: stats.made,
            failed: stats.failed,
            evicted: stats.evicted,
            refused: stats.refused.total(),
        }),
        sampler_ns: sampler_cost.map(|(time, count)| time / count.max(1)),
    })
}

impl MapsView {
    pub(in crate::debug) fn text(&self) -> String {
        let mut text =
            format!("{:16} {:12} {:>10} {:>10} {:>6}\n", "MAP", "KIND", "ENTRIES", "CAPACITY", "FULL");
        for MapRow { name, kind, entries, capacity } in &self.fill {
            let (entries, full) = match entries {
                Some(entries) => (entries.to_string(), format!("{} %", entries * 100 / (*capacity).max(1))),
                None => ("fixed".to_owned(), String::new()),
            };
            let _ = writeln!(text, "{name:16} {kind:12} {entries:>10} {capacity:>10} {full:>6}");
        }
        if let Some(tables) = &self.tables {
            let _ = writeln!(
                text,
                "\nunwind tables: {} in the kernel, {} of {} bytes, {} rules\nprocesses unwound in the kernel: {}, {} keys of \
                 the mapping trie\nbuilt {}, failed {}, evicted {}, processes refused {}",
                tables.resident,
                tables.resident_bytes,
                tables.budget_bytes,
                tables.rules,
                tables.processes,
                tables.keys,
                tables.made,
                tables.failed,
                tables.evicted,
                tables.refused
            );
        }
        for (path, content) in &self.supplied.used {
            let _ = writeln!(text, "supplied: {path} for file content {content}");
        }
        for refused in &self.supplied.refused {
            let _ = writeln!(text, "refused: {refused}");
        }
        match self.sampler_ns {
            Some(ns) => {
                let _ = writeln!(text, "\nthe sampler takes {ns} ns on average");
            }
            None => text += "\nset sysctl kernel.bpf_stats_enabled=1 to measure the cost of the sampler\n",
        }
        text
    }
}
