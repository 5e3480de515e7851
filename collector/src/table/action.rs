//! Entries of the log of a Delta table, as far as this writer needs them. The protocol is that of Delta Lake, reader version
//! 1 and writer version 2, without table features.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::schema::{PARTITIONS, Schema};
use crate::time;

/// Tag of a data file: ids of the segments whose samples the commit of the file added, separated by spaces.
pub(super) const SEGMENTS_TAG: &str = "gannet.segments";
/// Tag of a data file: CRC-32 of its bytes in hex. Parquet files of this writer have no checksums of their own.
pub(super) const CRC_TAG: &str = "gannet.crc32";
pub(super) const READER_VERSION: u32 = 1;
pub(super) const WRITER_VERSION: u32 = 2;
/// First part of `engineInfo`, by which a compactor recognizes commits of its kind.
const ENGINE: &str = "gannet-collector/";

/// One line of a commit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Action {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) commit_info: Option<CommitInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) protocol: Option<Protocol>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) meta_data: Option<MetaData>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) add: Option<Add>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remove: Option<Remove>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CommitInfo {
    pub(super) timestamp: u64,
    pub(super) operation: String,
    pub(super) operation_parameters: Map<String, Value>,
    pub(super) engine_info: String,
    /// Id of this commit, by which its writer recognizes it after a lost answer.
    pub(super) txn_id: String,
    /// Id of the writing process.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) gannet_writer: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Protocol {
    pub(super) min_reader_version: u32,
    pub(super) min_writer_version: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MetaData {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    pub(super) format: Format,
    pub(super) schema_string: String,
    pub(super) partition_columns: Vec<String>,
    pub(super) configuration: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) created_time: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Format {
    pub(super) provider: String,
    #[serde(default)]
    pub(super) options: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Add {
    /// Relative to the directory of the table.
    pub(super) path: String,
    pub(super) partition_values: BTreeMap<String, Option<String>>,
    pub(super) size: u64,
    pub(super) modification_time: u64,
    pub(super) data_change: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stats: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tags: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Remove {
    pub(super) path: String,
    #[serde(default)]
    pub(super) deletion_timestamp: Option<u64>,
    pub(super) data_change: bool,
    #[serde(default)]
    pub(super) extended_file_metadata: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) partition_values: Option<BTreeMap<String, Option<String>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) size: Option<u64>,
}

impl Add {
    /// Returns an action that removes this file, with the present time.
    pub(super) fn removal(&self, data_change: bool) -> Remove {
        Remove {
            path: self.path.clone(),
            deletion_timestamp: Some(time::now_ms()),
            data_change,
            extended_file_metadata: Some(true),
            partition_values: Some(self.partition_values.clone()),
            size: Some(self.size),
        }
    }

    /// Reports whether these bytes match the size of the file in the log, and the checksum if the log has one.
    pub(super) fn has_content(&self, bytes: &[u8]) -> bool {
        let crc = self.tags.as_ref().and_then(|tags| tags.get(CRC_TAG));
        bytes.len() as u64 == self.size && crc.is_none_or(|crc| *crc == crc_text(bytes))
    }

    /// Returns the number of rows that the log states.
    pub(super) fn rows(&self) -> Option<u64> {
        let stats: Value = serde_json::from_str(self.stats.as_ref()?).ok()?;
        stats.get("numRecords")?.as_u64()
    }
}

/// Returns the value of [`CRC_TAG`] for these bytes.
pub(super) fn crc_text(bytes: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(bytes))
}

impl CommitInfo {
    /// Returns the description of a new commit.
    pub(super) fn new(operation: &str, writer: &str) -> Self {
        let parameters =
            if operation == "WRITE" { vec![("mode".to_owned(), "Append".into())] } else { Vec::new() };
        Self {
            timestamp: time::now_ms(),
            operation: operation.to_owned(),
            operation_parameters: parameters.into_iter().collect(),
            engine_info: format!("{ENGINE}{}", env!("CARGO_PKG_VERSION")),
            txn_id: ulid::Ulid::new().to_string(),
            gannet_writer: writer.to_owned(),
        }
    }

    /// Reports whether a compactor wrote the commit, and no other program.
    pub(super) fn is_own_kind(&self) -> bool {
        self.engine_info.starts_with(ENGINE)
    }
}

impl MetaData {
    /// Returns the description of a new table.
    pub(super) fn new(schema: &Schema) -> Self {
        let id = ulid::Ulid::new().0;
        Self {
            id: format!(
                "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
                id >> 96,
                id >> 80 & 0xffff,
                id >> 64 & 0xffff,
                id >> 48 & 0xffff,
                id & 0xffff_ffff_ffff
            ),
            name: Some(schema.name.to_owned()),
            format: Format { provider: "parquet".to_owned(), options: BTreeMap::new() },
            schema_string: schema.delta(),
            partition_columns: PARTITIONS.iter().map(|(name, ..)| (*name).to_owned()).collect(),
            configuration: BTreeMap::new(),
            created_time: Some(time::now_ms()),
        }
    }
}

/// Encodes the lines of a commit.
pub(super) fn encode(actions: &[Action]) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::new();
    for action in actions {
        serde_json::to_writer(&mut out, action)?;
        out.push(b'\n');
    }
    Ok(out)
}

/// Decodes the lines of a commit. Unknown actions come as empty ones.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<Action>, serde_json::Error> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.trim_ascii().is_empty())
        .map(serde_json::from_slice)
        .collect()
}
