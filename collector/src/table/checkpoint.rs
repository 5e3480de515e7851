//! Checkpoints of a log: its state in one Parquet file, so that readers need not read all commits.

use std::sync::Arc;

use bytes::Bytes;
use parquet::{
    basic::{ConvertedType, Type as Physical},
    data_type::ByteArray,
    errors::ParquetError,
    file::{reader::FileReader as _, serialized_reader::SerializedFileReader},
    record::{Field, Row},
    schema::{
        parser::parse_message_type,
        types::{Type, TypePtr},
    },
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    action::{Action, Add, MetaData, Protocol, Remove},
    file::{Leaf, Values, untyped_writer, write_group},
};

/// Name of the file that points to the last checkpoint.
pub(super) const LAST: &str = "_last_checkpoint";
/// The columns that the protocol defines, one group for each kind of action.
const SCHEMA: &str = "message checkpoint {
    optional group txn {
        optional binary appId (STRING); optional int64 version; optional int64 lastUpdated;
    }
    optional group add {
        optional binary path (STRING);
        optional group partitionValues (MAP) {
            repeated group key_value { required binary key (STRING); optional binary value (STRING); }
        }
        optional int64 size; optional int64 modificationTime; optional boolean dataChange;
        optional binary stats (STRING);
        optional group tags (MAP) {
            repeated group key_value { required binary key (STRING); optional binary value (STRING); }
        }
    }
    optional group remove {
        optional binary path (STRING); optional int64 deletionTimestamp; optional boolean dataChange;
        optional boolean extendedFileMetadata;
        optional group partitionValues (MAP) {
            repeated group key_value { required binary key (STRING); optional binary value (STRING); }
        }
        optional int64 size;
    }
    optional group metaData {
        optional binary id (STRING); optional binary name (STRING); optional binary description (STRING);
        optional group format {
            optional binary provider (STRING);
            optional group options (MAP) {
                repeated group key_value { required binary key (STRING); optional binary value (STRING); }
            }
        }
        optional binary schemaString (STRING);
        optional group partitionColumns (LIST) { repeated group list { optional binary element (STRING); } }
        optional group configuration (MAP) {
            repeated group key_value { required binary key (STRING); optional binary value (STRING); }
        }
        optional int64 createdTime;
    }
    optional group protocol { optional int32 minReaderVersion; optional int32 minWriterVersion; }
}";

/// Content of the file [`LAST`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Last {
    pub(super) version: u64,
    /// Number of actions in the checkpoint.
    pub(super) size: u64,
    #[serde(default)]
    pub(super) size_in_bytes: u64,
}

/// Returns the name of a checkpoint.
pub(super) fn name(version: u64) -> String {
    format!("{version:020}.checkpoint.parquet")
}

/// Returns the version of the checkpoint with this name.
pub(super) fn version(name: &str) -> Option<u64> {
    name.strip_suffix(".checkpoint.parquet")?.parse().ok()
}

/// Encodes a checkpoint. Returns it with the number of its actions.
pub(super) fn encode(
    protocol: &Protocol,
    meta: &MetaData,
    adds: &[&Add],
    removes: &[Remove],
) -> Result<(Vec<u8>, u64), ParquetError> {
    let schema: TypePtr = Arc::new(parse_message_type(SCHEMA)?);
    let mut leaves = Vec::new();
    collect_leaves(&schema, &mut leaves);
    let first = [
        Action { protocol: Some(protocol.clone()), ..Action::default() },
        Action { meta_data: Some(meta.clone()), ..Action::default() },
    ];
    let adds = adds.iter().map(|add| {
        // No reader takes a file of a checkpoint for a change.
        Action { add: Some(Add { data_change: false, ..(*add).clone() }), ..Action::default() }
    });
    let removes = removes.iter().map(|remove| Action {
        remove: Some(Remove { data_change: false, ..remove.clone() }),
        ..Action::default()
    });
    let mut actions = 0;
    for action in first.into_iter().chain(adds).chain(removes) {
        let value = serde_json::to_value(action).map_err(|error| ParquetError::General(error.to_string()))?;
        let mut next = 0;
        for field in schema.get_fields() {
            shred(field, value.get(field.name()), 0, &mut leaves, &mut next);
        }
        actions += 1;
    }
    let mut writer = untyped_writer(schema)?;
    write_group(&mut writer, leaves)?;
    Ok((writer.into_inner()?, actions))
}

fn collect_leaves(node: &Type, leaves: &mut Vec<Leaf>) {
    if node.is_group() {
        node.get_fields().iter().for_each(|field| collect_leaves(field, leaves));
        return;
    }
    leaves.push(Leaf::new(match node.get_physical_type() {
        Physical::INT64 => Values::Longs(Vec::new()),
        Physical::INT32 => Values::Ints(Vec::new()),
        Physical::BOOLEAN => Values::Bools(Vec::new()),
        _ => Values::Bytes(Vec::new()),
    }));
}

/// Adds a value to the columns of a field. `depth`: how many optional parents are there. `next`: index of the first column.
fn shred(node: &Type, value: Option<&Value>, depth: i16, leaves: &mut [Leaf], next: &mut usize) {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return skip(node, depth, has_list(node), leaves, next);
    };
    let depth = depth + i16::from(node.is_optional());
    if !node.is_group() {
        return push(&mut leaves[*next], value, depth, None, next);
    }
    let entries: Vec<Vec<Option<&Value>>>;
    let keys: Vec<Value>;
    match node.get_basic_info().converted_type() {
        ConvertedType::MAP => {
            let map: Vec<_> = value.as_object().into_iter().flatten().collect();
            keys = map.iter().map(|(key, _)| Value::from(key.as_str())).collect();
            entries = keys.iter().zip(&map).map(|(key, (_, value))| vec![Some(key), Some(*value)]).collect();
        }
        ConvertedType::LIST => {
            entries = value.as_array().into_iter().flatten().map(|value| vec![Some(value)]).collect();
        }
        _ => {
            for field in node.get_fields() {
                shred(field, value.get(field.name()), depth, leaves, next);
            }
            return;
        }
    }
    // The repeated group between a list and its elements.
    let columns = node.get_fields()[0].get_fields();
    for (column, field) in columns.iter().enumerate() {
        let mut at = *next;
        if entries.is_empty() {
            skip(field, depth, true, leaves, &mut at);
        }
        for (index, entry) in entries.iter().enumerate() {
            at = *next;
            let (depth, repeated) = (depth + 1, i16::from(index > 0));
            if let Some(value) = entry[column].filter(|value| !value.is_null()) {
                let depth = depth + i16::from(field.is_optional());
                push(&mut leaves[at], value, depth, Some(repeated), &mut at);
            } else {
                leaves[at].defined.push(depth);
                leaves[at].repeated.push(repeated);
                at += 1;
            }
        }
        *next = at;
    }
}

fn has_list(node: &Type) -> bool {
    matches!(node.get_basic_info().converted_type(), ConvertedType::MAP | ConvertedType::LIST)
}

/// Notes a missing value in all columns of a field.
fn skip(node: &Type, depth: i16, in_list: bool, leaves: &mut [Leaf], next: &mut usize) {
    if node.is_group() {
        for field in node.get_fields() {
            skip(field, depth, in_list || has_list(field), leaves, next);
        }
        return;
    }
    leaves[*next].defined.push(depth);
    if in_list {
        leaves[*next].repeated.push(0);
    }
    *next += 1;
}

fn push(leaf: &mut Leaf, value: &Value, depth: i16, repeated: Option<i16>, next: &mut usize) {
    leaf.defined.push(depth);
    leaf.repeated.extend(repeated);
    match &mut leaf.values {
        Values::Bytes(values) => values.push(ByteArray::from(value.as_str().unwrap_or_default())),
        Values::Longs(values) => values.push(value.as_i64().unwrap_or_default()),
        Values::Ints(values) => values.push(value.as_i64().unwrap_or_default() as i32),
        Values::Bools(values) => values.push(value.as_bool().unwrap_or_default()),
    }
    *next += 1;
}

/// Decodes a checkpoint.
pub(super) fn decode(bytes: Bytes) -> Result<Vec<Action>, ParquetError> {
    let reader = SerializedFileReader::new(bytes)?;
    let mut actions = Vec::new();
    for row in reader.get_row_iter(None)? {
        let value = object(&row?);
        let action =
            serde_json::from_value(value).map_err(|error| ParquetError::General(error.to_string()))?;
        actions.push(action);
    }
    Ok(actions)
}

fn object(row: &Row) -> Value {
    let fields = row.get_column_iter().map(|(name, field)| (name.clone(), json(field)));
    Value::Object(fields.filter(|(_, value)| !value.is_null()).collect())
}

fn json(field: &Field) -> Value {
    match field {
        Field::Bool(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(json).collect()),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().filter_map(|(key, value)| match key {
                Field::Str(key) => Some((key.clone(), json(value))),
                _ => None,
            });
            Value::Object(entries.collect::<Map<_, _>>())
        }
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{action::SEGMENTS_TAG, partition::Partition, schema::SAMPLES},
        *,
    };

    #[test]
    fn a_checkpoint_returns_the_state_of_the_log() {
        let protocol = Protocol { min_reader_version: 1, min_writer_version: 2 };
        let meta = MetaData::new(&SAMPLES);
        let add = |path: &str, tag: Option<&str>| Add {
            path: path.to_owned(),
            partition_values: Partition(473_000).values(),
            size: 7,
            modification_time: 9,
            data_change: false,
            stats: Some("{}".to_owned()),
            tags: tag.map(|tag| [(SEGMENTS_TAG.to_owned(), tag.to_owned())].into()),
        };
        let adds = [add("a", Some("x y")), add("b", None), add("c", Some("z"))];
        let remove = Remove {
            path: "d".to_owned(),
            deletion_timestamp: Some(3),
            data_change: false,
            extended_file_metadata: Some(false),
            partition_values: None,
            size: None,
        };
        let (bytes, actions) =
            encode(&protocol, &meta, &adds.iter().collect::<Vec<_>>(), std::slice::from_ref(&remove))
                .unwrap();
        let read = decode(bytes.into()).unwrap();
        assert_eq!((read.len(), actions), (6, 6));
        assert_eq!(read[0].protocol.as_ref(), Some(&protocol));
        assert_eq!(read[1].meta_data.as_ref(), Some(&meta));
        let found: Vec<&Add> = read.iter().filter_map(|action| action.add.as_ref()).collect();
        assert_eq!(found, adds.iter().collect::<Vec<_>>());
        assert_eq!(read[5].remove.as_ref(), Some(&remove));
    }
}
