//! Checks of all files of the tables, and the repair that sets damaged tables aside.

use std::{collections::BTreeSet, fs, path::Path};

use super::{
    TableError,
    log::Log,
    schema::{FRAMES, HOURS, LABELS, MINUTES, PROFILES, SAMPLES, STACKS, Schema},
};
use crate::store::{ObjectFault, StoreError, TableObjects, Verified};

/// Returns this table, and the tables whose rows refer to its rows.
fn dependents(table: &str) -> &'static [&'static str] {
    match table {
        "frames" => &["frames", "stacks", "samples", "samples_by_minute", "samples_by_hour"],
        "stacks" => &["stacks", "samples", "samples_by_minute", "samples_by_hour"],
        "labels" => &["labels", "samples"],
        "profiles" => &["profiles"],
        "samples_by_minute" => &["samples_by_minute"],
        "samples_by_hour" => &["samples_by_hour"],
        _ => &["samples"],
    }
}

/// Reads all files of the tables, and calls `report` with the path and the fault of each faulty one. Adds to the totals. Returns
/// the names of the faulty tables.
pub(crate) async fn verify(
    objects: &TableObjects,
    verified: &mut Verified,
    mut report: impl FnMut(&str, &ObjectFault),
) -> Result<Vec<&'static str>, StoreError> {
    let mut faulty = Vec::new();
    for schema in [&FRAMES, &STACKS, &LABELS, &PROFILES, &SAMPLES, &MINUTES, &HOURS] {
        let mut log = Log::new(schema, objects.clone(), "");
        let faults = check(schema, &mut log, verified).await?;
        for (path, fault) in &faults {
            verified.faults += 1;
            report(path, fault);
        }
        if !faults.is_empty() {
            faulty.push(schema.name);
        }
    }
    Ok(faulty)
}

/// Returns the faults of a table by the paths of its files.
async fn check(
    schema: &Schema,
    log: &mut Log,
    verified: &mut Verified,
) -> Result<Vec<(String, ObjectFault)>, StoreError> {
    let name = |path: &str| format!("table/{}/{path}", schema.name);
    let broken = |error: TableError| match error {
        TableError::Object(error) => Err(StoreError::Object(error)),
        error => Ok(vec![(name("_delta_log"), ObjectFault::TableLog(error.to_string()))]),
    };
    if let Err(error) = log.read().await {
        return broken(error);
    }
    let mut faults = Vec::new();
    let paths: Vec<String> = log.files.keys().cloned().collect();
    for path in paths {
        let Some(file) = log.files.get(&path).cloned() else { continue };
        let fault = match log.read_file(&path).await {
            Ok(Some(bytes)) => {
                verified.table_files += 1;
                verified.bytes += bytes.len() as u64;
                let reason = "its size or its checksum is not that of the table's log";
                (!file.add.has_content(&bytes)).then_some(ObjectFault::TableFile(reason))
            }
            Ok(None) => {
                // A collector may have replaced and deleted the file since.
                if let Err(error) = log.read().await {
                    return broken(error);
                }
                let is_needed = log.files.contains_key(&path);
                is_needed.then_some(ObjectFault::TableFile("the table needs it, and it is missing"))
            }
            Err(error) => Some(ObjectFault::Unreadable(error.to_string())),
        };
        faults.extend(fault.map(|fault| (name(&path), fault)));
    }
    Ok(faults)
}

/// Moves damaged tables, and the tables that refer to their rows, into a directory. The next collector writes them again. Returns the
/// names of the moved tables.
pub(crate) fn set_aside(root: &Path, faulty: &[&str], to: &Path) -> Result<Vec<&'static str>, StoreError> {
    let names: BTreeSet<&'static str> =
        faulty.iter().flat_map(|table| dependents(table).iter().copied()).collect();
    fs::create_dir_all(to).map_err(|e| StoreError::io("create", to, e))?;
    // Samples and their sums refer to the others, so they go first.
    let mut moved = Vec::new();
    for name in ["samples_by_hour", "samples_by_minute", "samples", "stacks", "frames", "labels", "profiles"]
    {
        let from = root.join(name);
        if names.contains(name) && from.is_dir() {
            fs::rename(&from, to.join(name)).map_err(|e| StoreError::io("set aside", &from, e))?;
            moved.push(name);
        }
    }
    Ok(moved)
}
